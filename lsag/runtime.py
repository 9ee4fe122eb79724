"""Exported graphs in onnxruntime, on the execution provider that was asked for and on no other."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch  # before onnxruntime, whose CUDA provider finds torch's CUDA libraries once they are loaded
from torch import Tensor

from lsag.config import Preset, validate_preset
from lsag.errors import InputError, UnavailableError, UsageError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
METADATA_KEY = "lsag"
FORMAT = 1


class OnnxModel:
    """An exported model: calls take uint8 images (B, C, height, width) and give logits (B, num_classes), on the CPU."""

    def __init__(self, path: str | Path, *, provider: str = "cpu", threads: int | None = None) -> None:
        """Open `path` on `provider`, "cpu" or "cuda", with as many `threads`, by default one for each core.

        InputError for a file that is no export of lsag; UnavailableError if the provider does not load: it is never
        replaced by the CPU.
        """
        import onnxruntime

        if provider not in PROVIDERS:
            raise UsageError(f"unknown provider '{provider}'", f"use one of: {', '.join(PROVIDERS)}")
        wanted = PROVIDERS[provider]
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist", "check the path")
        available = onnxruntime.get_available_providers()
        if wanted not in available:
            raise UnavailableError(f"this onnxruntime was built without {wanted}", "pip install onnxruntime-gpu")
        self._read(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads or 0
        # Torch is idle while the session runs; spinning threads would only keep cores from the loader.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if provider == "cuda":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            onnxruntime.preload_dlls()
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=[wanted], enable_fallback=0)
        except Exception as error:  # onnxruntime raises its own types, which it does not export
            reason = str(error).splitlines()[0]
            if provider == "cpu" or any(
                word in reason for word in ("INVALID_PROTOBUF", "InvalidProtobuf", "INVALID_GRAPH")
            ):
                raise InputError(
                    f"{path} is not a graph that onnxruntime can run: {reason}", "export it again"
                ) from error
            raise UnavailableError(f"onnxruntime could not start {wanted}: {reason}", "use --device cpu") from error
        if self.session.get_providers()[0] != wanted:
            raise UnavailableError(
                f"onnxruntime could not load {wanted} (built for CUDA {getattr(onnxruntime, 'cuda_version', '?')}, "
                f"torch has {torch.version.cuda}, CUDA is {'' if torch.cuda.is_available() else 'not '}available)",
                "install a driver and an onnxruntime-gpu for the same CUDA, or use --device cpu",
            )

    def _read(self, path: str | Path) -> None:
        """Check the file without running anything: whole, its own weights only, and described by lsag."""
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf raises its own types
            raise InputError(f"{path} is not an ONNX graph, or is truncated or damaged", "export it again") from error
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model.graph)):
            raise InputError(f"{path} was refused: it keeps weights in other files", "use one that lsag export wrote")
        try:
            metadata = json.loads(next(entry.value for entry in model.metadata_props if entry.key == METADATA_KEY))
            if metadata["format"] != FORMAT:
                raise InputError(f"{path} has format {metadata['format']}, this lsag reads {FORMAT}", "upgrade lsag")
            self.preset: Preset = validate_preset(metadata["preset"], origin=f"the preset in {path}")
            self.classes = tuple(metadata["classes"])
            if metadata["graph_sha256"] != graph_digest(model):
                raise InputError(f"{path} is damaged or was changed: its digest differs", "export it again")
        except InputError:
            raise
        except Exception as error:  # whatever is not as lsag export writes it
            raise InputError(f"{path} was not exported by lsag: it has no such metadata", "use lsag export") from error

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, height, width) -> float32 (B, num_classes)."""
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(self.session.run(["logits"], {"images": pixels})[0])


def graph_digest(model: onnx.ModelProto) -> str:
    """SHA-256 of the graph with its weights, without the metadata."""
    return hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every constant of a graph: initializers, attributes of nodes, and those of graphs inside them."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
