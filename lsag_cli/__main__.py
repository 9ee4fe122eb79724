from lsag_cli.app import main

main()
