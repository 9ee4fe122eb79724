"""The pages of `lsag eval --report` and `lsag explain --html`."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lsag.inference.explain as explaining
from lsag import load_checkpoint, load_preset
from lsag.checkpoint import Checkpoint, random_checkpoint, save_checkpoint
from lsag.data.arrays import digits
from lsag.inference.classifier import Classifier
from lsag.inference.evaluate import Evaluation, Metrics, evaluate_file
from lsag.inference.explain import explain
from lsag.inference.figures import figures
from lsag.report import write_explanation, write_report
from tests.browser import Page
from tests.conftest import assert_refused, randomise

EVIL = "</title></script><img src=x onerror=alert(1)>{{data}}{{body}}{{title}}"
needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")


def data_of(page: Path):
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


@pytest.fixture(scope="module")
def evaluated(server, tmp_path_factory):
    """A folder with a model of classes with hostile names, its report, and what `--json` answers."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    names = ["a&b {{data}}", "cat", "<img src=x onerror=alert(2)>", "ü"]
    for name in names:
        (folder / "val" / name).mkdir(parents=True)
        for index in range(8):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"val/{name}/{index}.png")
    preset = load_preset("cifar-nano", {"model.num_classes": 4}, dataset="folder")
    model = randomise(random_checkpoint(preset).model)
    save_checkpoint(folder / "a.pt", Checkpoint(model, preset, tuple(names)))
    options = ["--data-dir", ".", "--report", "out.html", "--predictions", "out.csv", "--json"]
    done = server.start(["eval", "a.pt", *options], folder).completed()
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_the_page_holds_the_figures_of_json(evaluated):
    folder, answer = evaluated
    assert (answer["report"], answer["predictions"], answer["plot"]) == (
        "out.html",
        "out.csv",
        "a-pt-folder-confusion.png",
    )
    data = data_of(folder / "out.html")
    same = ("top1", "top5", "loss", "ece", "intervals", "calibration", "by_class", "most_confused", "device", "date")
    assert all(data[key] == answer[key] for key in same)
    matrix = np.zeros((4, 4), int)
    for true, predicted, count in data["cells"]:
        matrix[true, predicted] = count
    assert matrix.tolist() == answer["confusion"] and data["shown"] == list(answer["by_class"])
    rows = [line.split(",") for line in (folder / "out.csv").read_text().splitlines()]
    assert rows[0] == ["image", "label", "predicted", "probability", "probability_of_label"]
    wrong = sorted((-float(row[3]), row[0], float(row[4])) for row in rows[1:] if row[1] != row[2])
    shown = [(-one["probability"], one["image"], one["probability_of_label"]) for one in data["mistakes"]]
    assert sorted(shown) == wrong and [one[0] for one in shown] == sorted(one[0] for one in shown)
    right = [row for row in rows[1:] if row[1] == row[2]]
    assert right and all(row[3] == row[4] for row in right)
    assert all(len(one["looks"]) == 3 and one["shifts"] and one["strongest"] for one in data["mistakes"])


@pytest.mark.slow
def test_a_graph_is_reported_without_explanations(evaluated, lsag):
    folder, answer = evaluated
    assert lsag("export", "a.pt", "--onnx", cwd=folder).returncode == 0
    done = lsag("eval", "a.onnx", "--data-dir", ".", "--provider", "cpu", "--report", "graph.html", cwd=folder)
    assert done.returncode == 0 and "report: graph.html" in done.stderr, done.stderr
    data = data_of(folder / "graph.html")
    assert (
        data["top1"] == answer["top1"]
        and data["unexplained"] == "cifar-nano is an exported graph, which shows no attention"
    )
    assert data["mistakes"] and not any("looks" in one for one in data["mistakes"])


def test_pages_that_cannot_be_written_are_refused_at_once(lsag, tmp_path):
    (tmp_path / "old.html").write_text("mine")
    assert_refused(lsag("eval", "absent.pt", "--report", "a.htm"), 2, "--report a.htm does not end in .html")
    assert_refused(lsag("eval", "absent.pt", "--report", "old.html"), 6, "old.html exists", "another --report")
    (tmp_path / "a.png").touch()
    assert_refused(lsag("explain", "absent.pt", "a.png", "--html", "--out", "b.png"), 2, "choose a .html file")
    assert_refused(lsag("explain", "absent.pt", "a.png", "--out", "b.html"), 2, "or add --html for a page")
    assert_refused(lsag("explain", "absent.pt", "old.png", "--html", "--out", "old.html"), 6, "old.html exists")


