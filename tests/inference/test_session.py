"""What runs where it was asked to, and what is refused before it runs."""

import ctypes
import json
import platform
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from lsag.checkpoint import save_checkpoint
from lsag.errors import InputError, UnavailableError, UsageError
from lsag.inference.doctor import _openvino
from lsag.inference.export import export_onnx, made_up_images
from lsag.inference.graph import read_graph, sealed
from lsag.inference.providers import (
    PROVIDERS,
    check_driver,
    describe_installation,
    distributions,
    how_to_fix,
    load_libraries,
    openvino_version,
    torch_cuda,
)
from lsag.inference.runtimes import _engine_cache
from lsag.inference.session import Session
from lsag.machine import multiplies_bf16
from tests.conftest import assert_refused

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which CUDA does not load")


@pytest.fixture(scope="module")
def graph(checkpoint, made_once):
    return made_once("graph", lambda folder: export_onnx(checkpoint, folder / "model.onnx")) / "model.onnx"


@pytest.fixture
def write(graph, tmp_path):
    """A copy of the graph, changed; with its digest made anew, as an attacker would."""

    def change(edit, *, signed=True):
        model = onnx.load(graph)
        digest = model.metadata_props.pop()
        edit(model)
        if not signed:
            model.metadata_props.append(digest)
        (tmp_path / "bad.onnx").write_bytes((sealed if signed else bytes)(model.SerializeToString()))
        return tmp_path / "bad.onnx"

    return change


def test_it_says_where_it_runs(graph, checkpoint):
    for provider in ("cpu", "openvino", "auto"):
        session = Session(graph, provider=provider)
        assert session.provider == provider or provider == "auto"
        assert session.preset == checkpoint.preset and session.input["dtype"] == "uint8"
    nodes = Session(graph).nodes_by_provider()
    assert set(nodes) == {"CPUExecutionProvider"} and nodes["CPUExecutionProvider"] > 20
    with pytest.raises(UsageError, match="unknown provider 'gpu'"):
        Session(graph, provider="gpu")


@NO_CUDA
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_is_never_replaced_by_the_cpu(graph, provider, monkeypatch):
    with pytest.raises(
        UnavailableError, match=r"NVIDIA driver.*torch: CUDA.*onnxruntime: CUDA.*driver:.*installed: onnx"
    ):
        Session(graph, provider=provider)
    # Also where there is a driver, and the provider does not load all the same.
    monkeypatch.setattr("lsag.inference.session.check_driver", lambda provider: None)
    with pytest.raises(UnavailableError, match="ExecutionProvider"):
        Session(graph, provider=provider)
    assert Session(graph, provider="auto").provider in ("cpu", "openvino")


