"""An image, decoded from a file or from part of one."""

import errno
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from lsag.data.storage import regular_file
from lsag.data.transforms import upright
from lsag.errors import InputError, UnavailableError, UnreachableError, first_line

MAX_PIXELS, MAX_JPEG_PIXELS = 50_000_000, 200_000_000
"""Of a decoded image, and of a JPEG file, which is decoded at half its size if it has more than MAX_PIXELS."""
MAX_ASPECT = 200
TOO_LARGE = f"more than {MAX_PIXELS:,} pixels (JPEG: {MAX_JPEG_PIXELS:,}), or over {MAX_ASPECT} times as long as wide"
REPAIR = "repair or remove the file"
TRAINING_FIX = f"{REPAIR}, or train with --skip-broken"


def open_image(path: Path, mode: str, *, fix: str = REPAIR) -> Image.Image:
    """Decode an image file as `decode` does. InputError also for anything that is not a regular file."""
    return decode(lambda: regular_file(path), mode, name=str(path), fix=fix)


def decode(opened: Callable[[], BinaryIO], mode: str, *, name: str, fix: str = REPAIR) -> Image.Image:
    """Decode what `opened` opens upright into `mode` ("L" or "RGB"); 16-bit greys are scaled, not clipped.

    InputError, which calls the image `name`, for one that cannot be opened or is damaged, too large or not an image.
    JPEG files of more than MAX_PIXELS are decoded at half their size.
    """
    try:
        # By its path Pillow would map a file, and mistake width and height of an uncompressed TIFF on its side.
        with warnings.catch_warnings(action="ignore"), opened() as file:
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # as for an image inside a small icon
            image = _opened(file)
            _check_size(image)
            if image.width * image.height > MAX_PIXELS:
                image.draft(None, (image.width // 2, image.height // 2))
            image.load()
            _check_size(image)  # again, for an image inside an icon
            return upright(image, mode=mode)
    except (UnreachableError, UnavailableError):
        raise  # the image is not to blame
    except Exception as error:  # decoders raise anything on damaged files
        if getattr(error, "errno", None) == errno.EMFILE:
            raise  # the image is not to blame
        reason = error.what if isinstance(error, InputError) else first_line(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            reason = TOO_LARGE
        raise InputError(f"cannot read image {name}: {reason}", fix) from error


def _opened(file: BinaryIO) -> ImageFile.ImageFile:
    """Image.open, which would refuse the largest JPEG files before they can be scaled down."""
    is_jpeg = file.read(3) == b"\xff\xd8\xff"
    file.seek(0)
    try:
        return JpegImageFile(file) if is_jpeg else Image.open(file)
    except SyntaxError as error:
        raise UnidentifiedImageError from error


def _check_size(image: ImageFile.ImageFile) -> None:
    limit = MAX_JPEG_PIXELS if isinstance(image, JpegImageFile) else MAX_PIXELS
    shorter, longer = sorted(image.size)
    if shorter * longer > limit or longer > MAX_ASPECT * shorter:
        raise OSError(f"{image.width} x {image.height} is {TOO_LARGE}")