def thousand(source, num_classes=1000, count=5000) -> Evaluation:
    """An evaluation of a model that is mostly wrong, of so many classes that not all can be shown."""
    generator = torch.Generator().manual_seed(0)
    labels, predictions = torch.randint(0, num_classes, (2, count), generator=generator)
    labels[:900], predictions[:900] = 7, 993
    confidences = torch.rand(count, generator=generator)
    metrics = Metrics(count, 1.0, 0.0, 0.0, num_classes, labels, predictions, confidences, -confidences.log())
    model = Classifier(random_checkpoint(load_preset("digits-nano", {"model.num_classes": num_classes})))
    return Evaluation(metrics, model, "digits", None, ["image"] * count, source, ())


def test_the_page_of_a_thousand_classes_is_small_and_says_what_it_leaves_out(tmp_path):
    class Source:
        def load(self, index):
            return Image.effect_noise((300, 200), 90), 0

    evaluation = thousand(Source())
    write_report(evaluation, figures(evaluation), tmp_path / "a.html")
    data = data_of(tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size < 1e6
    assert len(data["shown"]) == 100 and {"unnamed class 7", "unnamed class 993"} <= set(data["shown"])
    assert [data["shown"].index("unnamed class 7"), data["shown"].index("unnamed class 993"), 900] in data["cells"]
    assert len(data["by_class"]) == 1000 and data["most_confused"][0] == ["unnamed class 7", "unnamed class 993", 900]


def test_a_page_that_would_be_too_large_is_coarser(tmp_path, monkeypatch):
    checkpoint = random_checkpoint(load_preset("in1k-small"))
    randomise(checkpoint.model)
    found = explain(Classifier(checkpoint), Image.effect_noise((224, 224), 80).convert("RGB"))
    assert [looks.shape[1] for looks in found.looks] == [28, 28, 14]
    for stage, looks in zip(found.stages, found.looks, strict=True):
        side, cells = stage.shape[1], looks.shape[1]
        token = side // 2 * side + side // 2
        expected = torch.nn.functional.avg_pool2d(stage.mean(dim=0)[None], side // cells)[0] * side**2
        torch.testing.assert_close(looks[token], expected, rtol=1e-3, atol=1e-4)
    write_explanation(found, tmp_path / "a.html", title="")
    assert (tmp_path / "a.html").stat().st_size < 5e6
    assert explaining._blocks([56, 0, 14]) == [2, 1, 1]


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_figures_of_json(evaluated, tmp_path, dark):
    folder, answer = evaluated
    with Page(folder / "out.html", tmp_path, dark=dark) as page:
        for name in ("top1", "top5", "ece"):
            assert page.text(f"#{name}") == f"{100 * answer[name]:.2f} %"
        assert page.text("#loss") == f"{answer['loss']:.4f}" and page.text("#images") == str(answer["images"])
        low, high = (f"{100 * bound:.2f} %" for bound in answer["intervals"]["top1"])
        assert page.text("#top1-range") == f"{low} to {high}"
        rows = page.run(
            "[...document.querySelectorAll('#classes tbody tr')].map((row) => [...row.cells].map((c) => c.textContent))"
        )
        shares = [[one[key] for key in ("precision", "recall", "f1")] for one in answer["by_class"].values()]
        assert [row[0] for row in rows] == list(answer["by_class"])
        assert [row[2:] for row in rows] == [["–" if v is None else f"{100 * v:.2f} %" for v in row] for row in shares]
        cells = page.run("[...document.querySelectorAll('#matrix td')].map((cell) => cell.textContent)")
        assert [int(cell or 0) for cell in cells] == [count for row in answer["confusion"] for count in row]

        # The keyboard alone: Tab leads into the matrix, arrows over it, and Enter sorts the table.
        page.tab_to("it.role === 'gridcell'")
        page.press("ArrowDown", "ArrowRight", "ArrowRight")
        names = list(answer["by_class"])
        assert page.text("#matrix-readout").startswith(
            f"{names[1]}, taken for {names[2]}: {answer['confusion'][1][2]} of 8 images"
        )
        page.tab_to("it.textContent === 'recall'")
        page.press("Enter")
        recalls = page.run("[...document.querySelectorAll('#classes tbody tr')].map((row) => row.cells[3].textContent)")
        assert recalls == [f"{100 * share:.2f} %" for share in sorted(row[1] for row in shares)]

        page.move("#matrix tr:nth-child(2) td:nth-child(2)")
        assert page.text("#matrix-readout").startswith(f"{names[0]}, recognised: {answer['confusion'][0][0]} of 8")
        assert page.run("document.querySelectorAll('#mistakes .card').length") == len(
            data_of(folder / "out.html")["mistakes"]
        )
        assert page.run("document.querySelector('#about').textContent.includes('cpu, fp32')")
        assert page.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)"
        )
        assert not page.complaints()


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_where_a_patch_looks(lsag, evaluated, tmp_path):
    folder, _ = evaluated
    shutil.copy(folder / "val/cat/0.png", folder / "<b>x.png")
    done = lsag("explain", "a.pt", "<b>x.png", "--html", "--at", "0,0", cwd=folder)
    assert done.returncode == 0 and "wrote <b>x-explained.html" in done.stdout, done.stderr
    classifier = Classifier(load_checkpoint(folder / "a.pt"))
    found = explain(classifier, Image.open(folder / "val/cat/0.png"))
    with Page(folder / "<b>x-explained.html", tmp_path) as page:
        assert page.text("h1") == "cifar-nano: <b>x.png" and page.text("#readout").startswith(
            "Patch in row 1, column 1:"
        )
        page.tab_to("it.role === 'option'")
        page.press("ArrowDown", "ArrowDown", "ArrowRight")
        assert page.text("#readout").startswith("Patch in row 3, column 2:")
        for head, weights in enumerate(found.local[:, :, 2, 1]):
            shift, share = found.shifts[weights.argmax()], weights.max().item()
            shown = page.run(f"document.querySelectorAll('#heads figcaption')[{head}].textContent")
            name, told = re.match(r"head \d: (\(.*?\)|unshifted) (\d+) %", shown).groups()
            assert name == (f"({shift[0]}, {shift[1]})" if any(shift) else "unshifted")
            assert abs(int(told) - 100 * share) <= 0.71
        # The colours that the page shows are those of the attention itself, within a step of the scale.
        data = data_of(folder / "<b>x-explained.html")
        for stage, (side, looks) in enumerate(zip((16, 8, 4), found.looks, strict=True)):
            pixels = page.run(
                f"Array.from(document.querySelectorAll('#views canvas')[{stage}].getContext('2d')"
                f".getImageData(0, 0, {side}, {side}).data)"
            )
            token = 2 * side // 16 * side + 1 * side // 16
            share = looks[token].clamp(1 / data["top"], data["top"]).log() / np.log(data["top"])
            expected = [data["map"][step] for step in ((share + 1) * 127.5).round().int().flatten()]
            assert np.abs(np.array(pixels).reshape(-1, 4)[:, :3] - np.array(expected)).max() <= 4
        assert not page.complaints()