@NO_CUDA
def test_auto_says_why_it_took_the_cpu(graph, monkeypatch, capfd):
    monkeypatch.setattr("lsag.inference.providers.openvino_version", lambda: None)
    monkeypatch.setattr("lsag.inference.session.has_driver", lambda: False)
    session = Session(graph, provider="auto")
    assert (session.provider, session.fallback_reason) == ("cpu", "no NVIDIA driver found")
    # A driver, and the package for CPUs.
    monkeypatch.setattr("lsag.inference.session.has_driver", lambda: True)
    monkeypatch.setattr("lsag.inference.providers.distributions", lambda: {"onnxruntime": "1"})
    monkeypatch.setattr("lsag.inference.providers.onnxruntime_cuda", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    session = Session(graph, provider="auto")
    assert session.provider == "cpu" and session.fallback_reason == (
        "this onnxruntime was built without CUDAExecutionProvider"
        " — pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    )
    # The package for GPUs, which falls back in silence for want of a library, or says so.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDERS["cuda"], PROVIDERS["cpu"]])
    monkeypatch.setattr("lsag.inference.runtimes.missing_library", lambda provider: "libcudnn.so.9")
    monkeypatch.setattr("lsag.inference.runtimes.how_to_fix", lambda provider: "pip install nvidia-cudnn-cu13")
    start = onnxruntime.InferenceSession
    on_cpu = {"providers": ["CPUExecutionProvider"]}
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, **options: start(*given, **options | on_cpu))
    session = Session(graph, provider="auto")
    assert session.provider == "cpu"
    assert "did not load CUDAExecutionProvider: libcudnn.so.9 is missing" in session.fallback_reason
    assert session.fallback_reason.endswith(" — pip install nvidia-cudnn-cu13")

    def fail(data, options, *, providers, **others):
        if providers != ["CPUExecutionProvider"]:
            raise RuntimeError("libcublas.so.13: cannot open shared object file\nat provider_bridge.cc:2210")
        return start(data, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    session = Session(graph, provider="auto")
    assert session.provider == "cpu" and "libcublas.so.13" in session.fallback_reason
    assert "\n" not in session.fallback_reason and "".join(capfd.readouterr()) == ""
    assert Session(graph, provider="cpu").fallback_reason == ""


@NO_CUDA
def test_the_commands_say_why_on_stderr(lsag, graph, checkpoint, folder, tmp_path):
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    line = "running on the CPU (no NVIDIA driver found)\n"
    for command in (["predict", graph, "val/cat/0.png"], ["predict", graph, "val/cat/0.png", "--json"]):
        done = lsag(*command)
        assert (done.returncode, done.stderr) == (0, line)
        done = lsag(*command, "--provider", "cpu")
        assert (done.returncode, done.stderr) == (0, "")
    assert lsag("predict", "a.pt", "val/cat/0.png").stderr == ""
    for model, options, said in ((graph, [], True), (graph, ["--provider", "cpu"], False), ("a.pt", [], False)):
        done = lsag("eval", model, *options)
        assert done.returncode == 0 and (line in done.stderr) == said, done.stderr


@NO_CUDA
def test_the_command_fails_at_once_and_names_the_fix(lsag, graph, folder):
    start = time.monotonic()
    done = lsag("predict", graph, folder, "--provider", "cuda")
    assert_refused(done, 4, "NVIDIA driver", "use --provider cpu")
    assert time.monotonic() - start < 10  # three seconds where nothing else runs
    assert_refused(lsag("eval", graph, "--provider", "cuda"), 4, "NVIDIA driver")
    assert_refused(lsag("eval", "a.pt", "--provider", "cuda"), 2, "--provider is for .onnx graphs")
    assert_refused(lsag("eval", graph, "--device", "cuda:1"), 4, "NVIDIA driver")
    assert_refused(lsag("eval", graph, "--device", "mps"), 2, "use auto, cpu, cuda or cuda:N")
    for device, provider in (("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "auto")):
        done = lsag("eval", graph, "--device", device, "--provider", provider)
        assert_refused(done, 2, f"--device {device} contradicts --provider {provider}")
    done = lsag("predict", graph, folder, "--device", "cpu")
    assert done.returncode == 0 and "OpenVINO" in done.stdout and done.stderr == "", done.stderr


@NO_CUDA
def test_the_driver_is_looked_for_without_torch():
    with pytest.raises(UnavailableError):
        check_driver("cuda")
    assert torch_cuda() == torch.version.cuda
    assert onnxruntime.__version__ in describe_installation() and "onnxruntime" in " ".join(distributions())


def test_two_onnxruntimes_are_the_first_thing_to_fix(monkeypatch):
    monkeypatch.setattr("lsag.inference.providers.distributions", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    assert how_to_fix("cuda").startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_tensorrt_is_loaded_from_its_package_or_asked_for(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    load_libraries("tensorrt")
    assert sys.modules.pop("tensorrt").__file__ == str(tmp_path / "tensorrt.py")
    for name, value in (("distributions", {"onnxruntime-gpu": "1"}), ("onnxruntime_cuda", "13"), ("torch_cuda", "13")):
        monkeypatch.setattr(f"lsag.inference.providers.{name}", lambda value=value: value)
    monkeypatch.setattr("lsag.inference.providers.driver_version", lambda: "1")
    monkeypatch.setattr("lsag.inference.providers.missing_library", lambda provider: "libnvinfer.so.10")
    assert how_to_fix("tensorrt") == "pip install 'tensorrt-cu13<11'"


def test_tensorrt_keeps_an_engine_for_each_content_of_a_file(graph, tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(graph.read_bytes())
    kept = read_graph(path)
    options = _engine_cache(kept)
    assert options["trt_engine_cache_path"] == f"{path}.trt"
    other = _engine_cache(replace(kept, data=kept.data + b"0"))
    assert options["trt_engine_cache_prefix"] != other["trt_engine_cache_prefix"]
    assert _engine_cache(read_graph(path.read_bytes())) == {}


def test_bits_that_flip_and_files_that_are_cut_are_refused(graph, tmp_path):
    good, generator, bad = graph.read_bytes(), random.Random(0), tmp_path / "bad.onnx"
    metadata = good.index(b'{"format"')
    for trial in range(150):
        changed = bytearray(good)
        if trial % 5 == 0:
            del changed[generator.randrange(len(good)) :]
        else:
            changed[generator.randrange(metadata if trial % 2 else 0, len(good))] ^= 1 << generator.randrange(8)
        bad.write_bytes(changed)
        with pytest.raises(InputError, match=r"bad\.onnx"):
            Session(bad)


@pytest.mark.parametrize("name", ["text", "empty", "absent", "folder"])
def test_what_is_no_graph_is_refused(tmp_path, name):
    (tmp_path / "text.onnx").write_text("no graph")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(InputError, match=name):
        Session(tmp_path / f"{name}.onnx")


def test_graphs_of_others_and_newer_ones_are_refused(write, graph):
    def forget(model):
        del model.metadata_props[:]

    def renew(model):
        entry = metadata_of(model)
        entry.value = entry.value.replace('"format": 2', '"format": 3', 1)

    with pytest.raises(InputError, match="was not exported by lsag"):
        Session(write(forget, signed=False))
    with pytest.raises(InputError, match="has format 3"):
        Session(write(renew, signed=False))
    with pytest.raises(InputError, match="digest differs"):
        Session(write(lambda model: model.graph.initializer[0].ClearField("name"), signed=False))


def metadata_of(model):
    return next(entry for entry in model.metadata_props if entry.key == "lsag")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda values: values["input"].update(batch=0), "input.batch: Input should be greater than 0"),
        (lambda values: values["input"].update(batch=-1), "input.batch"),
        (lambda values: values["input"].update(batch="x"), "input.batch"),
        (lambda values: values.update(input=[]), "input"),
        (lambda values: values.update(classes=list(range(10))), "classes.0: Input should be an instance of str"),
        (lambda values: values.update(classes=None), "classes"),
        (lambda values: values["classes"].pop(), "9 class names for 10 classes"),
        (lambda values: values["preset"].pop("train"), "train is missing"),
        (lambda values: values["preset"]["model"].update(depht=1), "unknown key model.depht"),
    ],
)
def test_metadata_of_a_wrong_type_is_named(write, change, word):
    def edit(model):
        values = json.loads(metadata_of(model).value)
        change(values)
        metadata_of(model).value = json.dumps(values)

    with pytest.raises(InputError, match="what its format promises") as caught:
        Session(write(edit))
    assert word in str(caught.value)


def test_names_that_are_not_text_are_refused(write, graph, tmp_path):
    data = onnx.load(graph).SerializeToString().replace(b"Conv", b"\xff\xff\xff\xff")
    (tmp_path / "bad.onnx").write_bytes(sealed(data))
    with pytest.raises(InputError, match="was refused: it has b'"):
        Session(tmp_path / "bad.onnx")


LOCATIONS = ["../weights", "/etc/passwd", "weights", "link", "hard", "folder/weights", ""]


@pytest.mark.parametrize("location", LOCATIONS)
def test_weights_in_other_files_are_refused_wherever_they_lie(write, tmp_path, location):
    (tmp_path / "weights").write_bytes(bytes(100_000))
    (tmp_path / "link").symlink_to(tmp_path / "weights")
    (tmp_path / "hard").hardlink_to(tmp_path / "weights")
    (tmp_path / "folder").symlink_to(tmp_path)

    def outsource(model):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.raw_data)
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)

    with pytest.raises(InputError, match="keeps weights in other files"):
        Session(write(outsource))


def test_weights_hidden_in_a_node_are_found_too(write):
    tensor = TensorProto(name="t", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)

    def hide(model):
        model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))

    with pytest.raises(InputError, match="keeps weights in other files"):
        Session(write(hide))


