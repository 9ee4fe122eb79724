"""Checkpoint files: plain data that fully describes a model, written whole or not at all, and checked when read."""

import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from lsag.config import Description, ModelConfig, Preset, validated
from lsag.data.sources import placeholder_classes
from lsag.errors import CheckError, DamagedError, InputError, UsageError, is_out_of_memory
from lsag.files import read_bytes, write_checked, writing
from lsag.model.build import build_model
from lsag.weights import card_of, model_file

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
    contents = {**_description(checkpoint), "model": _weights(path, checkpoint), "training": checkpoint.training}
    file = io.BytesIO()
    with writing(Path(path)):
        torch.save(contents, file)
        write_checked(Path(path), file.getvalue())


def save_safetensors(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write model, preset and classes to a safetensors file, which other tools can read. The errors of save_checkpoint.

    The metadata entry `lsag` is JSON; `lsag_sha256` is a digest of it and of the weights, because the format has none.
    """
    weights = {  # copied, because safetensors refuses the shared memory of some timm models
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in _weights(path, checkpoint).items()
    }
    described = json.dumps(_description(checkpoint))
    with writing(Path(path)):
        metadata = {"lsag": described, "lsag_sha256": weights_digest(weights, described)}
        write_checked(Path(path), safetensors.torch.save(weights, metadata))


def _weights(path: str | Path, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    weights = checkpoint.model.state_dict()
    if not all(value.isfinite().all() for value in weights.values()):
        raise CheckError(f"the weights are not finite; {path} was not written", "lower --set train.lr")
    return weights


def _description(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "lsag",
        "preset": checkpoint.preset.model_dump(mode="json"),
        "classes": list(checkpoint.classes),
        "epoch": checkpoint.epoch,
        "metrics": checkpoint.metrics,
    }


def weights_digest(weights: Mapping[str, torch.Tensor], described: str = "") -> str:
    """SHA-256 of a description, and of the names, shapes, types and values of `weights`."""
    digest = hashlib.sha256(described.encode())
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)} {weights[name].dtype}".encode())
        digest.update(weights[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint or safetensors file written by lsag; the model is on the CPU and in evaluation mode.

    `path` may also be the name of a preset with trained weights. All that is used of the file is checked against its
    checksums, and only plain data is read (`weights_only`). Raises InputError for a file that is missing, damaged, of
    another kind, or in another format.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        raise InputError(f"{path} is an exported graph, not a checkpoint", "use the checkpoint it was exported from")
    file = model_file(path)
    contents = _read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    if not isinstance(contents, dict) or contents.get("kind") != "lsag":
        kind = " (weights of another project? the authors' own: lsag convert)" if isinstance(contents, dict) else ""
        raise InputError(f"{path} is not an lsag checkpoint{kind}", "give a file written by lsag train or lsag convert")
    found = contents.get("format")
    if type(found) is not int or found != FORMAT:
        known = found if type(found) is int and abs(found) < 1000 else "of another kind"
        raise InputError(f"{path} has checkpoint format {known}, this lsag reads {FORMAT}", "upgrade lsag")
    try:
        described = {key: contents[key] for key in Description.model_fields if key in contents}
        about = validated(Description, described, origin="its description")
        weights: Any = contents.get("model")
        training = contents.get("training")
        if not isinstance(training, dict | None):
            raise ValueError("the state of its training is not a table")
        with torch.device("meta"):
            model = build_model(about.preset.model)
        check_weights(weights, model.state_dict())
        if isinstance(about.preset.model, ModelConfig):
            model.load_state_dict(weights, assign=True)
            model.requires_grad_(True)
        else:  # some timm models have buffers that are not saved
            model = build_model(about.preset.model)
            model.load_state_dict(weights)
    except Exception as error:  # the contents may be of any type
        if is_out_of_memory(error):
            raise
        reason = error.what if isinstance(error, UsageError) else error
        raise DamagedError(
            f"{path} does not contain what its format promises: {reason}", "use an undamaged file"
        ) from error
    return Checkpoint(model.eval(), about.preset, about.classes, about.epoch, about.metrics, training)


def _read_safetensors(path: Path) -> Any:
    data = read_bytes(path, what="checkpoint")
    try:
        weights = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        if "lsag" not in metadata:
            return {"model": weights}
        contents = {**json.loads(metadata["lsag"]), "model": weights}
        digest, card = weights_digest(weights, metadata["lsag"]), card_of(path)
        same = metadata.get("lsag_sha256") == digest and (card is None or card.digest == digest)
    except Exception as error:  # safetensors raises its own types, json others
        if is_out_of_memory(error):
            raise
        raise DamagedError(
            f"{path} is not a safetensors file, or is truncated or damaged", "use an undamaged file"
        ) from error
    if not same:
        raise DamagedError(
            f"{path} is damaged, was changed or is older: its digest differs", "export it again, or install lsag again"
        )
    return contents


def read_torch(path: Path, *, allowed: Sequence[type] = ()) -> Any:
    """What a file of torch.save holds: plain data and tensors, and objects of the `allowed` types.

    torch trusts the directory of the archive, and leaves memory uninitialised where that is damaged. So every member is
    checked against its CRC, and torch reads an archive of what was checked and nothing else. InputError for a file that
    cannot be read, DamagedError for one that is damaged, compressed or of another kind.
    """
    data, checked = read_bytes(path, what="checkpoint"), io.BytesIO()
    try:
        with (
            warnings.catch_warnings(action="error"),  # about two members of one name
            zipfile.ZipFile(io.BytesIO(data)) as archive,
            zipfile.ZipFile(checked, "w") as copy,
        ):
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > len(data):
                raise DamagedError(f"{path} is compressed, as no checkpoint is", "give a file of torch.save")
            for member in members:
                copy.writestr(zipfile.ZipInfo(member.filename), archive.read(member))
    except Exception as error:  # zipfile raises many types for a damaged directory
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise DamagedError(
            f"{path} is not a checkpoint, or is truncated or damaged",
            "use an undamaged file of torch.save (1.6 or newer)",
        ) from error
    del data
    checked.seek(0)
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([*allowed]):  # sparse tensors
            return torch.load(checked, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a file that is not its own
        if is_out_of_memory(error):
            raise
        foreign = "Unsupported" in str(error)
        reason = "it contains objects that are not plain data" if foreign else "not written by torch.save"
        fix = "give plain weights" if allowed else "the authors' own files: lsag convert"
        raise DamagedError(f"{path} was refused: {reason}", fix) from error


def check_weights(weights: Any, wanted: Mapping[str, torch.Tensor]) -> None:
    """ValueError unless `weights` are finite tensors with the names, shapes and types of `wanted`.

    It counts what is wrong, and names the first three keys of each kind.
    """
    if not isinstance(weights, dict) or not all(map(is_plain, weights.values())):
        raise ValueError("the weights are not plain tensors")
    shared = [key for key in wanted if key in weights]
    alike = {key for key in shared if _layout(weights[key]) == _layout(wanted[key])}
    problems = {
        "missing": [key for key in wanted if key not in weights],
        "unknown": [key for key in weights if key not in wanted],
        "of another shape or type": [
            f"{key} is {_layout(weights[key])}, the model has {_layout(wanted[key])}"
            for key in shared
            if key not in alike
        ],
        "not finite": [key for key in shared if key in alike and not weights[key].isfinite().all()],
    }
    found = [f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"the weights do not fit: {'; '.join(found)}")


def is_plain(value: Any) -> bool:
    """Whether `value` is a real, dense tensor on the CPU with memory for each of its values."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _layout(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {' x '.join(map(str, tensor.shape))}".rstrip()