@pytest.mark.slow
@needs_chromium
def test_pages_fit_a_phone(lsag, evaluated, tmp_path):
    folder, _ = evaluated
    assert lsag("explain", "a.pt", "val/ü/0.png", "--html", "--out", "phone.html", cwd=folder).returncode == 0
    for name in ("out.html", "phone.html"):
        with Page(folder / name, tmp_path / name, width=360, height=700) as page:
            assert page.run("document.documentElement.scrollWidth") == 360
            assert not page.complaints()


@pytest.mark.slow
@needs_chromium
def test_a_name_is_never_markup(tmp_path):
    """A folder cannot have a slash in its name; a checkpoint's classes can."""
    preset = load_preset("digits-nano")
    checkpoint = random_checkpoint(preset)
    classes = (EVIL, *(f"<b>{index} \udcff" for index in range(9)))
    save_checkpoint(tmp_path / "a.pt", Checkpoint(checkpoint.model, preset, checkpoint.classes))
    result = evaluate_file(tmp_path / "a.pt", dataset="digits")
    object.__setattr__(result.model, "classes", classes)
    write_report(
        result,
        figures(result) | dict.fromkeys(("checkpoint", "preset", "dataset", "folder", "device", "date"), EVIL),
        tmp_path / "a.html",
    )
    found = explain(result.model, digits(False, "L").load(0)[0])
    write_explanation(found, tmp_path / "b.html", title=EVIL)
    for name in "ab":
        with Page(tmp_path / f"{name}.html", tmp_path / name) as page:
            assert page.run("[...document.images].filter((image) => !image.src.startsWith('data:')).length") == 0
            assert EVIL in page.text("body") and not page.complaints()
