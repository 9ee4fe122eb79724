"""Files are read with errors that name them, and written whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lsag.errors import InputError, LsagError, OutputError, first_line
from lsag.failpoints import failpoint

CHUNK = 2**24


def read_bytes(path: Path, *, what: str = "file", size: int = -1) -> bytes:
    """The first `size` bytes of a regular file, by default all. InputError, which calls the file `what`, otherwise."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is a folder" if path.is_dir() else "not a regular file")
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}", "check the path") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into an OutputError that names it."""
    try:
        yield
    except LsagError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
        fix = (
            "create the folder first" if isinstance(error, FileNotFoundError) else "free space or choose another place"
        )
        raise OutputError(f"cannot write {path}: {first_line(error)}", fix) from error


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that gets the name `path` only once it is written and synced. OutputError if that fails."""
    temporary = None
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write {path}: it is not a regular file", "choose another name")
        with writing(path):
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary = Path(file.name)
                yield file
                failpoint("before_fsync")
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            failpoint("before_rename")
            temporary.replace(path)
            failpoint("after_rename")
            sync_folder(path.parent)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the creation and removal of names in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checked(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` by `data`, read back and compared before it gets its name. OutputError if that fails."""
    view, half = memoryview(data), len(data) // 2
    with replacing(path) as file:
        file.write(view[:half])
        failpoint("mid_write")
        file.write(view[half:])
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        same = all(file.read(CHUNK) == view[start : start + CHUNK] for start in range(0, len(view), CHUNK))
        if not same or file.read(1):
            raise OSError(errno.EIO, "what was written reads back differently")
