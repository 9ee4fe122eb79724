import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lsag import load_preset
from lsag.checkpoint import random_checkpoint
from lsag.config import preset_paths
from lsag.data import Normalize
from lsag.errors import CheckError, InputError, UnavailableError
from lsag.export import export_onnx
from lsag.runtime import OnnxModel
from tests.conftest import randomise, small_config


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    preset = load_preset("digits-nano")
    checkpoint = random_checkpoint(preset)
    randomise(checkpoint.model)
    return checkpoint, export_onnx(checkpoint, tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_the_graph_gives_the_logits_of_pytorch(exported):
    checkpoint, done = exported
    assert done.max_difference < 1e-4 and done.opset >= 18 and done.bytes == done.path.stat().st_size
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("images", "tensor(uint8)", ["batch", 8, 8, 1])
    ]
    for batch in (1, 3, 64):
        pixels = np.random.default_rng(batch).integers(0, 256, (batch, 8, 8, 1), dtype=np.uint8)
        (logits,) = session.run(["logits"], {"images": pixels})
        images = Normalize(checkpoint.preset.data)(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        torch.testing.assert_close(torch.from_numpy(logits), checkpoint.model(images), rtol=1e-4, atol=1e-4)


def test_the_file_stands_alone_and_describes_itself(exported):
    checkpoint, done = exported
    assert [path.name for path in done.path.parent.iterdir()] == ["model.onnx"]
    graph = onnx.load(done.path)
    onnx.checker.check_model(graph)
    assert not [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    metadata = json.loads({entry.key: entry.value for entry in graph.metadata_props}["lsag"])
    assert metadata["classes"] == [f"unnamed class {index}" for index in range(10)]
    assert metadata["input"]["center_crop"] == 8 and metadata["input"]["mode"] == "L"
    model = OnnxModel(done.path)
    assert model.preset == checkpoint.preset and model.classes == checkpoint.classes


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 28, "patch_kernel": 9, "patch_stride": 7, "patch_padding": 1, "shift_mode": "extend"},
        {"image_size": 16, "patch_kernel": 4, "patch_stride": 4, "patch_padding": 0},
        {},
    ],
    ids=["extended", "strided", "grouped heads"],
)
def test_other_shapes_export_too(tmp_path, changes):
    shifts = {"shifts": [[0, 0], [1, 0], [0, 2]]}
    preset = load_preset("cifar-nano").model_copy(update={"model": small_config(**changes, **shifts)})
    checkpoint = random_checkpoint(preset)
    randomise(checkpoint.model)
    assert export_onnx(checkpoint, tmp_path / "a.onnx").max_difference < 1e-4


def test_a_graph_that_differs_is_not_published(tmp_path, monkeypatch):
    original = OnnxModel.__call__
    monkeypatch.setattr(OnnxModel, "__call__", lambda self, images: original(self, images) + 0.001)
    with pytest.raises(CheckError, match=r"differ by 0.001"):
        export_onnx(random_checkpoint(load_preset("digits-nano")), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_other_files_and_providers_are_refused(tmp_path, exported):
    (tmp_path / "text.onnx").write_text("no graph")
    (tmp_path / "cut.onnx").write_bytes(exported[1].path.read_bytes()[:5000])
    plain = onnx.load(exported[1].path)
    del plain.metadata_props[:]
    onnx.save(plain, tmp_path / "foreign.onnx")
    outside = onnx.load(exported[1].path)
    onnx.save(outside, tmp_path / "outside.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    newer = onnx.load(exported[1].path)
    entry = next(entry for entry in newer.metadata_props if entry.key == "lsag")
    entry.value = entry.value.replace('"format": 1', '"format": 2', 1)
    onnx.save(newer, tmp_path / "newer.onnx")
    flipped = bytearray(exported[1].path.read_bytes())
    flipped[len(flipped) // 2] ^= 0x40
    (tmp_path / "flipped.onnx").write_bytes(flipped)
    hidden = onnx.load(exported[1].path)
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    hidden.graph.node.append(onnx.helper.make_node("Constant", [], ["unused"], value=tensor))
    (tmp_path / "hidden.onnx").write_bytes(hidden.SerializeToString())
    for name in (
        "flipped.onnx",
        "hidden.onnx",
        "text.onnx",
        "cut.onnx",
        "foreign.onnx",
        "absent.onnx",
        "outside.onnx",
        "newer.onnx",
    ):
        with pytest.raises(InputError, match=name):
            OnnxModel(tmp_path / name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which CUDA does not load")
def test_cuda_is_never_replaced_by_the_cpu(exported):
    with pytest.raises(UnavailableError, match="CUDAExecutionProvider"):
        OnnxModel(exported[1].path, provider="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("name", preset_paths())
def test_presets_export(tmp_path, name):
    assert export_onnx(random_checkpoint(load_preset(name)), tmp_path / "a.onnx").max_difference < 1e-4
