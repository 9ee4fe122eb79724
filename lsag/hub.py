"""Models as Hugging Face's hub has them: a folder with model.safetensors and config.json, here or on the hub."""

from collections.abc import Sequence
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from lsag.checkpoint import Checkpoint
from lsag.config import validate_preset
from lsag.data.transforms import Normalize
from lsag.model.build import build_model


class Classifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="lsag",
    tags=["image-classification", "lsag"],
    pipeline_tag="image-classification",
):
    """A model with its preprocessing and class names: `from_pretrained`, `save_pretrained` and `push_to_hub`.

    Calls take uint8 images (B, C, image_size, image_size), resized and cropped by `eval_transform` of
    lsag.data.transforms,
    and give logits (B, num_classes).
    """

    def __init__(self, preset: dict[str, Any], classes: Sequence[str]) -> None:
        super().__init__()
        self.preset, self.classes = validate_preset(preset, origin="the preset in config.json"), tuple(classes)
        self.model = build_model(self.preset.model)
        self.normalize = Normalize(self.preset.data)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The same model, ready for evaluation."""
        made = cls(preset=checkpoint.preset.model_dump(mode="json"), classes=list(checkpoint.classes))
        made.model.load_state_dict(checkpoint.model.state_dict())
        return made.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalize(images))

    def checkpoint(self) -> Checkpoint:
        """What `lsag.save_checkpoint` writes."""
        return Checkpoint(self.model.eval(), self.preset, self.classes)
