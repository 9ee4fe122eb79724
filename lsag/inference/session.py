"""Exported graphs in onnxruntime, on the requested execution provider and no other."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import onnx
import torch  # before onnxruntime, whose CUDA provider finds torch's CUDA libraries once they are loaded
from pydantic import Strict
from torch import Tensor

from lsag.config import Description, Frozen, PositiveReal, Preset, Real, Size, validated
from lsag.data.transforms import Normalize, check_images, eval_transform
from lsag.errors import InputError, UnavailableError, UsageError, first_line
from lsag.files import read_bytes
from lsag.inference.providers import (
    PROVIDERS,
    Provider,
    check_driver,
    describe_installation,
    has_driver,
    how_to_fix,
    missing_library,
)

METADATA_KEY, DIGEST_KEY = "lsag", "lsag_sha256"
FORMAT = 2
# fmt: off
OPERATORS = frozenset({
    "Add", "Attention", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant", "Conv", "Div",
    "Expand", "Gather", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "HardSigmoid", "HardSwish", "Identity",
    "LayerNormalization", "MatMul", "Max", "MaxPool", "Mul", "Pad", "Range", "ReduceL2", "ReduceMean", "Relu",
    "Reshape", "Resize", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose",
    "Unsqueeze",
})
# fmt: on
"""The operators of exported graphs, ours and timm's; a graph with any other was not written by lsag export."""


class GraphInput(Frozen, extra="ignore"):
    """What a graph takes, and how a client gets there from an image (docs/inference.md)."""

    layout: Literal["NHWC", "NCHW"]
    dtype: Literal["uint8", "float32"]
    batch: Size | None
    mode: Literal["L", "RGB"]
    resize_shorter_side: Size
    center_crop: Size
    interpolation: Literal["bicubic", "bilinear", "nearest"]
    mean: tuple[Real, ...]
    std: tuple[PositiveReal, ...]
    normalised_inside: Annotated[bool, Strict()]


class Metadata(Description, extra="ignore"):
    """What an exported graph says about itself."""

    input: GraphInput
    precision: Literal["fp32", "fp16"]


