"""What can be seen of CUDA without a GPU: stub libraries report one, and compute nothing. `pytest -m cuda_stub`."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lsag import load_preset
from lsag.checkpoint import random_checkpoint, save_checkpoint
from lsag.inference.export import export_onnx
from lsag.inference.providers import OPSETS, openvino_version
from lsag.presets import preset_names
from tests.conftest import ROOT, shared

EVERY = [
    pytest.param(name, marks=pytest.mark.cuda_stub if name == "digits-nano" else pytest.mark.full_size)
    for name in preset_names()
]
NARROW = [
    {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_kv_heads": 1},
    {"embed_dim": 48, "depth": 1, "num_heads": 6, "num_kv_heads": 1},
]
OPEN = """
import json, sys, torch
from lsag.inference.session import Session
for path in sys.argv[1:]:
    session = Session(path, provider="cuda")
    size, channels = session.preset.model.image_size, session.preset.model.in_channels
    session(torch.zeros(3, channels, size, size, dtype=torch.uint8))
    options = session.runtime.session.get_provider_options()["CUDAExecutionProvider"]
    print(json.dumps([session.nodes_by_provider(), options["use_tf32"]]))
"""
CAPTURE = """
import json, sys, torch
from lsag.inference.session import Session
session = Session(sys.argv[1], provider="cuda", precision="tf32", cuda_graph=True)
images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
run = session.bind(images[:2])
run(), run()
options = session.runtime.session.get_provider_options()["CUDAExecutionProvider"]
print(json.dumps([session.nodes_by_provider(), options, list(session(images).shape)]))
"""


@pytest.fixture(scope="module")
def on_stubs(made_once):
    """Runs Python where torch and onnxruntime find an "H100"; its standard output."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    builder = shared("tools/cuda-stub/build.py")

    def build(folder):
        built = subprocess.run([sys.executable, builder, folder], capture_output=True, text=True, cwd=ROOT)
        if "    home = next(" in built.stderr:  # only this search may come back empty
            pytest.skip("the headers of CUDA are not installed")
        assert built.returncode == 0, built.stderr

    folder = made_once("stubs", build)
    shown = subprocess.run(
        ["bash", "-c", f"source {folder}/env.sh && env -0"], capture_output=True, text=True, check=True, env={}
    )
    stubs = dict(entry.split("=", 1) for entry in shown.stdout.split("\0") if entry)

    def run(*arguments, environment=()):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **stubs, **dict(environment)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("name", EVERY)
def test_every_node_is_placed(on_stubs, tmp_path, name, monkeypatch):
    monkeypatch.setattr("lsag.inference.export.CHECKED_BATCHES", (1,))
    checkpoint = random_checkpoint(narrow(name))
    kinds = [(opset, half) for opset in OPSETS for half in (False, True)]
    if name == "digits-nano":  # one of each in .ci/run, the others with -m full_size
        kinds = list(zip(OPSETS, (False, True), strict=True))
    files = [tmp_path / f"{opset}-{half}.onnx" for opset, half in kinds]
    for file, (opset, half) in zip(files, kinds, strict=True):
        done = export_onnx(checkpoint, file, opset=opset, half=half)
        assert "OpenVINO" in done.differences or openvino_version() is None
    for (opset, _), line in zip(kinds, on_stubs("-c", OPEN, *files).splitlines(), strict=True):
        nodes, tf32 = json.loads(line)
        assert nodes["CUDAExecutionProvider"] > 50 and tf32 == "0"
        if opset == 23:
            assert list(nodes) == ["CUDAExecutionProvider"]


def narrow(name):
    """A preset with few channels, two blocks in its first stage and one in others, but all else as it is."""
    stages = [stage.model_dump() for stage in load_preset(name).model.stages]
    for index, stage in enumerate(stages):
        stage.update(embed_dim=8 * stage["num_heads"], depth=1 if index else 2)
    return load_preset(name, {"model.stages": stages})


@pytest.mark.cuda_stub
def test_a_cuda_graph_is_captured_once_and_launched_again(on_stubs, tmp_path):
    export_onnx(random_checkpoint(narrow("digits-nano")), tmp_path / "a.onnx", batch=2)
    nodes, options, shape = json.loads(on_stubs("-c", CAPTURE, tmp_path / "a.onnx"))
    assert list(nodes) == ["CUDAExecutionProvider"] and shape == [5, 10]
    assert (options["enable_cuda_graph"], options["use_tf32"]) == ("1", "1")


