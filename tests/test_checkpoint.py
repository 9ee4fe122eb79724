import contextlib
import io
import os
import pickle
import random
import re
import zipfile
from unittest.mock import Mock

import pytest
import torch

from lsag import LSAG, load_checkpoint, load_preset
from lsag.checkpoint import Checkpoint, random_checkpoint, read_torch, save_checkpoint, save_safetensors
from lsag.errors import InputError, OutputError
from lsag.files import replacing
from lsag.training.begin import initialise_from
from tests.conftest import ABLATIONS, images, quantized, randomise, small_config


@pytest.fixture
def saved(tmp_path, tiny_preset):
    checkpoint = random_checkpoint(tiny_preset)
    randomise(checkpoint.model)
    path = tmp_path / "a.pt"
    save_checkpoint(path, Checkpoint(checkpoint.model, tiny_preset, tuple("abcdefghij"), 3, {"top1": 0.5}))
    return path, checkpoint


def test_a_checkpoint_comes_back_whole(saved, tiny_preset):
    path, original = saved
    loaded = load_checkpoint(path)
    batch = images(2, tiny_preset.model)
    assert torch.equal(loaded.model(batch), original.model(batch))
    assert (loaded.preset, loaded.classes) == (tiny_preset, tuple("abcdefghij"))
    assert (loaded.epoch, loaded.metrics) == (3, {"top1": 0.5})
    assert isinstance(loaded.model, LSAG) and not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_come_back_whole(tmp_path, name, ending):
    """What BatchNorm has counted, too."""
    preset = load_preset("cifar-nano").model_copy(update={"model": small_config(num_classes=10, **ABLATIONS[name])})
    original, batch = random_checkpoint(preset), images(4, preset.model)
    untrained = original.model(batch)
    randomise(original.model).train()(batch)
    {"pt": save_checkpoint, "safetensors": save_safetensors}[ending](tmp_path / f"a.{ending}", original)
    loaded = load_checkpoint(tmp_path / f"a.{ending}")
    assert loaded.preset == preset and not torch.equal(untrained, loaded.model(batch))
    assert torch.equal(loaded.model(batch), original.model.eval()(batch))
    counted = zip(loaded.model.buffers(), original.model.buffers(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in counted)
    assert len(list(loaded.model.buffers())) == {"i": 1, "ii": 9}.get(name, 0)


def test_shared_positions_are_resized(tmp_path):
    small, large = (
        load_preset("cifar-nano").model_copy(update={"model": small_config(image_size=size, **ABLATIONS["c"])})
        for size in (12, 16)
    )
    source, model = random_checkpoint(small), LSAG(large.model)
    with torch.no_grad():
        source.model.embed.pos.copy_(torch.arange(8.0).expand(144, 1, 8))
    save_checkpoint(tmp_path / "a.pt", source)
    assert "embed.pos resized from 12 x 12 to 16 x 16 patches" in initialise_from(
        model, tmp_path / "a.pt", classes=source.classes
    )
    torch.testing.assert_close(model.embed.pos.detach(), torch.arange(8.0).expand(256, 1, 8))
    assert torch.equal(model.embed.conv.weight, source.model.embed.conv.weight)


def test_checkpoints_are_plain_data_with_clean_names(saved):
    contents = torch.load(saved[0], weights_only=True)
    assert set(contents) == {"format", "kind", "preset", "classes", "epoch", "metrics", "model", "training"}
    assert not [key for key in contents["model"] if key.startswith(("module.", "_orig_mod."))]


def plain(value):
    """Nested data that can be compared, with the bytes of its tensors."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    return {key: plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value


SMALL = {"kind": "lsag", "epoch": 3, "model": {"a": torch.arange(3.0)}, "training": {0: {"step": torch.tensor(1)}}}
"""What a checkpoint consists of, small enough to flip every bit of the file."""


def assert_refused_or_identical(path, flips):
    torch.save(SMALL, path)
    data = path.read_bytes()
    for position in flips(data):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        with contextlib.suppress(InputError):
            assert plain(read_torch(path)) == plain(SMALL), f"bit {position}"


def test_what_torch_would_not_read_is_no_weight(tmp_path):
    """A bit of a member's attributes makes torch take it for a folder, and leave its tensor uninitialised."""

    def folders(data):
        return [8 * (record.start() + 38) + 4 for record in re.finditer(b"PK\x01\x02", data)]

    assert_refused_or_identical(tmp_path / "a.pt", folders)


@pytest.mark.parametrize(
    "share", [0.03, pytest.param(0.1, marks=pytest.mark.faults), pytest.param(1, marks=pytest.mark.full_size)]
)
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, share):
    def sample(data):
        return random.Random(0).sample(range(8 * len(data)), int(8 * len(data) * share))

    assert_refused_or_identical(tmp_path / "a.pt", sample)


