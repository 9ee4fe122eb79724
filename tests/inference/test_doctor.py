import json
import re
import sys

import pytest
import torch

import lsag.inference.doctor
from lsag.inference.doctor import Finding, examine, try_provider


def test_what_is_there_is_found_by_trying(folder):
    found = {finding.name: finding for finding in examine(folder, folder / "runs")}
    assert found["torch"].value == torch.__version__.split("+")[0] and not found["torch"].problem
    assert found["CPUExecutionProvider"].value == "runs" and re.fullmatch(r"[\d.]+ runs", found["OpenVINO"].value)
    assert ("multiplies bf16" in found["processor"].value) == lsag.inference.doctor.multiplies_bf16()
    assert found["folder"].value.startswith("8 training images of 2 classes")
    assert found["cifar10"].value.startswith("no cifar10 in")
    assert "GB free" in found["disk"].value
    assert not (folder / "runs").exists()


def test_openvino_is_no_problem_where_it_is_absent_or_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    finding = lsag.inference.doctor._openvino()
    assert "does not run: import of openvino halted" in finding.value and not finding.problem
    monkeypatch.setattr(lsag.inference.doctor, "openvino_version", lambda: None)
    assert lsag.inference.doctor._openvino().value == "2026.4 or newer is not installed: pip install 'lsag[openvino]'"


def test_a_provider_is_run_not_asked(monkeypatch):
    assert try_provider("CPUExecutionProvider") == ""
    import onnxruntime

    class Liar:
        def __init__(self, *args, **kwargs):
            pass

        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Liar)
    assert "another provider" in try_provider("CUDAExecutionProvider")


def test_a_broken_package_and_two_runtimes_are_problems(folder, monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(lsag.inference.doctor.importlib, "import_module", broken)
    monkeypatch.setattr(
        lsag.inference.doctor, "distributions", lambda: {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}
    )
    found = {finding.name: finding for finding in examine(folder, folder)}
    assert "onnxruntime" not in found and "folder" not in found  # which need torch, and so cannot be looked at
    monkeypatch.setattr(lsag.inference.doctor, "_package", lambda name: lsag.inference.doctor.Finding(name, "1"))
    found |= {finding.name: finding for finding in examine(folder, folder) if finding.name not in found}
    assert "torchvision::nms" in found["torchvision"].problem and "train" in found["torchvision"].prevents
    assert "break each other" in found["onnxruntime"].problem and found["onnxruntime"].prevents == ("gpu-inference",)


@pytest.mark.parametrize("present", [True, False])
def test_a_driver_is_asked_for_only_where_there_is_a_gpu(folder, monkeypatch, present):
    from lsag.inference import providers

    for module in (lsag.inference.doctor, providers):
        monkeypatch.setattr(module, "driver_version", lambda: None)
        monkeypatch.setattr(module, "has_gpu", lambda: present)
    found = {finding.name: finding for finding in examine(folder, folder)}
    assert found["NVIDIA driver"].prevents == ("gpu-inference",)
    assert ("install" in found["NVIDIA driver"].fix) == present
    assert ("install the NVIDIA driver" in providers.how_to_fix("cuda")) == present
    assert "cores" in found["processor"].value and "GiB" in found["processor"].value


def test_each_finding_is_shown_before_the_next_is_looked_for(monkeypatch, capsys):
    from lsag_cli.doctor import doctor

    def examine(data_dir, out):
        yield Finding("python", "3.99")
        assert "3.99" in capsys.readouterr().out
        yield Finding("torch", "2.99")

    monkeypatch.setattr(lsag.inference.doctor, "examine", examine)
    doctor()
    assert "2.99" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_command(lsag):
    done = lsag("doctor")
    assert done.returncode == 0, done.stderr
    assert "CPUExecutionProvider" in done.stdout and "runs" in done.stdout
    assert lsag("doctor", "--for", "train").returncode == 0
    done = lsag("doctor", "--for", "gpu-inference", "--json")
    assert done.returncode == 4 and "gpu-inference will not work here" in done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is False and any(finding["name"] == "NVIDIA driver" for finding in answer["findings"])
