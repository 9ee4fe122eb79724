"""Models on Hugging Face's hub: a folder with model.safetensors and config.json, on this machine or on the hub."""

from collections.abc import Sequence
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin

from lsag.checkpoint import Checkpoint
from lsag.config import validate_preset
from lsag.inference.classifier import Classifier as InferenceClassifier
from lsag.model.build import build_model


class Classifier(
    InferenceClassifier,
    PyTorchModelHubMixin,
    library_name="lsag",
    tags=["image-classification", "lsag"],
    pipeline_tag="image-classification",
):
    """A classifier with `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    def __init__(self, preset: dict[str, Any], classes: Sequence[str]) -> None:
        """A classifier with random weights; the hub stores the arguments as config.json."""
        validated = validate_preset(preset, origin="the preset in config.json")
        super().__init__(Checkpoint(build_model(validated.model), validated, tuple(classes)))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """A classifier with a copy of the checkpoint's weights, in evaluation mode."""
        classifier = cls(preset=checkpoint.preset.model_dump(mode="json"), classes=list(checkpoint.classes))
        classifier.model.load_state_dict(checkpoint.model.state_dict())
        return classifier.eval()

    def checkpoint(self) -> Checkpoint:
        """The checkpoint that `lsag.checkpoint.save_checkpoint` writes."""
        return Checkpoint(self.model.eval(), self.preset, self.classes)
