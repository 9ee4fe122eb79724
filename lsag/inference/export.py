"""ONNX graphs of a model, verified against PyTorch before they are saved."""

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from lsag.checkpoint import Checkpoint, weights_digest
from lsag.config import ModelConfig
from lsag.errors import CheckError, UnavailableError, UsageError, first_line
from lsag.files import replacing
from lsag.inference.classifier import Classifier
from lsag.inference.graph import FORMAT, METADATA_KEY, sealed
from lsag.inference.providers import OPSETS, Opset, openvino_version
from lsag.inference.session import Session

CHECKED_BATCHES = (1, 2, 5, 64)
CHECKED_BYTES = 2**30
"""Limit on the largest tensor of a checked batch: a graph holds all variants of all patches at once."""
TIMM_CHANNELS = 64
"""The largest tensor of a timm model is unknown; few have more channels at the resolution of the image."""
TOLERANCE = 1e-4
"""Largest accepted difference of a logit between a runtime and PyTorch, both on the CPU in fp32."""


@dataclass(frozen=True)
class Exported:
    """The file, its opset as read back, and how it agreed with PyTorch at the batch sizes `batches`.

    `differences` are the largest ones of a logit in onnxruntime and, where that is installed, OpenVINO;
    `max_difference` is the larger. `same_top1` of `compared` images got the same class everywhere. `notes` says why
    OpenVINO cannot run the graph, if so.
    """

    path: Path
    opset: int
    bytes: int
    batches: tuple[int, ...]
    differences: dict[str, float]
    max_difference: float
    same_top1: int
    compared: int
    notes: tuple[str, ...]


class _Graph(Classifier):
    """The function of an exported graph: uint8 (B, image_size, image_size, C) -> float32 logits (B, num_classes).

    With `raw_input` it takes normalised float32 (B, C, image_size, image_size); with `half` it computes in fp16.
    """

    def __init__(self, checkpoint: Checkpoint, *, raw_input: bool, half: bool) -> None:
        super().__init__(checkpoint, precision="fp16" if half else "fp32")
        self.raw_input = raw_input

    def forward(self, images: Tensor) -> Tensor:
        # TensorRT takes uint8 only if the first operator is a cast.
        images = images if self.raw_input else self.normalize(images.float().permute(0, 3, 1, 2))
        return self.model(images.to(self.dtype)).float()


def export_onnx(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    opset: Opset = 23,
    half: bool = False,
    batch: int | None = None,
    raw_input: bool = False,
    on_verify: Callable[[], object] = lambda: None,
) -> Exported:
    """Write `checkpoint` as one ONNX file, with preset, classes and preprocessing as metadata.

    Input `images`: uint8 (B, image_size, image_size, C), resized and cropped, or with `raw_input` normalised float32
    (B, C, image_size, image_size). Output `logits`: float32 (B, num_classes). B is dynamic, or fixed as `batch`. With
    `half` the graph computes in fp16. `on_verify` is called before the graph is verified. UsageError for another opset.
    CheckError, and no file, if torch cannot export the network, if the logits of onnxruntime or OpenVINO differ from
    PyTorch's by more than 1e-4, or in fp16 if they are not finite.
    """
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} is not supported", f"use one of: {', '.join(map(str, OPSETS))}")
    path = Path(path)
    model = _Graph(checkpoint, raw_input=raw_input, half=half).eval()
    pixels = made_up_images(batch or 2, checkpoint)
    example = model.normalize(pixels) if raw_input else pixels.permute(0, 2, 3, 1).contiguous()
    for exporter in ("torch.onnx", "onnxscript"):
        logging.getLogger(exporter).setLevel(logging.ERROR)
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
    except torch.onnx.OnnxExporterError as error:  # with some timm models
        reason = first_line(error.__cause__ or error)[:150]
        raise CheckError(
            f"torch cannot export {checkpoint.preset.name}: {reason}; {path} was not written",
            "try --batch-size, or use the checkpoint itself",
        ) from error
    assert program is not None, "the dynamo exporter returns a program"
    graph = program.model_proto
    found = next(entry.version for entry in graph.opset_import if entry.domain == "")
    if found != opset:
        raise CheckError(f"torch wrote opset {found} instead of {opset}; {path} was not written", "use another --opset")
    for node in graph.graph.node:
        del node.metadata_props[:]  # the exporter's stack traces, with paths of this machine
    metadata = describe(checkpoint, half=half, batch=batch, raw_input=raw_input)
    onnx.helper.set_model_props(graph, {METADATA_KEY: json.dumps(metadata)})
    contents = sealed(graph.SerializeToString())
    on_verify()
    batches = (batch,) if batch else checked_batches(checkpoint)
    images, reference = [made_up_images(size, checkpoint) for size in batches], Classifier(checkpoint).eval()
    expected = torch.cat([reference(each) for each in images])
    differences, agree, notes = {}, torch.ones(len(expected), dtype=torch.bool), []
    for provider in ("cpu", "openvino") if openvino_version() else ("cpu",):
        try:
            session = Session(contents, provider=provider)
        except UnavailableError as error:
            notes.append(str(error))
            continue
        logits, runtime = torch.cat([session(each) for each in images]), session.runtime.name.split()[0]
        difference = (logits - expected).abs().max().item()
        if not difference <= (float("inf") if half else TOLERANCE) or difference == float("inf"):
            what = "gives logits that are not finite" if half else f"differs from PyTorch by {difference:.2g}"
            raise CheckError(
                f"the graph {what} in {runtime} (up to {TOLERANCE:g} in fp32 is accepted); {path} was not written",
                "export it without --precision fp16" if half else "report this as a bug",
            )
        differences[runtime] = difference
        agree &= logits.argmax(1) == expected.argmax(1)
    with replacing(path) as file:
        file.write(contents)
    return Exported(
        path=path,
        opset=opset,
        bytes=len(contents),
        batches=batches,
        differences=differences,
        max_difference=max(differences.values()),
        same_top1=int(agree.sum()),
        compared=len(agree),
        notes=tuple(notes),
    )


def checked_batches(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The batch sizes at which a graph with a dynamic batch size is verified."""
    config = checkpoint.preset.model
    if isinstance(config, ModelConfig):
        largest = 4 * config.num_variants * config.grid_sizes[0] ** 2 * config.stages[0].embed_dim
    else:
        largest = 4 * TIMM_CHANNELS * config.image_size**2
    return tuple(dict.fromkeys(min(count, max(1, CHECKED_BYTES // largest)) for count in CHECKED_BATCHES))


def made_up_images(count: int, checkpoint: Checkpoint) -> Tensor:
    """uint8 (count, C, image_size, image_size), like photographs: smooth areas of any brightness, edges, some noise."""
    config, generator = checkpoint.preset.model, torch.Generator().manual_seed(count)
    shape, size = (count, config.in_channels), config.image_size
    coarse = torch.rand(*shape, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    blocks = F.interpolate((torch.rand(*shape, 3, 3, generator=generator) > 0.7).float(), (size, size))
    noise = 0.05 * torch.randn(*shape, size, size, generator=generator)
    return (255 * (0.8 * smooth + 0.4 * blocks - 0.1 + noise)).clamp(0, 255).to(torch.uint8)


def describe(checkpoint: Checkpoint, *, half: bool, batch: int | None, raw_input: bool) -> dict[str, object]:
    """The metadata with which a client gets from an image to the graph's input, and from its logits to a class."""
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
