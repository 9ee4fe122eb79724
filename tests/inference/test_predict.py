import csv
import errno
import json
import os
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from lsag import load_checkpoint, load_preset
from lsag.checkpoint import Checkpoint, random_checkpoint, save_checkpoint
from lsag.data.splits import open_split
from lsag.data.transforms import eval_transform
from lsag.errors import InputError, UnreachableError
from lsag.inference.classifier import open_model
from lsag.inference.export import export_onnx
from lsag.inference.predict import predict
from lsag_cli.predict import matching
from tests.conftest import assert_refused, randomise
from tests.layouts import as_table


@pytest.fixture(scope="module")
def model(made_once):
    """A checkpoint of three named classes, and its graph beside it."""

    def make(folder):
        narrow = {"model.stages": [{"embed_dim": 16, "depth": 1, "num_heads": 2}]}
        preset = load_preset("cifar-nano", narrow, dataset="folder").with_classes(3)
        checkpoint = random_checkpoint(preset)
        randomise(checkpoint.model)
        save_checkpoint(folder / "a.pt", Checkpoint(checkpoint.model, preset, ("cat", "dog", "cow")))
        export_onnx(load_checkpoint(folder / "a.pt"), folder / "a.onnx")

    return made_once("predictor", make) / "a.pt"


def test_the_classes_are_those_of_the_model(model, folder):
    checkpoint = load_checkpoint(model)
    paths = sorted(folder.glob("*/*/*.png"))
    found = list(predict(open_model(model, device="cpu"), iter(paths), top_k=2, batch_size=5))
    assert [one.image for one in found] == paths
    for one in found:
        image = eval_transform(checkpoint.preset)(Image.open(one.image).convert("RGB"))
        expected = open_model(model, device="cpu")(image[None])[0].softmax(0)
        assert one.classes[0] == checkpoint.classes[expected.argmax()] and len(one.classes) == 2
        torch.testing.assert_close(one.probabilities[0], expected.max().item(), rtol=1e-4, atol=1e-5)
        assert one.probabilities[0] >= one.probabilities[1]


def test_images_are_read_a_few_batches_at_a_time(model, folder):
    asked = []
    paths = (asked.append(1) or folder / "val/cat/0.png" for _ in range(1000))
    found = predict(open_model(model, device="cpu"), paths, batch_size=4)
    next(found)
    assert len(asked) <= 12


def test_images_of_a_dataset_are_classified_and_explained(lsag, model, folder):
    dataset = ["--dataset", as_table(folder, folder)]
    files = json.loads(lsag("predict", model, *sorted(folder.glob("val/*/*")), "--json").stdout)["predictions"]
    assert json.loads(lsag("predict", model, *dataset, "--json").stdout)["predictions"] == files
    found = json.loads(lsag("predict", model, *dataset, "--split", "train", "--json").stdout)["predictions"]
    assert len(found) == 8 and found[0]["image"] == str(folder / "train/cat/0.png")
    (folder / "val/cat/1.png").write_bytes(b"broken")
    assert "not an image" in lsag("predict", model, *dataset).stdout

    assert lsag("explain", model, *dataset, "--index", "3").returncode == 0
    assert lsag("explain", model, folder / "val/dog/1.png", "--out", "file.png").returncode == 0
    drawn = [np.asarray(Image.open(folder / name)) for name in ("list-3-explained.png", "file.png")]
    assert drawn[0].shape == drawn[1].shape
    for arguments, code, words in (
        (["predict", model], 2, "give either images or --dataset"),
        (["predict", model, "a.png", *dataset], 2, "give either images or --dataset"),
        (["predict", model, "a.png", "--split", "val"], 2, "are for --dataset"),
        (["explain", model, "a.png", "--index", "1"], 2, "are for --dataset"),
        (["explain", model, *dataset, "--index", "4"], 2, "--index 4 is beyond the 4 images"),
        (["predict", model, "--dataset", "nothing"], 2, "unknown dataset 'nothing'"),
        (["predict", model, "--dataset", "list:none.csv"], 3, "cannot read none.csv: no such file"),
    ):
        assert_refused(lsag(*arguments), code, words)


def test_a_lost_connection_is_no_broken_image(model, folder, monkeypatch):
    source = open_split(as_table(folder, folder), folder, train=True, mode="RGB")
    monkeypatch.setattr(source, "open", mock.Mock(side_effect=UnreachableError("cannot reach it")))
    with pytest.raises(UnreachableError):
        next(predict(open_model(model, device="cpu"), source))


def test_a_checkpoint_and_its_graph_agree(lsag, model, folder):
    answers = []
    for file in (model, model.with_suffix(".onnx")):
        done = lsag("predict", file, folder, "--json")
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    ours, graphs = (answer["predictions"] for answer in answers)
    assert [one["classes"] for one in ours] == [one["classes"] for one in graphs] and len(ours) == 12
    assert answers[1]["device"].startswith("OpenVINO") or torch.cuda.is_available()


def test_what_is_left_out_is_said_also_beside_json_and_a_link_in_a_circle_is_a_row(lsag, model, folder):
    pictures = folder / "val/cat"
    (pictures / "x.heic").write_bytes(b"not decodable here")
    (folder / "loop.png").symlink_to("loop.png")
    done = lsag("predict", model, pictures, folder / "loop.png", "--json")
    assert done.returncode == 0 and "not used: 1 .heic" in done.stderr, done.stderr
    rows = json.loads(done.stdout)["predictions"]
    assert [bool(row.get("error")) for row in rows] == [False] * (len(rows) - 1) + [True]


