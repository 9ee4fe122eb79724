"""ONNX graphs of a model, compared with PyTorch before they get their name."""

import json
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from lsag.checkpoint import Checkpoint
from lsag.data import Normalize
from lsag.errors import CheckError
from lsag.files import replacing
from lsag.runtime import FORMAT, METADATA_KEY, OnnxModel, graph_digest

CHECKED_BATCHES = (1, 2, 5)
TOLERANCE = 1e-4
"""Largest difference of a logit between onnxruntime and PyTorch, both on the CPU in fp32."""


@dataclass(frozen=True)
class Exported:
    """The file, its opset as read back, and how far its logits are from PyTorch's."""

    path: Path
    opset: int
    bytes: int
    max_difference: float


class ImageClassifier(nn.Module):
    """The model with its preprocessing of pixels: uint8 images (B, height, width, C) -> logits (B, num_classes)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.normalize = Normalize(checkpoint.preset.data)
        self.model = checkpoint.model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalize(images.permute(0, 3, 1, 2)))


def export_onnx(checkpoint: Checkpoint, path: str | Path) -> Exported:
    """Write `checkpoint` as one ONNX file with a dynamic batch, and preset, classes and preprocessing as metadata.

    Input `images`: uint8 (batch, image_size, image_size, channels), resized and cropped; output `logits`: float32
    (batch, num_classes). CheckError, and no file, if onnxruntime's logits differ from PyTorch's by more than 1e-4.
    """
    path, model = Path(path), ImageClassifier(checkpoint).eval()
    size, channels = checkpoint.preset.model.image_size, checkpoint.preset.model.in_channels
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (batch, size, size, channels), dtype=torch.uint8, generator=generator)
        for batch in CHECKED_BATCHES
    ]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images[1],),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    assert program is not None, "the dynamo exporter returns a program"
    graph = program.model_proto
    metadata = {**_metadata(checkpoint), "graph_sha256": graph_digest(graph)}
    onnx.helper.set_model_props(graph, {METADATA_KEY: json.dumps(metadata)})
    contents = graph.SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "model.onnx"
        draft.write_bytes(contents)
        session = OnnxModel(draft)
        with torch.inference_mode():
            differences = [(session(batch.permute(0, 3, 1, 2)) - model(batch)).abs().max() for batch in images]
        difference = torch.stack(differences).max().item()
        if not difference <= TOLERANCE:
            raise CheckError(
                f"onnxruntime and PyTorch differ by {difference:.2g}, more than {TOLERANCE:g}; {path} was not written",
                "report this as a bug",
            )
    with replacing(path) as file:
        file.write(contents)
    opset = next(entry.version for entry in graph.opset_import if entry.domain == "")
    return Exported(path, opset, len(contents), difference)


def _metadata(checkpoint: Checkpoint) -> dict[str, object]:
    """What a client needs: from an image to the graph's input, and from its logits to a name."""
    preset = checkpoint.preset
    return {
        "format": FORMAT,
        "classes": list(checkpoint.classes),
        "input": {
            "layout": "NHWC",
            "dtype": "uint8",
            "mode": "L" if preset.model.in_channels == 1 else "RGB",
            "resize_shorter_side": preset.data.eval_resize or preset.model.image_size,
            "center_crop": preset.model.image_size,
            "interpolation": preset.data.interpolation,
            "mean": preset.data.mean,
            "std": preset.data.std,
            "normalised_inside": True,
        },
        "preset": preset.model_dump(mode="json"),
    }
