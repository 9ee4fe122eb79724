"""Models on Hugging Face's hub: a folder with model.safetensors and config.json, on this machine or on the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE

from lsag.checkpoint import Checkpoint, load_checkpoint, save_safetensors
from lsag.config import Description, Precision, validated
from lsag.errors import InputError, UsageError
from lsag.inference.classifier import Classifier as InferenceClassifier
from lsag.model.build import build_model


class Classifier(
    InferenceClassifier,
    ModelHubMixin,
    library_name="lsag",
    tags=["image-classification", "lsag"],
    pipeline_tag="image-classification",
):
    """A classifier with `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    def __init__(self, preset: dict[str, Any], classes: Sequence[str], precision: Precision = "fp32") -> None:
        """A classifier with random weights; the hub stores the arguments as config.json."""
        about = validated(Description, {"preset": preset, "classes": classes}, origin="the model's description")
        super().__init__(Checkpoint(build_model(about.preset.model), about.preset, about.classes), precision=precision)

    @classmethod
    def of(cls, checkpoint: Checkpoint, precision: Precision = "fp32") -> Self:
        """A classifier with a copy of the checkpoint's weights, in evaluation mode."""
        preset = checkpoint.preset.model_dump(mode="json")
        classifier = cls(preset=preset, classes=list(checkpoint.classes), precision=precision)
        classifier.model.load_state_dict(checkpoint.model.state_dict())
        return classifier.eval()

    def checkpoint(self) -> Checkpoint:
        """The checkpoint that `lsag.checkpoint.save_checkpoint` writes. UsageError if the weights are not fp32."""
        if self.dtype is not torch.float32:
            raise UsageError(f"these weights are rounded to {self.precision}", 'load them with precision="fp32"')
        return Checkpoint(self.model.eval(), self.preset, self.classes)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_safetensors(save_directory / SAFETENSORS_SINGLE_FILE, self.checkpoint())

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        preset: Any = None,
        classes: Any = None,
        precision: Precision = "fp32",
        **download: Any,
    ) -> Self:
        """A model in a folder or on the hub, checked like a checkpoint. InputError if config.json does not fit it."""
        file = Path(model_id) / SAFETENSORS_SINGLE_FILE
        if not Path(model_id).is_dir():
            file = Path(hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **download))
        found = cls.of(load_checkpoint(file), precision)
        try:
            about = Description(preset=preset, classes=classes)
        except ValueError:
            about = None
        if about is None or (about.preset, about.classes) != (found.preset, found.classes):
            raise InputError(f"config.json does not describe {file}", "save or push the model again")
        return found
