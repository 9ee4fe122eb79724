"""What works on this machine, found by trying it where possible. This file imports nothing that could be broken."""

import importlib
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from lsag.config import DATASETS
from lsag.errors import LsagError, first_line
from lsag.inference.providers import (
    distributions,
    driver_version,
    has_gpu,
    how_to_fix,
    missing_library,
    onnxruntime_cuda,
    openvino_version,
    signal_stack_kept,
    torch_cuda,
)
from lsag.machine import available_cores, memory, multiplies_bf16, processor

Purpose = Literal["train", "gpu-inference"]
BOTH: tuple[Purpose, ...] = ("train", "gpu-inference")
LITTLE_DISK = 5e9
"""In bytes, about the size of the largest model's checkpoints."""


@dataclass(frozen=True)
class Finding:
    """The state of one thing. `problem` is empty if it works; `prevents` says what does not work without it."""

    name: str
    value: str
    problem: str = ""
    fix: str = ""
    prevents: tuple[Purpose, ...] = ()


def examine(data_dir: Path, out: Path) -> Iterator[Finding]:
    """Examine everything, including datasets in `data_dir` and the disk of `out`; nothing is downloaded."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    bf16 = ", multiplies bf16" if multiplies_bf16() else ""
    yield Finding("processor", f"{processor()}, {available_cores()} cores{bf16}, {memory() / 2**30:.0f} GiB of memory")
    packages = []
    for name in ("torch", "torchvision", "timm", "onnx", "onnxscript"):
        packages.append(_package(name))
        yield packages[-1]
    if not packages[0].problem:
        yield from _torch()
        yield from _onnxruntime()
    yield _openvino()
    if not any(package.problem for package in packages[:3]):
        for dataset in [*DATASETS, "folder"]:
            yield _dataset(dataset, data_dir)
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    problem = "" if free > LITTLE_DISK else "little space for checkpoints"
    yield Finding("disk", f"{free / 1e9:.1f} GB free in {existing}", problem, "free space, or choose another --out")


def _package(name: str) -> Finding:
    try:
        found = version(name)
        importlib.import_module(name)
    except PackageNotFoundError:
        return Finding(name, "absent", "not installed", "pip install lsag", BOTH)
    except Exception as error:  # a broken installation may raise anything
        fix = "install matching versions of torch and torchvision from the same index"
        return Finding(name, found, f"does not import: {first_line(error)}", fix, BOTH)
    return Finding(name, found)


def _torch() -> Iterator[Finding]:
    driver = driver_version()
    problem, fix = ("none", "install it") if has_gpu() else ("this machine has no NVIDIA GPU", "use one that has")
    yield Finding("NVIDIA driver", driver or "none", *(() if driver else (problem, fix, BOTH[1:])))
    import torch

    yield Finding("torch's CUDA", torch_cuda() or "none")
    if not torch.cuda.is_available():
        problem = "torch finds no GPU" if driver else ""
        prevents = BOTH if driver else ()
        yield Finding("GPUs of torch", "none", problem, "install torch for this driver's CUDA", prevents)
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB")


def _onnxruntime() -> Iterator[Finding]:
    found = distributions()
    packages = ", ".join(f"{name} {number}" for name, number in found.items())
    if not found:
        yield Finding("onnxruntime", "absent", "not installed", "pip install onnxruntime-gpu", BOTH)
        return
    problem = "several in one environment break each other" if len(found) > 1 else ""
    yield Finding("onnxruntime", packages, problem, how_to_fix("cuda"), BOTH[1:] if problem else ())
    import onnxruntime
    import torch  # noqa: F401  whose CUDA libraries onnxruntime's provider finds once they are loaded

    yield Finding("onnxruntime's CUDA", onnxruntime_cuda() or "none")
    onnxruntime.set_default_logger_severity(4)  # failures are reported here
    for provider in onnxruntime.get_available_providers():
        reason = try_provider(provider)
        kind = provider.removesuffix("ExecutionProvider").lower()
        if reason and sys.platform == "linux" and (missing := missing_library(kind)):
            reason = f"{missing} is missing"
        value = f"does not load: {reason}" if reason else "runs"
        if provider == "CUDAExecutionProvider":
            yield Finding(provider, value, reason, how_to_fix("cuda") if has_gpu() else "", BOTH[1:] if reason else ())
        else:
            yield Finding(provider, value)


def _openvino() -> Finding:
    found = openvino_version()
    if found is None:
        return Finding("OpenVINO", "2026.4 or newer is not installed: pip install 'lsag[openvino]'")
    try:
        import openvino

        core = openvino.Core()
        with signal_stack_kept():
            core.compile_model(core.read_model(one_node()), "CPU")
    except Exception as error:  # a broken installation may raise anything
        return Finding("OpenVINO", f"{found} does not run: {first_line(error)}")
    return Finding("OpenVINO", f"{found} runs")


def one_node() -> bytes:
    """A graph that adds `x` to itself."""
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "one", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


def try_provider(provider: str) -> str:
    """Run a graph of one node on an execution provider of onnxruntime; the reason if that fails, else empty."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session: Any = onnxruntime.InferenceSession(one_node(), options, providers=[provider], enable_fallback=0)
        if session.get_providers()[0] != provider:
            return "onnxruntime chose another provider instead"
        (result,) = session.run(None, {"x": np.ones(2, np.float32)})
        return "" if result.tolist() == [2, 2] else "it computes 1 + 1 wrongly"
    except Exception as error:  # onnxruntime raises its own types, which it does not export
        return first_line(error)


def _dataset(name: str, data_dir: Path) -> Finding:
    if name == "digits":
        return Finding("digits", "comes with scikit-learn")
    from lsag.data.splits import open_split

    try:
        found = open_split(name, data_dir, train=True, mode="RGB", download=False)
    except LsagError as error:
        return Finding(name, error.what)
    return Finding(name, f"{len(found):,} training images of {len(found.classes)} classes in {data_dir}")
