"""From a decoded image to the model's input; augmentation is timm's.

torchvision and timm are imported to train only: they take longer than a prediction.
"""

from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lsag.config import DataConfig, Preset
from lsag.errors import UsageError

ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 0x0112, 0x0102, 0x0106, 0
"""Tags of EXIF and TIFF."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each orientation upright."""


def train_transform(preset: Preset) -> Any:
    """timm's training transform with the preset's augmentation: PIL image -> normalised float32 (C, size, size)."""
    from timm.data import create_transform
    from torchvision.transforms import Compose, RandomCrop

    data, augment, size = preset.data, preset.augment, preset.model.image_size
    transform = create_transform(
        size,
        is_training=True,
        hflip=augment.hflip,
        color_jitter=None,  # type: ignore[arg-type]  # as in DeiT, where RandAugment turns it off
        auto_augment=augment.rand_augment,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        re_prob=augment.random_erasing,
        re_mode="pixel",
    )
    if data.train_crop == "padded":
        crop = RandomCrop(size, padding=data.crop_padding)
        transform.transforms[0] = Compose([partial(_resize, size=size, data=data), crop])
    return transform


def eval_transform(preset: Preset) -> Any:
    """PIL image -> uint8 (C, size, size), upright by its EXIF data: shorter side to `eval_resize`, centre crop."""
    return partial(_evaluated, preset=preset)


def _evaluated(image: Image.Image, preset: Preset) -> Tensor:
    size = preset.model.image_size
    image = _resize(upright(image, mode=preset.image_mode), preset.data.eval_resize or size, preset.data)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.array(image.crop((left, top, left + size, top + size))).reshape(size, size, -1)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_images(images: Any, preset: Preset) -> None:
    """UsageError unless `images` are what `eval_transform` makes, at least one: uint8 (B, C, size, size)."""
    shape = (preset.model.in_channels, preset.model.image_size, preset.model.image_size)
    if not isinstance(images, Tensor):
        found = type(images).__name__
    else:
        found = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        if images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1:] == shape and len(images):
            return
    raise UsageError(
        f"{preset.name} takes uint8 images (B, {', '.join(map(str, shape))}), not {found}", "make them with .transform"
    )


def upright(image: Image.Image, *, mode: str) -> Image.Image:
    """The image in mode "L" or "RGB", turned as its EXIF data says; 16-bit greys are scaled, not clipped.

    ValueError for pixels of 32 bits.
    """
    # Pillow reads grey PPM files of more than 8 bits as integers of 32, but scales them to 16.
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ValueError("pixels of 32 bits have no agreed range; save it with 8 or 16")
    result = (_to_8_bits(image) if image.mode.startswith("I") else image).convert(mode)
    turn = None
    with suppress(Exception):  # damaged metadata raises anything, and the pixels are what counts
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    if turn is not None:
        result = result.transpose(turn)
    result.info = {}  # a copy of the metadata: the image would be turned again
    return result


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits, or of as many as a TIFF file says."""
    tags: Any = getattr(image, "tag_v2", {})
    top = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    levels = np.asarray(image).astype(np.uint32).clip(max=top)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts only 8 bits
        levels = top - levels
    return Image.fromarray((levels * 255 // top).astype(np.uint8))


def _resize(image: Image.Image, size: int, data: DataConfig) -> Image.Image:
    """The image with its shorter side of `size` pixels, rounded down as by torchvision."""
    width, height = (size * side // min(image.size) for side in image.size)
    return image.resize((width, height), Image.Resampling[data.interpolation.upper()])


class Normalize(nn.Module):
    """Scales pixels to 0..1 and normalises each channel with the mean and deviation of the preset's data."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__()
        self.scale: Tensor
        self.offset: Tensor
        mean, std = torch.tensor(data.mean), torch.tensor(data.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("offset", (-mean / std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, height, width) -> float of the same shape."""
        return pixels.to(self.scale.dtype) * self.scale + self.offset