@pytest.mark.parametrize(
    ("node", "named"),
    [
        (helper.make_node("Evil", ["logits"], ["x"], domain="com.example"), "com.example.Evil"),
        (
            helper.make_node("FusedMatMul", ["logits", "logits"], ["x"], domain="com.microsoft"),
            "com.microsoft.FusedMatMul",
        ),
        (helper.make_node("Loop", ["", "", "logits"], ["x"], body=helper.make_graph([], "body", [], [])), "Loop"),
        (helper.make_node("RandomNormal", [], ["x"], shape=[10**6, 10**6]), "RandomNormal"),
    ],
)
def test_operators_that_no_export_has_are_refused(write, node, named):
    with pytest.raises(InputError, match=f"it has {named}, as no export has"):
        Session(write(lambda model: model.graph.node.append(node)))


def test_functions_are_refused(write):
    function = helper.make_function("com.example", "F", ["x"], ["y"], [], [helper.make_opsetid("", 20)])
    with pytest.raises(InputError, match="functions of its own"):
        Session(write(lambda model: model.functions.append(function)))


def test_work_that_is_left_to_the_cpu_is_refused(graph, monkeypatch):
    """As if CUDA had loaded and taken nothing: what a real GPU does is not tested here."""
    monkeypatch.setattr("lsag.inference.session.check_driver", lambda provider: None)
    monkeypatch.setitem(PROVIDERS, "cuda", "CPUExecutionProvider")
    with pytest.raises(UnavailableError, match=r"left \d+ nodes such as \w+ to the CPU"):
        Session(graph, provider="cuda")


