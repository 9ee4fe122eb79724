"""A trained model ready to be used: uint8 images in, logits out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lsag.checkpoint import Checkpoint, load_checkpoint
from lsag.config import Preset
from lsag.data.transforms import Normalize
from lsag.device import autocast, choose_device
from lsag.errors import UsageError
from lsag.inference.session import PROVIDERS, Session


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be used: `classify` takes uint8 images (B, C, height, width) and gives logits.

    `where` says what it runs on; `session` is there if that is onnxruntime.
    """

    classify: Callable[[Tensor], Tensor]
    preset: Preset
    classes: tuple[str, ...]
    where: str
    session: Session | None = None


def open_model(path: str | Path, *, device: str = "auto", provider: str | None = None) -> Opened:
    """A checkpoint on `device`, or an .onnx graph on `provider` (None: "auto").

    UsageError for the one where the other belongs, and the errors of `load_checkpoint` and `Session`.
    """
    if Path(path).suffix == ".onnx":
        if device != "auto":
            raise UsageError(f"--device {device} is for checkpoints; {path} runs in onnxruntime", "use --provider")
        session = Session(path, provider=provider or "auto")
        where = f"onnxruntime {PROVIDERS[session.provider]}"
        return Opened(session, session.preset, session.classes, where, session)
    if provider is not None:
        raise UsageError(f"--provider {provider} is for .onnx graphs; {path} runs in PyTorch", "use --device")
    checkpoint = load_checkpoint(path)
    on = choose_device(device)
    return Opened(classifier(checkpoint, on), checkpoint.preset, checkpoint.classes, str(on))


def classifier(checkpoint: Checkpoint, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, C, height, width) -> logits (B, num_classes), normalised and run on `device`."""
    model, normalize = checkpoint.model.to(device), Normalize(checkpoint.preset.data).to(device)

    def classify(images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(device):
            return model(normalize(images.to(device, non_blocking=True)))

    return classify
