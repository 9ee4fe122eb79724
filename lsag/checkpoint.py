"""Checkpoint files: plain data that fully describes a model, written whole or not at all, and checked when read."""

import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from lsag.config import ModelConfig, Preset, validate_preset
from lsag.data.sources import placeholder_classes
from lsag.errors import CheckError, DamagedError, InputError, UsageError
from lsag.files import read_bytes, write_checked, writing
from lsag.model.build import build_model

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode, with all that is needed to use it.

    `training` is what else is needed to resume its training, as plain data and tensors; `best.pt` and converted files
    have none.
    """

    model: nn.Module
    preset: Preset
    classes: tuple[str, ...]
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] | None = None


def random_checkpoint(preset: Preset) -> Checkpoint:
    """An untrained model of `preset`, initialised from its seed."""
    torch.manual_seed(preset.train.seed)
    return Checkpoint(build_model(preset.model).eval(), preset, placeholder_classes(preset.model.num_classes))


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, read back and synced to disk; OutputError if that fails, with `path` unchanged.

    CheckError for weights that are not finite; they are never written.
    """
    weights = checkpoint.model.state_dict()
    if not all(value.isfinite().all() for value in weights.values()):
        raise CheckError(f"the weights are not finite; {path} was not written", "lower --set train.lr")
    contents = {**_description(checkpoint), "model": weights, "training": checkpoint.training}
    file = io.BytesIO()
    with writing(Path(path)):
        torch.save(contents, file)
        write_checked(Path(path), file.getbuffer())


def save_safetensors(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write model, preset and classes to a safetensors file, which other tools can read; OutputError if that fails.

    The metadata entry `lsag` is JSON, with a digest of the weights, because the format has no checksum.
    """
    weights = {  # copied, because safetensors refuses the shared memory of some timm models
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in checkpoint.model.state_dict().items()
    }
    described = {**_description(checkpoint), "weights_sha256": weights_digest(weights)}
    with writing(Path(path)):
        write_checked(Path(path), safetensors.torch.save(weights, {"lsag": json.dumps(described)}))


def _description(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "lsag",
        "preset": checkpoint.preset.model_dump(mode="json"),
        "classes": list(checkpoint.classes),
        "epoch": checkpoint.epoch,
        "metrics": checkpoint.metrics,
    }


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the names, shapes, types and values of `weights`."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)} {weights[name].dtype}".encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint or safetensors file written by lsag; the model is on the CPU and in evaluation mode.

    Every byte is checked against the file's checksums, and only plain data is read (`weights_only`). Raises InputError
    for a file that is missing, damaged, of another kind, or in a newer format.
    """
    path = Path(path)
    contents = _read_safetensors(path) if path.suffix == ".safetensors" else _read(path)
    if not isinstance(contents, dict) or contents.get("kind") != "lsag":
        kind = " (weights of another project? the authors' own: lsag convert)" if isinstance(contents, dict) else ""
        raise InputError(f"{path} is not an lsag checkpoint{kind}", "give a file written by lsag train or lsag convert")
    if not isinstance(contents.get("format"), int) or contents["format"] != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {contents.get('format')}, this lsag reads {FORMAT}", "upgrade lsag"
        )
    try:
        preset = validate_preset(contents["preset"], origin=f"the preset in {path}")
        classes, weights = tuple(contents["classes"]), contents["model"]
        epoch, metrics, training = int(contents["epoch"]), dict(contents["metrics"]), contents.get("training")
        if not isinstance(training, dict | None):
            raise ValueError("the state of its training is not a table")
        if len(classes) != preset.model.num_classes:
            raise ValueError(f"{len(classes)} class names for {preset.model.num_classes} classes")
        with torch.device("meta"):
            model = build_model(preset.model)
        check_weights(weights, model.state_dict())
        if isinstance(preset.model, ModelConfig):
            model.load_state_dict(weights, assign=True)
            model.requires_grad_(True)
        else:  # some timm models have buffers that are not saved
            model = build_model(preset.model)
            model.load_state_dict(weights)
    except Exception as error:  # the contents may be of any type
        reason = error.what if isinstance(error, UsageError) else error
        raise DamagedError(
            f"{path} does not contain what its format promises: {reason}", "use an undamaged file"
        ) from error
    return Checkpoint(model.eval(), preset, classes, epoch, metrics, training)


def _read_safetensors(path: Path) -> Any:
    data = read_bytes(path, what="checkpoint")
    try:
        weights = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        described = json.loads(header.get("__metadata__", {}).get("lsag", "null"))
    except Exception as error:  # safetensors raises its own types, json others
        raise DamagedError(
            f"{path} is not a safetensors file, or is truncated or damaged", "use an undamaged file"
        ) from error
    if not isinstance(described, dict):
        return {"model": weights}
    if described.get("weights_sha256") != weights_digest(weights):
        raise DamagedError(f"{path} is damaged or was changed: the digest of its weights differs", "use another file")
    return {**described, "model": weights}


def _read(path: Path) -> Any:
    data = read_bytes(path, what="checkpoint")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > len(data):
                raise DamagedError(f"{path} is compressed, as no checkpoint is", "give a file written by lsag")
            damaged = archive.testzip()
            if damaged is not None:
                raise DamagedError(f"{path} is truncated or damaged (checksum of {damaged})", "use an undamaged file")
    except InputError:
        raise
    except Exception as error:  # zipfile raises many types for a damaged directory
        raise DamagedError(
            f"{path} is not a checkpoint, or is truncated or damaged", "give a file written by lsag"
        ) from error
    try:
        with warnings.catch_warnings(action="ignore"):  # about sparse tensors, which are refused
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a file that is not its own
        reason = (
            "it contains objects that are not plain data"
            if "Unsupported" in str(error)
            else "not written by torch.save"
        )
        raise DamagedError(f"{path} was refused: {reason}", "the authors' own files: lsag convert") from error


def check_weights(weights: Any, wanted: Mapping[str, torch.Tensor]) -> None:
    """ValueError unless `weights` are finite tensors with the names, shapes and types of `wanted`.

    It counts what is wrong, and names the first three keys of each kind.
    """
    if not isinstance(weights, dict) or not all(
        isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        for value in weights.values()
    ):
        raise ValueError("the weights are not plain tensors")
    shared = [key for key in wanted if key in weights]
    problems = {
        "missing": [key for key in wanted if key not in weights],
        "unknown": [key for key in weights if key not in wanted],
        "of another shape or type": [
            f"{key} is {_layout(weights[key])}, the model has {_layout(wanted[key])}"
            for key in shared
            if _layout(weights[key]) != _layout(wanted[key])
        ],
        "not finite": [key for key in shared if not weights[key].isfinite().all()],
    }
    found = [f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"the weights do not fit: {'; '.join(found)}")


def _layout(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {' x '.join(map(str, tensor.shape))}".rstrip()
