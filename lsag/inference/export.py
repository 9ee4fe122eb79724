"""ONNX graphs of a model, compared with PyTorch before they get their name."""

import copy
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsag.checkpoint import Checkpoint, weights_digest
from lsag.config import ModelConfig
from lsag.data.transforms import Normalize
from lsag.errors import CheckError, UsageError, first_line
from lsag.files import replacing
from lsag.inference.session import FORMAT, METADATA_KEY, Session, graph_digest

OPSETS = {20: "1.18", 23: "1.23"}
"""Opsets that can be asked for, with the oldest onnxruntime that reads them on a CPU."""
CHECKED_BATCHES = (1, 2, 5, 64)
CHECKED_BYTES = 2**30
"""The largest batch is cut so that its largest tensor takes about as much: a graph has all variants of all patches."""
TIMM_CHANNELS = 64
"""Of timm's networks the largest tensor is not known; few have more channels at the resolution of the image."""
TOLERANCE = 1e-4
"""Largest difference of a logit between onnxruntime and PyTorch, both on the CPU in fp32."""


@dataclass(frozen=True)
class Exported:
    """The file, its opset as read back, and how it agreed with PyTorch at the `batches`.

    `max_difference` is of a logit; `same_top1` of `compared` images have the same class in both.
    """

    path: Path
    opset: int
    bytes: int
    batches: tuple[int, ...]
    max_difference: float
    same_top1: int
    compared: int


class ImageClassifier(nn.Module):
    """The model with its preprocessing: uint8 images (B, height, width, C) -> float32 logits (B, num_classes).

    With `raw_input` it takes normalised float32 (B, C, height, width) instead; with `half` it computes in fp16.
    """

    def __init__(self, checkpoint: Checkpoint, *, raw_input: bool = False, half: bool = False) -> None:
        super().__init__()
        self.normalize = nn.Identity() if raw_input else _Pixels(checkpoint)
        self.model = copy.deepcopy(checkpoint.model).half() if half else checkpoint.model
        self.half_precision = half

    def forward(self, images: Tensor) -> Tensor:
        images = self.normalize(images)
        return self.model(images.half()).float() if self.half_precision else self.model(images)


class _Pixels(nn.Module):
    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.normalize = Normalize(checkpoint.preset.data)

    def forward(self, images: Tensor) -> Tensor:
        return self.normalize(images.permute(0, 3, 1, 2))


def export_onnx(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    opset: int = 20,
    half: bool = False,
    batch: int | None = None,
    raw_input: bool = False,
) -> Exported:
    """Write `checkpoint` as one ONNX file, with preset, classes and preprocessing as metadata.

    Input `images`: uint8 (batch, image_size, image_size, channels), resized and cropped, or with `raw_input` normalised
    float32 (batch, channels, image_size, image_size). Output `logits`: float32 (batch, num_classes). The batch is
    dynamic, or `batch` images. With `half` the graph computes in fp16. UsageError for another opset. CheckError, and no
    file, if torch cannot export the network, or if onnxruntime's logits differ from PyTorch's by more than 1e-4, or are
    not finite in fp16.
    """
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} is not supported", f"use one of: {', '.join(map(str, OPSETS))}")
    path = Path(path)
    model = ImageClassifier(checkpoint, raw_input=raw_input, half=half).eval()
    images = {count: made_up_images(count, checkpoint) for count in ([batch] if batch else checked_batches(checkpoint))}
    inputs = {count: to_input(pixels, checkpoint, raw_input=raw_input) for count, pixels in images.items()}
    example = inputs[batch] if batch else to_input(made_up_images(2, checkpoint), checkpoint, raw_input=raw_input)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                opset_version=opset,
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=None if batch else {"images": {0: torch.export.Dim("batch")}},
            )
    except torch.onnx.OnnxExporterError as error:  # with some of timm's classifiers
        reason = first_line(error.__cause__ or error)[:150]
        raise CheckError(
            f"torch cannot make a graph of {checkpoint.preset.name}: {reason}; {path} was not written",
            "try --batch, or run the checkpoint itself",
        ) from error
    assert program is not None, "the dynamo exporter returns a program"
    graph = program.model_proto
    found = next(entry.version for entry in graph.opset_import if entry.domain == "")
    if found != opset:
        raise CheckError(f"torch wrote opset {found} instead of {opset}; {path} was not written", "use another --opset")
    metadata = describe(checkpoint, half=half, batch=batch, raw_input=raw_input)
    metadata["graph_sha256"] = graph_digest(graph)
    onnx.helper.set_model_props(graph, {METADATA_KEY: json.dumps(metadata)})
    contents = graph.SerializeToString()
    reference = ImageClassifier(checkpoint, raw_input=raw_input).eval()
    session, differences, same = Session(contents), [], 0
    with torch.inference_mode():
        for count, pixels in images.items():
            logits, expected = session(pixels), reference(inputs[count])
            differences.append((logits - expected).abs().max())
            same += int((logits.argmax(1) == expected.argmax(1)).sum())
    difference = torch.stack(differences).max().item()
    if not difference <= (float("inf") if half else TOLERANCE) or difference == float("inf"):
        what = "gives logits that are not finite" if half else f"differs from PyTorch by {difference:.2g}"
        raise CheckError(
            f"the graph {what} in onnxruntime (up to {TOLERANCE:g} in fp32 is accepted); {path} was not written",
            "leave out --half" if half else "report this as a bug",
        )
    with replacing(path) as file:
        file.write(contents)
    return Exported(path, opset, len(contents), tuple(images), difference, same, sum(images))