def test_a_file_that_is_cut_is_refused(saved, tmp_path):
    data, generator = saved[0].read_bytes(), random.Random(0)
    for _ in range(50):
        (tmp_path / "cut.pt").write_bytes(data[: generator.randrange(len(data))])
        with pytest.raises(InputError, match=r"cut\.pt"):
            load_checkpoint(tmp_path / "cut.pt")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was-run"
    torch.save({"kind": "lsag", "format": 1, "model": Payload(marker)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(marker)))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(tmp_path / name)
    assert not marker.exists()


def test_bombs_and_foreign_files_are_refused(tmp_path, saved):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10_000_000)
    (tmp_path / "text.pt").write_text("these are my weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save(torch.load(saved[0]) | {"format": 2}, tmp_path / "newer.pt")
    for name, word in {
        "bomb.pt": "compressed",
        "text.pt": "not a checkpoint",
        "empty.pt": "not a checkpoint",
        "folder.pt": "cannot read",
        "pipe.pt": "cannot read",
        "absent.pt": "No such file",
        "foreign.pt": "lsag convert",
        "list.pt": "not an lsag checkpoint",
        "newer.pt": "format 2",
    }.items():
        with pytest.raises(InputError, match=name) as caught:
            load_checkpoint(tmp_path / name)
        assert word in str(caught.value)


VIT = {"timm": "vit_tiny_patch16_224,depth=20000", "in_channels": 1, "image_size": 224, "num_classes": 10}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: c["model"].pop("head.bias"), "1 missing: head.bias"),
        (lambda c: c["model"].update(extra=torch.zeros(1)), "1 unknown: extra"),
        (
            lambda c: c["model"].update({"head.bias": torch.zeros(3)}),
            "head.bias is float32 3, the model has float32",
        ),
        (lambda c: c["model"].update({"head.bias": torch.zeros(10).half()}), "head.bias is float16 10"),
        (lambda c: c["model"]["head.bias"].fill_(float("nan")), "1 not finite: head.bias"),
        (lambda c: c["preset"]["model"].update(num_classes=9), "classes"),
        (lambda c: c["preset"].pop("model"), "model is missing"),
        (lambda c: c.update(classes=3), "not contain what its format promises"),
        (lambda c: c.update(model=3), "not contain what its format promises"),
        (lambda c: c.update(epoch=float("inf")), "not contain what its format promises"),
        (lambda c: c.update(format=torch.zeros(3)), "checkpoint format"),
        (lambda c: c["preset"]["train"].update(epochs=10**500), "less than or equal to"),
        (lambda c: c.update(epoch="3"), "epoch: Input should be a valid integer (got '3')"),
        (lambda c: c.update(classes=list(range(10))), "classes.0: Input should be an instance of str (got 0)"),
        (lambda c: c.update(classes=[b"a"] * 10), "classes.0: Input should be an instance of str"),
        (lambda c: c.update(classes=None), "classes: Input should be a valid tuple (got None)"),
        (lambda c: c.update(metrics={"top1": float("nan")}), "metrics.top1: Input should be a finite number"),
        (lambda c: c["preset"]["model"].update(stages=c["preset"]["model"]["stages"] * 600), "more than 1000 blocks"),
        (lambda c: c["preset"].update(model=VIT), "more than 10,000 tensors"),
        (lambda c: c["model"].update({"head.bias": torch.zeros(1).expand(10)}), "plain tensors"),
        (lambda c: c["model"].update({"head.bias": quantized()}), "plain tensors"),
        (lambda c: c["preset"]["model"]["stages"][0].update(depth=60_000), "less than or equal to 1000"),
        (lambda c: c["preset"]["model"]["stages"][0].update(embed_dim=2 * 10**12), "less than or equal to"),
        (lambda c: c["model"].update({"head.bias": torch.zeros(10).to_sparse()}), "plain tensors"),
    ],
)
def test_contents_that_do_not_fit_are_named(saved, change, word):
    path, _ = saved
    contents = torch.load(path)
    change(contents)
    torch.save(contents, path)
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    assert word in str(caught.value)


def test_a_failed_write_leaves_what_was_there(saved, monkeypatch):
    path, original = saved
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot write .*a\.pt: No space left"):
        save_checkpoint(path, original)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.pt"]


def test_a_failed_write_holds_no_buffer(saved, monkeypatch):
    """Python 3.13 would complain on stderr when it removes a file in memory whose buffer is in use."""
    made = []

    class Remembered(io.BytesIO):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(io, "BytesIO", Remembered)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OutputError) as caught:
        save_checkpoint(*saved)
    for file in made:
        file.close()  # BufferError if it is in use
    assert "No space left" in str(caught.value)


def test_what_reads_back_differently_is_thrown_away(saved, monkeypatch):
    path, original = saved
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.pwrite(descriptor, b"?", 1000))
    with pytest.raises(OutputError, match="reads back differently"):
        save_checkpoint(path, original)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.pt"]


def test_replacing_needs_a_folder(tmp_path):
    with pytest.raises(OutputError, match="No such file"), replacing(tmp_path / "absent" / "a.pt"):
        pass