class Session:
    """An exported model, used like a `Classifier`.

    Calls take uint8 images (B, C, image_size, image_size) and give float32 logits (B, num_classes). `transform` makes
    such an image from a PIL image of any size. `preset`, `classes`, `input` and `precision` ("fp32" or "fp16") are the
    file's metadata. `provider` is "cpu", "cuda" or "tensorrt", and `fallback_reason` says why "auto" chose the CPU;
    otherwise it is empty. A graph with a fixed batch size takes any number of images too: it runs several times, and
    the last batch is padded. On CUDA, fp32 is full precision as in torch, not TF32.
    """

    preset: Preset
    classes: tuple[str, ...]
    input: Mapping[str, Any]
    provider: str
    fallback_reason: str = ""

    def __init__(
        self, path: str | Path | bytes, *, provider: str = "cpu", device_id: int = 0, threads: int | None = None
    ) -> None:
        """Open a file, or its contents, on `provider`: "cpu", "cuda", "tensorrt", or "auto".

        "auto" is CUDA if it loads, else the CPU. `device_id` is the number of the GPU, `threads` of CPU threads, by
        default one per core.
        InputError for anything but a complete export of lsag; UnavailableError if the provider does not load. A named
        provider is never replaced by another, except that onnxruntime computes shapes on the CPU.
        """
        if provider not in get_args(Provider):
            raise UsageError(f"unknown provider '{provider}'", f"use one of: {', '.join(get_args(Provider))}")
        if provider not in ("cpu", "auto"):
            check_driver(provider)
        self._data = path if isinstance(path, bytes) else read_bytes(Path(path), what="graph")
        path = "the graph" if isinstance(path, bytes) else path
        self._check(path)
        self._threads, self.device_id = threads or 0, device_id
        if provider != "auto":
            self._open(path, provider)
        elif reason := self._try_cuda(path):
            self.fallback_reason = reason
            self._open(path, "cpu")
        del self._data
        self.raw_input = self.input["dtype"] == "float32"
        self.transform = eval_transform(self.preset)
        self._normalize = Normalize(self.preset.data)

    @property
    def device_name(self) -> str:
        number = f", GPU {self.device_id}" if self.device_id else ""
        return f"onnxruntime {PROVIDERS[self.provider]}{number}"

    def _try_cuda(self, path: str | Path) -> str:
        """Start on CUDA; the reason why that failed, in one line, empty if it did not."""
        if not has_driver():
            return "no NVIDIA driver found"
        try:
            self._open(path, "cuda")
        except UnavailableError as error:
            return str(error)
        return ""

    def _open(self, path: str | Path, provider: str) -> None:
        """Start onnxruntime on `provider`; raises the errors of __init__."""
        import onnxruntime

        wanted = PROVIDERS[provider]
        if wanted not in onnxruntime.get_available_providers():
            raise UnavailableError(f"this onnxruntime was built without {wanted}", how_to_fix(provider))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self._threads
        # Threads spin while they wait for each other during a call, but not after it (docs/benchmarks.md).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if provider != "cpu":
            onnxruntime.preload_dlls()
            onnxruntime.set_default_logger_severity(4)  # failures are raised
        try:
            # Run the bytes that were checked; the file may have changed since.
            gpu = {"device_id": str(self.device_id)}
            listed: list[Any] = [wanted] if provider == "cpu" else [(PROVIDERS["cuda"], {**gpu, "use_tf32": "0"})]
            if provider == "tensorrt":
                listed.insert(0, (wanted, gpu))
            self.session = onnxruntime.InferenceSession(self._data, options, providers=listed, enable_fallback=0)
        except Exception as error:  # onnxruntime raises its own types, which it does not export
            reason = first_line(error)
            if provider == "cpu" or any(
                word in reason for word in ("INVALID_PROTOBUF", "InvalidProtobuf", "INVALID_GRAPH")
            ):
                raise InputError(
                    f"{path} is not a graph that onnxruntime can run: {reason}", "export it again"
                ) from error
            raise UnavailableError(f"onnxruntime could not start {wanted}: {reason}", how_to_fix(provider)) from error
        if self.session.get_providers()[0] != wanted:
            missing = missing_library(provider)
            why = f"{missing} is missing; {describe_installation()}" if missing else describe_installation()
            raise UnavailableError(f"onnxruntime did not load {wanted}: {why}", how_to_fix(provider))
        # onnxruntime computes shapes, which are integers, on the CPU by design; all else must be on the provider.
        elsewhere = [
            node.op_type
            for node in self._nodes(PROVIDERS["cpu"])
            if not self._integers.get(node.name, node.op_type == "Gather")  # its optimizer takes sizes out of shapes
        ]
        if provider != "cpu" and elsewhere:
            raise UnavailableError(
                f"onnxruntime left {len(elsewhere)} nodes such as {elsewhere[0]} to the CPU instead of {wanted}",
                "use --provider cpu, or export with another --opset",
            )
        self.provider = provider

    def _check(self, path: str | Path) -> None:
        """Read the metadata. InputError for a graph that is damaged, has other operators, or is not lsag's."""
        try:
            model = onnx.ModelProto.FromString(self._data)
        except Exception as error:  # protobuf raises its own types
            raise InputError(f"{path} is not an ONNX graph, or is truncated or damaged", "export it again") from error
        sparse = model.graph.sparse_initializer or any(
            attribute.HasField("sparse_tensor") or attribute.sparse_tensors
            for node in model.graph.node
            for attribute in node.attribute
        )
        if sparse or any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model.graph)):
            raise InputError(f"{path} was refused: it keeps weights in other files", "use a file of lsag export")
        foreign = next((node for node in model.graph.node if node.domain or node.op_type not in OPERATORS), None)
        if foreign or model.functions or model.training_info:
            names = (foreign.domain, foreign.op_type) if foreign else ("functions of its own",)
            name = ".".join(str(name) for name in names if name)  # protobuf gives bytes where they are not UTF-8
            raise InputError(f"{path} was refused: it has {name[:60]}, as no export has", "use a file of lsag export")
        try:
            values = json.loads(next(entry.value for entry in model.metadata_props if entry.key == METADATA_KEY))
            found = int(values["format"])
        except Exception as error:  # whatever is not as lsag export writes it
            raise InputError(f"{path} was not exported by lsag: it has no such metadata", "use lsag export") from error
        if found != FORMAT:
            what = f"{path} has format {found}, this lsag reads {FORMAT}"
            raise InputError(what, "export it again" if found < FORMAT else "upgrade lsag")
        if not is_sealed(self._data):
            raise InputError(f"{path} is damaged or was changed: its digest differs", "export it again")
        try:
            metadata = validated(Metadata, values, origin="its metadata")
        except UsageError as error:
            what = f"{path} does not contain what its format promises: {error.what}"
            raise InputError(what, "export it again") from error
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        self._integers = {
            node.name: all(types.get(name) == onnx.TensorProto.INT64 for name in node.output)
            for node in model.graph.node
        }
        self.preset, self.classes, self.precision = metadata.preset, metadata.classes, metadata.precision
        self.input, self.batch = metadata.input.model_dump(), metadata.input.batch

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, image_size, image_size) -> logits, float32 (B, num_classes). UsageError for other images."""
        check_images(images, self.preset)
        if self.batch is None:
            return self._run(images)
        logits = []
        for part in images.split(self.batch):
            padded = part if len(part) == self.batch else part.repeat(self.batch, 1, 1, 1)[: self.batch]
            logits.append(self._run(padded)[: len(part)])
        return torch.cat(logits)

    def _run(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(["logits"], {"images": self.feed(images).numpy()})[0])

    def feed(self, images: Tensor) -> Tensor:
        """uint8 (B, C, image_size, image_size) -> the graph's input."""
        return self._normalize(images) if self.raw_input else images.permute(0, 2, 3, 1).contiguous()

    def bind(self, images: Tensor) -> Callable[[], object]:
        """A function that runs the graph on `images`, with input and output kept on the device, for benchmarks.

        UsageError if the graph has a fixed batch size, and `images` another.
        """
        from onnxruntime import OrtValue

        if self.batch not in (None, len(images)):
            raise UsageError(
                f"the graph takes {self.batch} images at a time, not {len(images)}", f"--batch-size {self.batch}"
            )
        place = "cpu" if self.provider == "cpu" else "cuda"
        binding = self.session.io_binding()
        binding.bind_ortvalue_input(
            "images", OrtValue.ortvalue_from_numpy(self.feed(images).numpy(), place, self.device_id)
        )
        binding.bind_output("logits", place, self.device_id)
        return lambda: self.session.run_with_iobinding(binding)

    def nodes_by_provider(self) -> dict[str, int]:
        """The number of nodes of the optimised graph that each execution provider runs."""
        parts = self.session.get_provider_graph_assignment_info()
        names = {part.ep_name: None for part in parts}
        return {name: len(self._nodes(name)) for name in names}

    def _nodes(self, provider: str) -> list[Any]:
        parts = self.session.get_provider_graph_assignment_info()
        return [node for part in parts if part.ep_name == provider for node in part.get_nodes()]


def sealed(graph: bytes) -> bytes:
    """A serialized graph with the digest of all of its bytes, as one more entry of its metadata at the end."""
    return graph + _seal(graph)


def is_sealed(data: bytes) -> bool:
    """Whether every byte of a file is as `sealed` left it."""
    length = len(_seal(b""))
    return data[-length:] == _seal(memoryview(data)[:-length])


def _seal(graph: bytes | memoryview) -> bytes:
    # Serialized messages that follow each other are one message with the fields of both.
    entry = onnx.StringStringEntryProto(key=DIGEST_KEY, value=hashlib.sha256(graph).hexdigest())
    return onnx.ModelProto(metadata_props=[entry]).SerializeToString()


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every constant of a graph: initializers, attributes of nodes, and those of nested graphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
