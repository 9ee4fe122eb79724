"""What runs a graph that was checked: onnxruntime on one of its execution providers, or OpenVINO on the CPU.

Both take the graph's input as an array and give its logits. `precision` is what they compute in, and `name` says where.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # noqa: F401  before onnxruntime, whose CUDA provider finds torch's CUDA libraries once they are loaded

from lsag.errors import InputError, UnavailableError, first_line
from lsag.inference.graph import Graph
from lsag.inference.providers import (
    PROVIDERS,
    describe_installation,
    how_to_fix,
    load_libraries,
    missing_library,
    openvino_version,
    signal_stack_kept,
)


class OnnxRuntime:
    """onnxruntime on `provider` ("cpu", "cuda" or "tensorrt") and nowhere else; only shapes may be left to the CPU.

    With `cuda_graph`, which needs a fixed batch size, all kernels of a call are launched at once. Input and output then
    have one place each in the GPU's memory, so that only one thread may call at a time.
    """

    def __init__(
        self, graph: Graph, *, provider: str, precision: str, device_id: int, threads: int, cuda_graph: bool
    ) -> None:
        """UnavailableError if the provider does not load or take the graph; InputError for a broken graph."""
        import onnxruntime

        wanted = PROVIDERS[provider]
        if wanted not in onnxruntime.get_available_providers():
            raise UnavailableError(f"this onnxruntime was built without {wanted}", how_to_fix(provider))
        self.precision, self._device = precision, ("cpu" if provider == "cpu" else "cuda", device_id)
        self.name = f"onnxruntime {wanted}{f', GPU {device_id}' if device_id else ''}"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        # Threads spin while they wait for each other during a call, but not after it (docs/benchmarks.md).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if provider != "cpu":
            load_libraries(provider)
            onnxruntime.set_default_logger_severity(4)  # failures are raised
        gpu = {"device_id": str(device_id)}
        cuda = {**gpu, "use_tf32": str(int(precision == "tf32")), "enable_cuda_graph": str(int(cuda_graph))}
        listed: list[Any] = [wanted] if provider == "cpu" else [(PROVIDERS["cuda"], cuda)]
        if provider == "tensorrt":
            listed.insert(0, (wanted, {**gpu, **_engine_cache(graph)}))
        try:
            self.session = onnxruntime.InferenceSession(graph.data, options, providers=listed, enable_fallback=0)
        except Exception as error:  # onnxruntime raises its own types, which it does not export
            reason = first_line(error)
            if provider == "cpu" or any(
                word in reason for word in ("INVALID_PROTOBUF", "InvalidProtobuf", "INVALID_GRAPH")
            ):
                raise InputError(
                    f"{graph.name} is not a graph that onnxruntime can run: {reason}", "export it again"
                ) from error
            raise UnavailableError(f"onnxruntime could not start {wanted}: {reason}", how_to_fix(provider)) from error
        if self.session.get_providers()[0] != wanted:
            missing = missing_library(provider)
            why = f"{missing} is missing; {describe_installation()}" if missing else describe_installation()
            raise UnavailableError(f"onnxruntime did not load {wanted}: {why}", how_to_fix(provider))
        # onnxruntime computes shapes, which are integers, on the CPU by design; all else must be on the provider.
        elsewhere = [
            node.op_type
            for node in self._nodes().get(PROVIDERS["cpu"], ())
            if not graph.integers.get(node.name, node.op_type == "Gather")  # its optimizer takes sizes out of shapes
        ]
        if provider != "cpu" and elsewhere:
            raise UnavailableError(
                f"onnxruntime left {len(elsewhere)} nodes such as {elsewhere[0]} to the CPU instead of {wanted}",
                "use --provider cpu, or export with another --opset",
            )
        self._classes = graph.metadata.preset.model.num_classes
        self._captured: tuple[Any, Any, Any] | None = None
        if cuda_graph:
            self._captured = self._bound(np.zeros(self.session.get_inputs()[0].shape, graph.metadata.input.dtype))

    def run(self, images: np.ndarray) -> np.ndarray:
        if self._captured is None:
            return self.session.run(["logits"], {"images": images})[0]
        binding, place, logits = self._captured
        place.update_inplace(images)
        self.session.run_with_iobinding(binding)
        return logits.numpy()

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A function that runs the graph on `images`, with input and output kept on the device."""
        binding, place, _ = self._captured or self._bound(images)
        place.update_inplace(images)
        return lambda: self.session.run_with_iobinding(binding)

    def nodes(self) -> dict[str, int]:
        """The number of nodes of the optimised graph on each execution provider."""
        return {name: len(nodes) for name, nodes in self._nodes().items()}

    def _bound(self, images: np.ndarray) -> tuple[Any, Any, Any]:
        """A binding of input and output to the device, and the places of both there."""
        from onnxruntime import OrtValue

        place = OrtValue.ortvalue_from_numpy(images, *self._device)
        logits = OrtValue.ortvalue_from_shape_and_type((len(images), self._classes), np.float32, *self._device)
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("images", place)
        binding.bind_ortvalue_output("logits", logits)
        return binding, place, logits

    def _nodes(self) -> dict[str, list[Any]]:
        nodes: dict[str, list[Any]] = {}
        for part in self.session.get_provider_graph_assignment_info():
            nodes.setdefault(part.ep_name, []).extend(part.get_nodes())
        return nodes