def test_a_broken_image_is_a_row(lsag, model, folder, tmp_path):
    (folder / "val/dog/1.png").write_bytes(b"broken")
    done = lsag("predict", model, folder / "val", "--top-k", "2")
    assert done.returncode == 0 and "1 of 4 images could not be read" in done.stderr
    rows = done.stdout.splitlines()
    assert "val/cat/0.png" in rows[1] and " %" in rows[1]
    assert "val/dog/1.png" in rows[4] and "(not an image)" in rows[4]
    done = lsag("predict", model, folder / "val", "--csv", tmp_path / "out.csv", "--top-k", "9")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["error"] for line in lines] == ["", "", "", "not an image"]
    assert lines[3]["class_1"] == lines[3]["probability_3"] == "", "every row has all columns"
    assert lines[0]["class_1"] in ("cat", "dog", "cow") and 0 < float(lines[0]["probability_3"]) < 1
    done = lsag("predict", model, folder / "val/dog/1.png")
    assert_refused(done, 3, "no image could be read", "not an image")


def test_files_folders_and_patterns(lsag, model, folder):
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(folder / "odd [1].png")
    os.mkfifo(folder / "pipe.png")
    for given, count in (
        (["val/cat/0.png", "val/dog"], 3),
        (["val/*/0.png"], 2),
        (["**/1.png"], 4),
        (["odd [1].png"], 1),
    ):
        done = lsag("predict", model, *given, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["predictions"]) == count
    (folder / "empty").mkdir()
    for given in ("empty", "*.jpg"):
        assert_refused(lsag("predict", model, given, cwd=folder), 3, f"there are no images in {given}")
    assert_refused(lsag("predict", model, "absent.png", cwd=folder), 3, "absent.png", "no such file")
    assert_refused(lsag("predict", model, "pipe.png", cwd=folder), 3, "not a regular file")
    (folder / "esc\x1b[31m\n.png").write_bytes((folder / "val/cat/0.png").read_bytes())
    shown = lsag("predict", model, "esc\x1b[31m\n.png", cwd=folder).stdout
    assert "esc\\x1b[31m\\n.png" in shown and "\x1b" not in shown
    (folder / "link.csv").symlink_to("/dev/null")
    assert_refused(lsag("predict", model, "val", "--csv", "link.csv", cwd=folder), 6, "not a regular file")
    assert_refused(lsag("predict", model, "val", "--csv", "a.txt", cwd=folder), 2, ".csv")


def test_what_is_not_used_is_said_in_one_line(lsag, model, folder):
    (folder / "val/cat/a.heic").write_text("no image here")
    (folder / "val/cat/.thumbs").mkdir()
    (folder / "val/cat/.thumbs/a.png").write_bytes((folder / "val/cat/0.png").read_bytes())
    (folder / "val/cat/b.gif").write_bytes((folder / "val/cat/0.png").read_bytes())
    done = lsag("predict", model, "val", cwd=folder)
    assert done.returncode == 0 and "5 images, " in done.stdout
    assert done.stderr.splitlines() == ["not used: 1 hidden, 1 .heic (not decodable here)"]
    done = lsag("predict", model, "val/**/*.png", cwd=folder)
    assert done.returncode == 0 and "4 images, " in done.stdout
    assert done.stderr.splitlines() == ["not used: 1 hidden"]
    (folder / "only").mkdir()
    (folder / "only/a.heic").touch()
    done = lsag("predict", model, "only", cwd=folder)
    assert_refused(done, 3, "there are no images in only (not used: 1 .heic (not decodable here))")


def test_a_pattern_follows_no_links_in_circles(lsag, model, folder):
    """Two links of a folder to itself lead to 2**40 paths."""
    for name in ("a", "b"):
        (folder / "val/cat" / name).symlink_to(".")
    done = lsag("predict", model, "val/**/*.png", "val/c**/0.png", f"{folder}/val/*/[0]*", cwd=folder)
    assert done.returncode == 0 and "7 images, " in done.stdout, done.stderr


def test_patterns_meet_folders_that_cannot_be_read(folder):
    """Those that may hold a match are refused, others are not even opened; a single star follows a link."""
    (folder / "linked").symlink_to("val")
    opened = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path)

    with mock.patch("os.scandir", scandir):
        for pattern, count in (("val/c*/*.png", 2), ("link*/cat/*", 2), ("**/c*/0.png", None), ("val/**", None)):
            unused: Counter[str] = Counter()
            if count is None:
                with pytest.raises(InputError, match=r"cannot read .*dog: Permission denied"):
                    list(matching(f"{folder}/{pattern}", unused))
            else:
                assert len(list(matching(f"{folder}/{pattern}", unused))) == count
    unused = Counter()
    assert not list(matching(f"{folder}/val/*", unused)) and unused["folders"] == 2
    assert len(list(matching(f"{folder}/**/val/**/**/*.png", unused))) == 4


def test_nodes_are_counted(lsag, model, folder):
    done = lsag("predict", model.with_suffix(".onnx"), folder / "val/cat/0.png", "--provider", "cpu", "--profile")
    assert done.returncode == 0, done.stderr
    assert "nodes: " in done.stdout and "on CPUExecutionProvider" in done.stdout


def test_outputs_that_are_not_finite_are_no_prediction(model, folder):
    broken = open_model(model, device="cpu")
    torch.nn.init.constant_(broken.model.head.bias, torch.nan)
    with pytest.raises(InputError, match="not finite"):
        list(predict(broken, [folder / "val/cat/0.png"]))
