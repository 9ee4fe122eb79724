"""An exported graph, checked before anything runs it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import onnx
from pydantic import Strict

from lsag.config import Description, Frozen, PositiveReal, Real, Size, validated
from lsag.errors import InputError, UsageError
from lsag.files import read_bytes

METADATA_KEY, DIGEST_KEY = "lsag", "lsag_sha256"
FORMAT = 2
# fmt: off
OPERATORS = frozenset({
    "Add", "Attention", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant", "Conv", "Div",
    "Expand", "Gather", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "HardSigmoid", "HardSwish", "Identity",
    "LayerNormalization", "MatMul", "Max", "MaxPool", "Mul", "Pad", "Range", "ReduceL2", "ReduceMean", "Relu",
    "Reshape", "Resize", "Shape", "Sigmoid", "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose",
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


@dataclass(frozen=True)
class Graph:
    """A graph that was checked, and the file that it was in, if any.

    `data` are the bytes that were checked, and so the bytes to run: the file may have changed since. `integers` says
    for each node whether it computes nothing but integers.
    """

    path: Path | None
    data: bytes
    metadata: Metadata
    integers: Mapping[str, bool]

    @property
    def name(self) -> str:
        """What errors call it."""
        return str(self.path or "the graph")


def read_graph(path: str | Path | bytes) -> Graph:
    """A file, or its contents. InputError for a graph that is damaged, has other operators, or is not lsag's."""
    file = None if isinstance(path, bytes) else Path(path)
    data = path if isinstance(path, bytes) else read_bytes(Path(path), what="graph")
    path = file or "the graph"
    try:
        model = onnx.ModelProto.FromString(data)
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
    if not is_sealed(data):
        raise InputError(f"{path} is damaged or was changed: its digest differs", "export it again")
    try:
        metadata = validated(Metadata, values, origin="its metadata")
    except UsageError as error:
        what = f"{path} does not contain what its format promises: {error.what}"
        raise InputError(what, "export it again") from error
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    integers = {
        node.name: all(types.get(name) == onnx.TensorProto.INT64 for name in node.output) for node in model.graph.node
    }
    return Graph(file, data, metadata, integers)


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