@pytest.mark.cuda_stub
def test_another_gpu_is_chosen_by_its_number(on_stubs, tmp_path):
    checkpoint = random_checkpoint(narrow("digits-nano"))
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    export_onnx(checkpoint, tmp_path / "a.onnx")
    two = {"FAKECUDA_DEVICES": "2"}
    opened = (
        "import sys; from lsag.inference.classifier import open_model\n"
        "print(open_model(sys.argv[1], device='cuda:1').device_name)"
    )
    assert on_stubs("-c", opened, tmp_path / "a.pt", environment=two) == "cuda:1, fp32\n"
    assert on_stubs("-c", opened, tmp_path / "a.onnx", environment=two).endswith("CUDAExecutionProvider, GPU 1, fp32\n")
    command = ("-m", "lsag_cli", "bench", "digits-nano", tmp_path / "a.onnx", "--device", "cuda:1", "--rounds", "1")
    found = json.loads(on_stubs(*command, "--json", environment=two))["groups"][0]
    assert found["device"] == "cuda:1" and [one["precision"] for one in found["results"]] == ["bf16", "fp32"]


CALLS = """
import collections, ctypes, json, os, re, sys, torch
from pathlib import Path
from lsag import load_preset
from lsag.checkpoint import random_checkpoint
from lsag.device import autocast
from lsag.inference.classifier import Classifier
from lsag.inference.export import made_up_images
core, log = ctypes.CDLL(os.environ["CUDA_STUB"]), Path(sys.argv[1])
checkpoint = random_checkpoint(load_preset("cifar-tiny", {"model.stages": json.loads(sys.argv[2])}))
images = made_up_images(64, checkpoint)

def counted(run):
    run()
    core.fake_log(bytes(log))
    run()
    core.fake_log(b"")
    lines = [line.split() for line in log.read_text().splitlines()]
    log.unlink()
    found = collections.Counter(kind for kind, *_ in lines)
    tf32 = {"math3", "comp77"}  # as cuBLAS and cuBLASLt number it
    products = [line for line in lines if line[0] == "GEMM"]
    gemms = {(re.search("types([0-9]+)", " ".join(line))[1], bool(tf32 & {*line})) for line in products}
    waits = [line for line in lines if line[0] == "SYNC" or line[:2] == ["MEMCPY", "sync"]]
    return {"kernels": found["KERNEL"], "gemms": sorted(gemms), "waits": len(waits)}

for precision in ("fp32", "tf32", "bf16", "fp16"):
    classifier = Classifier(checkpoint, device="cuda", precision=precision).eval()
    print(json.dumps(counted(lambda: classifier(images))))
model, pixels = checkpoint.model.cuda().train(), torch.zeros(64, 3, 32, 32, device="cuda")

def step():
    with autocast(pixels.device, torch.bfloat16):
        logits = model(pixels)
    logits.float().sum().backward()

block = model.stages[0].blocks[0]
for block.recompute, block.chunk_bytes in ((False, 2**16), (False, None), (True, 2**16), (True, None)):
    print(json.dumps(counted(step)))
"""


@pytest.mark.cuda_stub
def test_what_is_launched_and_waited_for(on_stubs, tmp_path):
    *inference, in_chunks, whole, recomputed_in_chunks, recomputed = map(
        json.loads, on_stubs("-c", CALLS, tmp_path / "log", json.dumps(NARROW)).splitlines()
    )
    fp32, fp16, bf16 = "0", "2", "14"  # CUDA's numbers
    expected = [[[fp32, False]], [[fp32, True]], [[bf16, False]], [[fp16, False]]]
    assert [each["gemms"] for each in inference] == expected
    assert {each["kernels"] for each in inference} == {inference[0]["kernels"]}, (
        "weights are rounded once, not at a call"
    )
    assert not any(each["waits"] for each in inference), "nothing waits before the logits are read"
    assert in_chunks == whole, "chunks save nothing where everything is kept"
    assert recomputed["kernels"] < recomputed_in_chunks["kernels"]