def test_sparse_weights_are_refused(write):
    def sparse(model):
        model.graph.sparse_initializer.add()

    with pytest.raises(InputError, match="keeps weights in other files"):
        Session(write(sparse))


def test_what_was_checked_is_what_runs(graph, tmp_path, monkeypatch, checkpoint):
    """A file that is swapped after it was read changes nothing."""
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.read_bytes())

    def swap(name):
        checked = read_graph(name)
        path.write_bytes(b"something else")
        return checked

    monkeypatch.setattr("lsag.inference.session.read_graph", swap)
    for provider in ("cpu", "openvino"):
        path.write_bytes(graph.read_bytes())
        assert Session(path, provider=provider)(made_up_images(2, checkpoint)).isfinite().all()
        assert path.read_bytes() == b"something else"


def test_openvino_gives_the_same_logits(graph, checkpoint):
    images = made_up_images(3, checkpoint)
    expected, session = Session(graph)(images), Session(graph, provider="openvino", threads=1)
    torch.testing.assert_close(session(images), expected, rtol=0, atol=1e-5)
    with ThreadPoolExecutor(4) as pool:  # several threads may call at a time
        for found in pool.map(session, [images] * 8):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert session.precision == "fp32" and re.fullmatch(r"OpenVINO [\d.]+ CPU, fp32", session.device_name)
    assert session.nodes_by_provider()["OpenVINO"] > 20
    torch.testing.assert_close(torch.from_numpy(session.bind(images)()["logits"]), expected, rtol=0, atol=1e-5)


