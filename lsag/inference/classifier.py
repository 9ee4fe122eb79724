"""A model ready to use: uint8 images in, logits out."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lsag.checkpoint import Checkpoint, load_checkpoint
from lsag.config import Precision
from lsag.data.transforms import Normalize, check_images, eval_transform
from lsag.device import autocast, autocast_dtype, choose_device
from lsag.inference.providers import check_model
from lsag.inference.session import Session


class Classifier(nn.Module):
    """A model with its preprocessing and class names, for inference.

    Calls take uint8 images (B, C, image_size, image_size) and give logits (B, num_classes), without gradients.
    `transform` makes such an image (C, image_size, image_size) from a PIL image of any size. `preset` and `classes` are
    the checkpoint's, `model` is the network itself, in the mode it is in. `device_name` says where it runs.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, device: str | torch.device = "cpu", precision: Precision = "auto"
    ) -> None:
        """Move the checkpoint's model to `device`; `precision` of matrix products is that of `autocast_dtype`."""
        super().__init__()
        self.preset, self.classes, self.precision = checkpoint.preset, checkpoint.classes, precision
        self.model, self.normalize = checkpoint.model, Normalize(checkpoint.preset.data)
        self.transform = eval_transform(checkpoint.preset)
        self.to(device)
        autocast_dtype(self.device, precision)  # refuses an unknown one

    @property
    def device(self) -> torch.device:
        return self.normalize.scale.device

    @property
    def device_name(self) -> str:
        return str(self.device)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, image_size, image_size) -> logits (B, num_classes). UsageError for other images."""
        check_images(images, self.preset)
        with autocast(self.device, autocast_dtype(self.device, self.precision)):
            return self.model(self.normalize(images.to(self.device, non_blocking=True)))


def open_model(
    path: str | Path, *, device: str = "auto", provider: str | None = None, precision: Precision = "auto"
) -> Classifier | Session:
    """A checkpoint on `device` in `precision`, or an .onnx graph on `device` or an execution `provider`.

    Both take uint8 images, give logits, and have `preset`, `classes`, `transform` and `device_name`. Raises the errors
    of `check_model`, `load_checkpoint`, `choose_device` and `Session`.
    """
    check_model(path, device=device, provider=provider, precision=precision)
    if Path(path).suffix == ".onnx":
        kind, _, index = device.partition(":")
        return Session(path, provider=provider or kind, device_id=int(index or 0))
    return Classifier(load_checkpoint(path), device=choose_device(device), precision=precision)