def checked_batches(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The batches that a graph of any batch is compared at."""
    config = checkpoint.preset.model
    if isinstance(config, ModelConfig):
        largest = 4 * config.num_variants * config.grid_sizes[0] ** 2 * config.stages[0].embed_dim
    else:
        largest = 4 * TIMM_CHANNELS * config.image_size**2
    return tuple(dict.fromkeys(min(count, max(1, CHECKED_BYTES // largest)) for count in CHECKED_BATCHES))


def made_up_images(count: int, checkpoint: Checkpoint) -> Tensor:
    """uint8 (count, C, height, width) with what photographs have: smooth areas of any brightness, edges, some noise."""
    config, generator = checkpoint.preset.model, torch.Generator().manual_seed(count)
    shape, size = (count, config.in_channels), config.image_size
    coarse = torch.rand(*shape, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    blocks = F.interpolate((torch.rand(*shape, 3, 3, generator=generator) > 0.7).float(), (size, size))
    noise = 0.05 * torch.randn(*shape, size, size, generator=generator)
    return (255 * (0.8 * smooth + 0.4 * blocks - 0.1 + noise)).clamp(0, 255).to(torch.uint8)


def to_input(pixels: Tensor, checkpoint: Checkpoint, *, raw_input: bool) -> Tensor:
    """uint8 (B, C, height, width) -> what the graph takes."""
    return Normalize(checkpoint.preset.data)(pixels) if raw_input else pixels.permute(0, 2, 3, 1).contiguous()


def describe(checkpoint: Checkpoint, *, half: bool, batch: int | None, raw_input: bool) -> dict[str, object]:
    """What a client needs: from an image to the graph's input, and from its logits to a name."""
    preset = checkpoint.preset
    return {
        "format": FORMAT,
        "classes": list(checkpoint.classes),
        "input": {
            "layout": "NCHW" if raw_input else "NHWC",
            "dtype": "float32" if raw_input else "uint8",
            "batch": batch,
            "mode": preset.image_mode,
            "resize_shorter_side": preset.data.eval_resize or preset.model.image_size,
            "center_crop": preset.model.image_size,
            "interpolation": preset.data.interpolation,
            "mean": preset.data.mean,
            "std": preset.data.std,
            "normalised_inside": not raw_input,
        },
        "precision": "fp16" if half else "fp32",
        "preset": preset.model_dump(mode="json"),
        "weights_sha256": weights_digest(checkpoint.model.state_dict()),
    }
