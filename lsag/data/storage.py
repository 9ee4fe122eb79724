"""Files of this machine, or by their URL those of any place that fsspec reaches, such as s3://, gs:// and hf://."""

import errno
import glob
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lsag.errors import InputError, LsagError, UnavailableError, UnreachableError, first_line

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a remote file is tried again; together well below the time that a worker may take for a batch."""
MAX_OPEN = 64
"""Local files that a process keeps open to read parts of them."""
MAX_FILES = 100_000
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")

logger = logging.getLogger(__name__)
T = TypeVar("T")
Version = tuple[int, str]
"""The size of a file in bytes, and what changes when its content does."""


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def seen_from(folder: str | Path, path: str) -> str:
    """`path`, which may be absolute or a URL, as seen from `folder`, which may be a URL."""
    if is_url(path):
        return path
    if path.split("/", 1)[0] == "~":  # which no shell expands after a colon
        return os.path.expanduser(path)  # noqa: PTH111  Path raises an error where nobody's home is known
    return f"{str(folder).rstrip('/')}/{path}" if is_url(folder) else str(Path(folder, path))


def expanded(pattern: str, folder: str | Path = "") -> list[str]:
    """The files that a pattern with {000..146}, {a,b}, *, ? or [ab] names; the last three match what is there.

    The pattern is seen from `folder`, in whose name these characters mean nothing.
    """
    found: list[str] = []
    for path in _braces_expanded(pattern):
        if not glob.has_magic(path) or (not is_url(path) and Path(seen_from(folder, path)).exists()):
            found.append(seen_from(folder, path))
        elif is_url(path):
            protocol = path.partition("://")[0]
            names = sorted(map(str, remote(path, lambda system, name: system.glob(name))))
            found += (name if is_url(name) else f"{protocol}://{name}" for name in names)
        else:
            inside = seen_from(glob.escape(str(folder)), path)
            found += sorted(glob.iglob(inside))  # noqa: PTH207  Path has no patterns from the root on
        if len(found) > MAX_FILES:
            raise InputError(f"{pattern} names more than {MAX_FILES:,} files", "give a smaller range")
    return found


def _braces_expanded(pattern: str) -> Iterator[str]:
    match = BRACES.search(pattern)
    if not match:
        yield pattern
        return
    first, last, words = match.groups()
    parts = words.split(",") if words else (f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1))
    for part in parts:
        for rest in _braces_expanded(pattern[match.end() :]):
            yield f"{pattern[: match.start()]}{part}{rest}"


def regular_file(path: Path) -> BinaryIO:
    """An open file. OSError for anything that is not a regular file: to open a pipe would wait for ever."""
    if not path.is_file():
        raise OSError("not a regular file" if path.exists() else "no such file")
    return path.open("rb")


def version(path: str) -> Version:
    """The version of a file. InputError if it is not there."""
    if is_url(path):
        return remote(path, lambda system, name: (int(system.info(name)["size"]), str(system.ukey(name))))
    with _readable(path), regular_file(Path(path)) as file:
        return _version(os.fstat(file.fileno()))


def scanned(path: str, scan: Callable[[BinaryIO], T]) -> T:
    """What `scan` makes of an open file; it starts again if a connection fails. InputError if it cannot be read."""

    def scan_remote(system: Any, name: str) -> T:
        with system.open(name, "rb") as file:
            return scan(file)

    if is_url(path):
        return remote(path, scan_remote)
    with _readable(path), regular_file(Path(path)) as file:
        return scan(file)


def read(path: str) -> bytes:
    """The content of a file. InputError if it cannot be read."""
    if is_url(path):
        return remote(path, lambda system, name: system.cat_file(name))
    with _readable(path), regular_file(Path(path)) as file:
        return file.read()


def read_part(path: str, start: int, size: int, *, expected: Version) -> bytes:
    """`size` bytes of a file. InputError if it is not there, ends before, or has another version than expected."""
    if is_url(path):
        data = remote(path, lambda system, name: system.cat_file(name, start, start + size))
    else:
        with _readable(path):
            file = _kept_open(path, expected)  # named, so that it stays open while another thread closes what is old
            if _version(os.fstat(file.number)) != expected:
                raise InputError(f"{path} has changed since it was opened", "start again")
            data = os.pread(file.number, size, start)
    if len(data) != size:
        raise InputError(
            f"{path} ends after {start + len(data):,} bytes, but {start + size:,} are needed", "copy it again"
        )
    return data


class _Descriptor:
    """An open file, closed when nothing refers to it any more."""

    def __init__(self, path: str, version: Version) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_kept_open = lru_cache(MAX_OPEN)(_Descriptor)


def _version(status: os.stat_result) -> Version:
    return status.st_size, str(status.st_mtime_ns)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn what goes wrong while a local file is read into an InputError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise  # the file is not to blame
        raise InputError(f"cannot read {path}: {first_line(error)}", "check the path") from error


def remote(path: str, action: Callable[[Any, str], T]) -> T:
    """What `action` gives for the file system of a URL and the path there, tried again while the connection fails.

    UnreachableError if it keeps failing; InputError if what it asks for is not there or not allowed; UnavailableError
    for a file system whose package is not installed.
    """
    import fsspec

    for wait in (*WAITS, None):
        try:
            system, name = fsspec.core.url_to_fs(path)  # fsspec keeps one for each process
            return action(system, name)
        except LsagError:
            raise
        except ImportError as error:
            what = f"{path} needs a package that is not installed: {first_line(error)}"
            raise UnavailableError(what, "install it with pip") from error
        except FileNotFoundError as error:
            raise InputError(f"cannot read {path}: there is no such file", "check the URL") from error
        except (IsADirectoryError, NotADirectoryError, PermissionError, ValueError, TypeError) as error:
            what = f"cannot read {path}: {first_line(error)}"
            raise InputError(what, "check the URL and your credentials") from error
        except Exception as error:  # each file system has its own
            if wait is None:
                what = f"cannot reach {path}: {first_line(error)} ({len(WAITS) + 1} attempts)"
                raise UnreachableError(what, "check the connection") from error
            logger.warning("%s: %s; trying again in %g s", path, first_line(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/lsag, or ~/.cache/lsag.

    UnavailableError where nobody's home is known, as in a container whose user has no name.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lsag"
    except RuntimeError as error:
        raise UnavailableError("there is no home folder", "set $HOME or $XDG_CACHE_HOME") from error
