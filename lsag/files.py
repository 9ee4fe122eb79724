"""Writing files: whole or not at all, and with errors that name them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lsag.errors import LsagError, OutputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into an OutputError that names it."""
    try:
        yield
    except LsagError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        fix = (
            "create the folder first" if isinstance(error, FileNotFoundError) else "free space or choose another place"
        )
        raise OutputError(f"cannot write {path}: {reason}", fix) from error


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that takes the name `path` only once it is written and synced. OutputError when that fails."""
    temporary = None
    try:
        with writing(path):
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary = Path(file.name)
                yield file
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
