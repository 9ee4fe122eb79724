import json
from itertools import product
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lsag import load_preset
from lsag.checkpoint import Checkpoint, random_checkpoint
from lsag.data.transforms import Normalize
from lsag.errors import CheckError, UnavailableError, UsageError
from lsag.inference.export import checked_batches, export_onnx, made_up_images
from lsag.inference.providers import OPSETS
from lsag.inference.session import Session
from lsag.presets import preset_names, preset_paths
from tests.conftest import ABLATIONS, randomise, small_config


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
    model = Session(done.path)
    assert model.preset == checkpoint.preset and model.classes == checkpoint.classes


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 28, "patch_kernel": 9, "patch_stride": 7, "patch_padding": 1, "shift_mode": "extend"},
        pytest.param(
            {"image_size": 16, "patch_kernel": 4, "patch_stride": 4, "patch_padding": 0}, marks=pytest.mark.slow
        ),
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=["extended", "strided", "grouped heads"],
)
def test_other_shapes_export_too(tmp_path, changes):
    shifts = {"shifts": [[0, 0], [1, 0], [0, 2]]}
    preset = load_preset("cifar-nano").model_copy(update={"model": small_config(**changes, **shifts)})
    checkpoint = random_checkpoint(preset)
    randomise(checkpoint.model)
    assert export_onnx(checkpoint, tmp_path / "a.onnx").max_difference < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_export(tmp_path, name):
    model = small_config(**ABLATIONS[name], stages=[{"embed_dim": 8, "depth": 2, "num_heads": 2, "num_kv_heads": 1}])
    preset = load_preset("cifar-nano").model_copy(update={"model": model})
    checkpoint = random_checkpoint(preset)
    randomise(checkpoint.model)
    done = export_onnx(checkpoint, tmp_path / "a.onnx", opset=20)
    assert done.max_difference < 1e-4 and Session(done.path).preset == preset and not done.notes


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("OpenVINO", marks=pytest.mark.slow)])
def test_a_graph_that_differs_is_not_published(tmp_path, tiny_preset, monkeypatch, runtime):
    original = Session.__call__
    monkeypatch.setattr(
        Session, "__call__", lambda self, images: original(self, images) + 0.001 * (runtime in self.device_name)
    )
    with pytest.raises(CheckError, match=rf"differs from PyTorch by 0.001 in {runtime}"):
        export_onnx(random_checkpoint(tiny_preset), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_graph_that_openvino_cannot_run_is_written_with_a_note(exported, tmp_path, monkeypatch):
    checkpoint, whole = exported
    assert list(whole.differences) == ["onnxruntime", "OpenVINO"] and whole.notes == ()
    said = "OpenVINO cannot run the graph in fp32: no such operator"
    monkeypatch.setattr("lsag.inference.session.OpenVINO", Mock(side_effect=UnavailableError(said)))
    done = export_onnx(checkpoint, tmp_path / "a.onnx")
    assert done.path.exists() and list(done.differences) == ["onnxruntime"] and done.notes == (said,)


def test_the_first_operator_is_a_cast(exported):
    """Of uint8, TensorRT takes nothing else."""
    takes = [node.op_type for node in onnx.load(exported[1].path).graph.node if "images" in node.input]
    assert [name for name in takes if name != "Shape"] == ["Cast"]


def test_both_opsets_are_written_and_read_back(exported, tmp_path):
    checkpoint, newest = exported
    for opset, done in ((23, newest), (20, export_onnx(checkpoint, tmp_path / "20.onnx", opset=20))):
        graph = onnx.load(done.path)
        assert [entry.version for entry in graph.opset_import if not entry.domain] == [opset] == [done.opset]
        fused = [node for node in graph.graph.node if node.op_type == "Attention"]
        assert bool(fused) == (opset == 23)
        assert done.batches == (1, 2, 5, 64) and done.compared == done.same_top1 == 72
    with pytest.raises(UsageError, match="opset 17 is not supported"):
        export_onnx(checkpoint, tmp_path / "17.onnx", opset=17)


def test_half_computes_in_fp16_and_takes_and_gives_what_fp32_does(exported, tmp_path):
    checkpoint, whole = exported
    done = export_onnx(checkpoint, tmp_path / "half.onnx", half=True)
    assert done.bytes < 0.6 * whole.bytes and 0 < done.max_difference < 1
    assert done.same_top1 >= done.compared - 3
    graph = onnx.load(done.path).graph
    kinds = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer if len(tensor.dims) > 1}
    assert "FLOAT16" in kinds
    assert [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)] == [
        onnx.TensorProto.UINT8,
        onnx.TensorProto.FLOAT,
    ]


def test_half_that_overflows_is_not_published(tmp_path, tiny_preset):
    checkpoint = random_checkpoint(tiny_preset)
    with torch.no_grad():
        checkpoint.model.head.bias.fill_(1e6)
    with pytest.raises(CheckError, match="not finite"):
        export_onnx(checkpoint, tmp_path / "half.onnx", half=True)
    assert not list(tmp_path.iterdir())


def test_a_fixed_batch_serves_any_number_of_images(exported, tmp_path):
    checkpoint, whole = exported
    done = export_onnx(checkpoint, tmp_path / "four.onnx", batch=4)
    assert done.batches == (4,)
    assert onnx.load(done.path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    for count in (1, 4, 9):
        images = made_up_images(count, checkpoint)
        torch.testing.assert_close(Session(done.path)(images), Session(whole.path)(images), rtol=1e-4, atol=1e-4)


def test_raw_input_leaves_normalising_to_the_client(exported, tmp_path):
    checkpoint, whole = exported
    done = export_onnx(checkpoint, tmp_path / "raw.onnx", raw_input=True)
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    assert [(i.type, i.shape) for i in session.get_inputs()] == [("tensor(float)", ["batch", 1, 8, 8])]
    images, expected = made_up_images(3, checkpoint), Session(whole.path)(made_up_images(3, checkpoint))
    for provider in ("cpu", "openvino"):
        for given in (images, images.transpose(2, 3).contiguous().transpose(2, 3)):  # also in another order in memory
            logits = Session(done.path, provider=provider)(given)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not Session(done.path).input["normalised_inside"]


def test_large_models_are_compared_at_smaller_batches():
    assert checked_batches(random_checkpoint(load_preset("digits-nano"))) == (1, 2, 5, 64)
    base = load_preset("cifar-base").model_copy(update={"model": load_preset("cifar-base").model})
    assert checked_batches(Checkpoint(torch.nn.Identity(), base, ())) == (1, 2, 5, 18)


REDUCED = {
    "model.stages": [{"embed_dim": 32, "depth": 2, "num_heads": 2}, {"embed_dim": 48, "depth": 1, "num_heads": 6}]
}


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
def test_a_narrow_model_of_table_2_exports(tmp_path, opset, monkeypatch):
    monkeypatch.setattr("lsag.inference.export.CHECKED_BATCHES", (1, 2, 5))
    done = export_onnx(random_checkpoint(load_preset("in1k-small", REDUCED)), tmp_path / "a.onnx", opset=opset)
    assert done.max_difference < 1e-4


@pytest.mark.full_size
@pytest.mark.parametrize(
    ("name", "opset"),
    [*product(preset_paths(), OPSETS), *((name, 20) for name in preset_names() if name not in preset_paths())],
)
def test_presets_export_at_full_size(tmp_path, name, opset):
    done = export_onnx(random_checkpoint(load_preset(name)), tmp_path / "a.onnx", opset=opset)
    assert done.max_difference < 1e-4 and done.opset == opset
