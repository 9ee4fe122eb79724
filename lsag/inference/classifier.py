"""A model ready to use: uint8 images in, logits out."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lsag.checkpoint import Checkpoint, load_checkpoint
from lsag.config import Precision
from lsag.data.transforms import Normalize, check_images, eval_transform
from lsag.device import DTYPES, choose_device, choose_precision, tf32
from lsag.inference.predict import Predictor
from lsag.inference.providers import check_model, graph_provider

if TYPE_CHECKING:
    from lsag.inference.session import Session


class Classifier(Predictor, nn.Module):
    """A model with its preprocessing and class names, for inference.

    Calls take uint8 images (B, C, image_size, image_size) and give logits (B, num_classes), without gradients.
    `transform` makes such an image (C, image_size, image_size) from a PIL image of any size. `preset` and `classes` are
    the checkpoint's, `model` is the network, in the mode it is in: the checkpoint's own, or in bf16 and fp16 a copy
    with its weights rounded. `precision` is the one it computes in, `device_name` says where it runs.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, device: str | torch.device = "cpu", precision: Precision = "fp32"
    ) -> None:
        """Move the checkpoint's model to `device`; for `precision` see `choose_precision`."""
        super().__init__()
        self.precision = choose_precision(torch.device(device), precision)
        self.preset, self.classes = checkpoint.preset, checkpoint.classes
        self.normalize, self.transform = Normalize(self.preset.data), eval_transform(self.preset)
        self.model = checkpoint.model if self.dtype is torch.float32 else copy.deepcopy(checkpoint.model).to(self.dtype)
        self.to(device)

    @property
    def device(self) -> torch.device:
        return self.normalize.scale.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def device_name(self) -> str:
        return f"{self.device}, {self.precision}"

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, image_size, image_size) -> float32 logits (B, num_classes). UsageError for other images."""
        check_images(images, self.preset)
        with tf32(self.precision == "tf32"):
            return self.model(self.normalize(images.to(self.device, non_blocking=True)).to(self.dtype)).float()


def open_model(
    path: str | Path, *, device: str = "auto", provider: str | None = None, precision: Precision | None = None
) -> "Classifier | Session":
    """A checkpoint on `device` in `precision` (default: fp32), or an .onnx graph on `device` or a `provider`.

    In place of a checkpoint, the name of a preset with trained weights will do. All take uint8 images, give logits, and
    have `predict`, `preset`, `classes`, `transform` and `device_name`. Raises the errors of `check_model`,
    `load_checkpoint`, `choose_device` and `Session`.
    """
    check_model(path, device=device, provider=provider, precision=precision)
    if Path(path).suffix == ".onnx":
        from lsag.inference.session import Session  # imports onnx

        return Session(
            path,
            provider=graph_provider(device, provider),
            precision=precision,
            device_id=int(device.partition(":")[2] or 0),
        )
    return Classifier(load_checkpoint(path), device=choose_device(device), precision=precision or "fp32")