def test_openvino_computes_in_bf16_where_asked(lsag, graph, checkpoint, folder):
    import openvino

    # Asks OpenVINO, not our module: a flag that we no longer found would be noticed.
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("needs a processor that multiplies bf16")
    assert multiplies_bf16() or sys.platform != "linux" or platform.machine() != "x86_64"
    images = made_up_images(3, checkpoint)
    for provider in ("openvino", "auto"):
        coarse = Session(graph, provider=provider, precision="bf16")
        assert (coarse.provider, coarse.precision, coarse.fallback_reason) == ("openvino", "bf16", "")
        assert 1e-3 < (coarse(images) - Session(graph)(images)).abs().max() < 0.5
    done = lsag("eval", graph, "--provider", "openvino", "--precision", "bf16", "--profile", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads(done.stdout)
    assert found["device"].endswith("CPU, bf16") and list(found["nodes"]) == ["OpenVINO"]


def test_a_graph_of_fp16_remains_one(checkpoint, tmp_path, monkeypatch):
    half = export_onnx(checkpoint, tmp_path / "half.onnx", half=True, batch=2).path
    images = made_up_images(3, checkpoint)
    session = Session(half, provider="openvino")
    assert session.precision in ("fp16", "fp32")  # fp32 on a processor without fp16
    torch.testing.assert_close(session(images), Session(half)(images), rtol=0, atol=0.1)
    with pytest.raises(UsageError, match="no provider runs an fp16 graph in bf16 — lsag export"):
        Session(half, provider="openvino", precision="bf16")


@pytest.mark.parametrize(
    ("provider", "precision", "said"),
    [
        ("cpu", "bf16", "the provider cpu does not run an fp32 graph in bf16 — use --provider openvino"),
        ("openvino", "tf32", "the provider openvino does not run an fp32 graph in tf32 — use --provider cuda"),
        ("tensorrt", "fp32", "the provider tensorrt does not run an fp32 graph in fp32 — use --provider cuda"),
        ("auto", "fp16", "no provider runs an fp32 graph in fp16 — lsag export CKPT --onnx --precision fp16"),
    ],
)
def test_a_precision_that_a_provider_lacks_is_refused(graph, provider, precision, said, monkeypatch):
    monkeypatch.setattr("lsag.inference.session.check_driver", lambda provider: None)
    with pytest.raises(UsageError) as caught:
        Session(graph, provider=provider, precision=precision)
    assert str(caught.value) == said


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are looked at on Linux alone")
def test_openvino_leaves_the_stack_of_signals_alone(graph):
    """Its own is gone with the model, and then the next signal, or worker of a DataLoader, ended the process."""

    def signal_stack():
        found = ctypes.create_string_buffer(64)
        assert ctypes.CDLL(None).sigaltstack(None, found) == 0
        return found.raw

    before = signal_stack()
    session = Session(graph, provider="openvino")
    session(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert signal_stack() == before and "runs" in _openvino().value
    assert signal_stack() == before


@pytest.mark.parametrize(("found", "counts"), [("2026.3.1", False), ("2026.4.0", True), ("2027.0.0", True)])
def test_an_old_openvino_is_none(monkeypatch, found, counts):
    monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    assert openvino_version() == (found if counts else None)


def test_auto_prefers_openvino_to_the_cpu(graph, monkeypatch):
    monkeypatch.setattr("lsag.inference.session.has_driver", lambda: False)
    session = Session(graph, provider="auto")
    assert (session.provider, session.fallback_reason) == ("openvino", "no NVIDIA driver found")
    import openvino

    def fail(*given):
        raise RuntimeError("Exception from core.cpp:117:\nException from plugin.cpp:54:\nno such operator\n\n")

    monkeypatch.setattr(openvino.Core, "compile_model", fail)
    said = f"OpenVINO cannot run {graph} in fp32: no such operator — use --provider cpu"
    session = Session(graph, provider="auto")
    assert (session.provider, session.fallback_reason) == ("cpu", f"no NVIDIA driver found; {said}")
    with pytest.raises(UnavailableError) as caught:
        Session(graph, provider="openvino")
    assert str(caught.value) == said
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("lsag.inference.runtimes.openvino_version", lambda: None)
    with pytest.raises(UnavailableError, match=r"2026.4 or newer is not installed — pip install 'lsag\[openvino\]'"):
        Session(graph, provider="openvino")


def test_the_commands_refuse_a_precision_too(lsag, graph, folder):
    assert_refused(lsag("eval", graph, "--provider", "openvino", "--precision", "tf32"), 2, "use --provider cuda")
    assert_refused(lsag("eval", graph, "--provider", "cuda", "--precision", "bf16"), 2, "use --provider openvino")
    assert_refused(lsag("eval", graph, "--device", "cuda", "--provider", "openvino"), 2, "contradicts")


def test_a_cuda_graph_needs_a_fixed_batch(graph, monkeypatch):
    monkeypatch.setattr("lsag.inference.session.check_driver", lambda provider: None)
    for provider in ("cpu", "cuda"):
        with pytest.raises(UsageError, match="a CUDA graph needs provider='cuda' and a fixed batch size"):
            Session(graph, provider=provider, cuda_graph=True)