def _engine_cache(graph: Graph) -> dict[str, str]:
    """TensorRT's options to keep what it built, which takes minutes, in the folder FILE.trt."""
    if graph.path is None or not os.access(graph.path.absolute().parent, os.W_OK):
        return {}
    folder = f"{graph.path}.trt"
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_engine_cache_prefix": hashlib.sha256(graph.data).hexdigest()[:16],  # its own names ignore the weights
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }


HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""OpenVINO's names of precisions."""


class OpenVINO:
    """OpenVINO on the CPU, which runs every node or none."""

    def __init__(self, graph: Graph, *, precision: str, threads: int) -> None:
        """UnavailableError if it is not installed, or cannot read the graph."""
        if openvino_version() is None:
            raise UnavailableError("OpenVINO 2026.4 or newer is not installed", "pip install 'lsag[openvino]'")
        try:
            import openvino
        except ImportError as error:
            what = f"OpenVINO does not import: {first_line(error)}"
            raise UnavailableError(what, "pip install --force-reinstall openvino") from error
        core = openvino.Core()
        if precision == "fp16" and "FP16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            precision = "fp32"  # OpenVINO would take bf16, which is coarser
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same cores
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            with signal_stack_kept():
                self._compiled = core.compile_model(core.read_model(graph.data), "CPU", options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].lstrip("- ")  # the first lines are places in its source
            raise UnavailableError(
                f"OpenVINO cannot run {graph.name} in {precision}: {reason}",
                "use --provider cpu" if precision != "bf16" else "use --precision fp32",
            ) from error
        computes_in = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.precision = next(name for name, hint in HINTS.items() if hint == computes_in)
        self.name = f"OpenVINO {openvino_version()} CPU"

    def run(self, images: np.ndarray) -> np.ndarray:
        from openvino import Tensor

        # A request of its own for each call, so that several threads may call at a time.
        return self._compiled.infer_new_request({"images": Tensor(images, shared_memory=True)})["logits"]

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A function that runs the graph on `images`, with input and output in the same memory each time."""
        from openvino import Tensor

        request = self._compiled.create_infer_request()
        request.set_tensor("images", Tensor(images))
        return request.infer

    def nodes(self) -> dict[str, int]:
        """The number of nodes of the optimised graph, without constants."""
        nodes = self._compiled.get_runtime_model().get_ordered_ops()
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in nodes]
        return {"OpenVINO": sum(kind not in ("Const", "Input", "Output") for kind in kinds)}
