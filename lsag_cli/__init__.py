"""The command line of lsag: parse, call one function of the library, show what came of it."""
