"""Which files in a folder are images. torch is not imported."""

import errno
import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NoReturn

from PIL import Image

from lsag.errors import InputError, first_line

NEVER_DATA = ("@eaDir", "__MACOSX")
"""Folders that programs leave behind, often with copies of images."""
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow recognises, but cannot decode without other programs."""


def image_files(folder: str | Path, unused: Counter[str]) -> Iterator[str]:
    """The files in a folder and below that Pillow can decode, in alphabetical order of each folder.

    What is passed over is counted in `unused`, by the reason. InputError for a folder that cannot be read.
    """
    for path, folders, files in walk(folder, unused):
        # Links to folders are not followed: they may form a circle, or count images twice.
        unused["linked folders"] += sum(Path(path, name).is_symlink() for name in folders)
        for name in files:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122  Path takes several times as long
            if suffix in decodable():
                yield os.path.join(path, name)  # noqa: PTH118
            else:
                unused[f"{suffix or 'without an extension'} (not decodable here)"] += 1


def walk(
    folder: str | Path, unused: Counter[str], *, follow: bool = False
) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk in alphabetical order, without hidden names, which are never data; `follow` asks to follow links.

    InputError for a folder that cannot be read.
    """
    for path, folders, files in os.walk(folder, onerror=_refuse, followlinks=follow):
        for names in (folders, files):
            shown = sorted(name for name in names if not name.startswith(".") and name not in NEVER_DATA)
            unused["hidden"] += len(names) - len(shown)
            names[:] = shown
        yield path, folders, files


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"cannot read {error.filename}: {first_line(error)}", "make it readable, or remove it") from error


def is_folder(path: Path) -> bool:
    """Whether there is a folder. InputError if that cannot be told."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        _refuse(error)


@cache
def decodable() -> frozenset[str]:
    """Extensions of the files that Pillow, as it is installed here, can decode."""
    formats = Image.registered_extensions().items()
    decoded = {*Image.OPEN, "MPO"} - NOT_DECODED  # MPO files are opened as JPEG
    return frozenset(suffix for suffix, name in formats if name in decoded)


def listed(unused: Counter[str]) -> str:
    """What is not used, by the reason: "10 .heic (not decodable here), 2 linked folders"."""
    reasons = [(reason, count) for reason, count in unused.most_common() if count]
    if others := sum(count for _, count in reasons[8:]):
        reasons[8:] = [("others", others)]
    return ", ".join(
        f"{count:,} {reason if count > 1 or reason[0] == '.' else reason.removesuffix('s')}"
        for reason, count in reasons
    )


def because(unused: Counter[str]) -> str:
    """The same in brackets, for an error; nothing if nothing was passed over."""
    return f" (not used: {listed(unused)})" if unused.total() else ""


def matching(pattern: str, unused: Counter[str]) -> Iterator[str]:
    """The files that match a pattern; with `**` links to folders are not followed, which may form circles.

    glob would follow them, and pass over folders that cannot be read.
    """
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    root, wanted = Path(*parts[:fixed]), parts[fixed:]
    deep = "**" in wanted
    level = wanted.index("**") if deep else len(wanted) - 1
    for path, folders, files in walk(root, unused, follow=not deep):
        above = Path(path).relative_to(root).parts
        if len(above) < level:
            folders[:] = fnmatch.filter(folders, wanted[len(above)])
        elif not deep:
            unused["folders"] += len(fnmatch.filter(folders, wanted[-1]))
            folders.clear()
        yield from (str(Path(path, name)) for name in files if _fits((*above, name), wanted))


def _fits(names: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether the parts of a path match those of a pattern."""
    if not names or not wanted:
        return not names and set(wanted) <= {"**"}
    if wanted[0] == "**":
        return _fits(names, wanted[1:]) or _fits(names[1:], wanted)
    return fnmatch.fnmatchcase(names[0], wanted[0]) and _fits(names[1:], wanted[1:])
