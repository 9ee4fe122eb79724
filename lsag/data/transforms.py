"""From a decoded image to the model's input; augmentation is timm's."""

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import transforms

from lsag.config import DataConfig, Preset
from lsag.errors import UsageError


def train_transform(preset: Preset) -> Any:
    """timm's training transform with the preset's augmentation: PIL image -> normalised float32 (C, size, size)."""
    from timm.data import create_transform  # slow to import, and only training augments

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
        transform.transforms[0] = transforms.Compose(
            [_resize(size, data), transforms.RandomCrop(size, padding=data.crop_padding)]
        )
    return transform


def eval_transform(preset: Preset) -> Any:
    """PIL image -> uint8 (C, size, size), upright by its EXIF data: shorter side to `eval_resize`, centre crop."""
    size = preset.model.image_size
    return transforms.Compose(
        [
            partial(upright, mode=preset.image_mode),
            _resize(preset.data.eval_resize or size, preset.data),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
        ]
    )


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
        f"{preset.name} takes uint8 images (B, {', '.join(map(str, shape))}), not {found}", "see .transform"
    )


def upright(image: Image.Image, *, mode: str) -> Image.Image:
    """The image in mode "L" or "RGB", turned as its EXIF data says; 16-bit greys are scaled, not clipped.

    ValueError for floating-point pixels.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert(mode)


def _resize(size: int, data: DataConfig) -> transforms.Resize:
    return transforms.Resize(size, transforms.InterpolationMode(data.interpolation))


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
