"""The paper's tables as rows, their trainings as processes, and the report of them."""

import itertools
import json
import os
import signal
import sys
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from lsag import load_preset
from lsag.config import parse_spec
from lsag.errors import InputError, OutputError, UsageError
from lsag.model.build import build_model, count_model
from lsag.paper.reproduce import Run, execute, markdown, plan, summarise
from lsag.paper.tables import TABLES
from lsag_cli.app import app
from lsag_cli.processes import lsag_command
from tests.conftest import ROOT, assert_refused
from tests.processes import Spawned

SMALL = {"dataset": None, "overrides": {}}
NANO_ROWS = [(table, row) for table in (3, 5, 6) for row in TABLES[table] if row.nano]


@pytest.mark.parametrize("row", [row for rows in TABLES.values() for row in rows], ids=lambda row: row.name)
def test_every_row_is_a_preset_at_full_scale(row):
    preset = row.at("full", **SMALL)
    params_m, _, top1 = row.printed()
    assert preset.train.epochs == 300
    if row.timm:
        assert (preset.model.timm, preset.model.arguments) == parse_spec(row.timm)
    else:
        assert preset.name == row.preset
    assert params_m or row.name in ("I", "II")
    assert all(40 < value < 100 for value in top1.values())


@pytest.mark.parametrize(("table", "row"), NANO_ROWS, ids=lambda value: getattr(value, "name", str(value)))
def test_rows_at_the_small_scale_are_alike_but_for_what_they_test(table, row):
    """The same images and recipe, and no more than a fifth more or fewer parameters than the whole method."""
    full, preset = TABLES[5][-1].at("nano", **SMALL), row.at("nano", **SMALL)
    assert (preset.data, preset.augment, preset.train) == (full.data, full.augment, full.train)
    assert 0.8 < count_model(preset.model).params / count_model(full.model).params < 1.1
    assert preset.name.startswith("cifar-nano-") and build_model(preset.model)


def test_small_rows_of_a_table_have_folders_of_their_own():
    for table in (3, 5, 6):
        names = [row.at("nano", **SMALL).name for row in TABLES[table] if row.nano]
        assert len(set(names)) == len(names) > 2
    assert [run.folder.parent.name for run in plan(TABLES[3], scale="full", seeds=1, out=ROOT, **SMALL)].count(
        "cifar-tiny-nest-t"
    ) == 1


def test_figures_are_the_papers():
    """Spot checks by hand against Tables 3 to 6."""
    found = {(table, row.name): row.printed() for table, rows in TABLES.items() for row in rows}
    assert found[3, "NesT-S"] == (23.4, 1616.9, {"cifar10": 96.97, "cifar100": 81.70})
    assert found[3, "Our-T"] == (10.2, 1700.2, {"cifar10": 97.00, "cifar100": 81.80})
    assert found[4, "TNT-S"] == (23.8, None, {"imagenet": 81.3})
    assert found[5, "E"][0] == 7.6 and found[5, "E"][2] == {"cifar10": 96.85}
    assert found[6, "II"][2] == {"cifar10": 96.0}


def test_a_plan_goes_seed_by_seed_and_knows_what_is_done(tmp_path):
    runs = plan(TABLES[6], scale="nano", seeds=2, out=tmp_path, dataset=None, overrides={"train.epochs": 2})
    assert [(run.row, run.preset.train.seed) for run in runs] == [
        ("I", 0), ("II", 0), ("Full", 0), ("I", 1), ("II", 1), ("Full", 1)
    ]  # fmt: skip
    done, half = runs[0].folder, runs[1].folder
    for folder, epochs in ((done, 2), (half, 1)):
        folder.mkdir(parents=True)
        (folder / "preset.json").write_text(runs[0 if folder == done else 1].preset.model_dump_json())
        rows = [{"epoch": epoch + 1, "top1": 0.25 * (epoch + 1), "seconds": 60.0} for epoch in range(epochs)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = plan(TABLES[6], scale="nano", seeds=2, out=tmp_path, dataset=None, overrides={"train.epochs": 2})
    assert [run.top1 for run in again] == [0.5, None, None, None, None, None]
    with pytest.raises(OutputError, match=r"train\.epochs"):
        plan(TABLES[6], scale="nano", seeds=1, out=tmp_path, dataset=None, overrides={"train.epochs": 3})


FAKE = """
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
preset = json.loads(pathlib.Path(sys.argv[sys.argv.index("--preset") + 1]).read_text())
out.mkdir(parents=True)
started = time.time()
time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
(out / "seen.json").write_text(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"),
                                           started, time.time(), preset["name"], "--resume" in sys.argv]))
if preset["train"]["seed"] == 1:
    sys.exit("lsag: error: no more room - free some")
row = {"epoch": preset["train"]["epochs"], "top1": 0.5, "seconds": 1.0}
(out / "preset.json").write_text(json.dumps(preset))
(out / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
"""
COMMAND = [sys.executable, "-c", FAKE]


def test_trainings_are_spread_over_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    runs = plan(TABLES[6], scale="nano", seeds=2, out=tmp_path, **SMALL)
    ended = list(execute(runs, command=COMMAND, devices=["3", "5"], threads=7))
    assert sorted(run.folder for run in ended) == sorted(run.folder for run in runs)
    seen = [json.loads((run.folder / "seen.json").read_text()) for run in runs]
    assert {entry[0] for entry in seen} == {"3", "5"} and {entry[1] for entry in seen} == {"7"}
    assert all(entry[4] == run.preset.name and entry[5] for entry, run in zip(seen, runs, strict=True))
    for device in ("3", "5"):  # one after the other on each, yet not all in a row
        times = sorted(entry[2:4] for entry in seen if entry[0] == device)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))
    assert max(entry[2] for entry in seen if entry[0] == "3") > min(entry[3] for entry in seen if entry[0] == "5")
    for run in ended:
        failed = run.preset.train.seed == 1
        assert (run.top1 is None) == failed and run.error == ("no more room - free some" if failed else "")


@pytest.mark.parametrize(
    "log", ["", "{}", "5", "null", "[1]", '{"epoch": 300}', "torn", "NaN", "text", "missing preset"]
)
def test_a_damaged_log_is_no_result(tmp_path, log):
    (run, *_) = plan(TABLES[6], scale="nano", seeds=1, out=tmp_path, **SMALL)
    epochs = run.preset.train.epochs
    run.folder.mkdir(parents=True)
    if log != "missing preset":
        (run.folder / "preset.json").write_text(run.preset.model_dump_json())
    row = {"epoch": epochs, "top1": 0.5, "seconds": 1.0}
    broken = {
        "": "",
        '{"epoch": 300}': json.dumps({"epoch": epochs}),
        "torn": json.dumps(row) + '\n{"epo',
        "NaN": json.dumps({**row, "top1": float("nan")}),
        "text": json.dumps({**row, "top1": "x"}),
        "missing preset": json.dumps(row),
    }
    (run.folder / "metrics.jsonl").write_text(broken.get(log, log))
    if log in ("", "missing preset"):
        assert run.with_result().top1 is None
    else:
        with pytest.raises(InputError, match="is damaged"):
            run.with_result()


def test_an_error_is_that_of_this_attempt(tmp_path):
    (run, *_) = plan(TABLES[6], scale="nano", seeds=1, out=tmp_path, **SMALL)
    run.log.parent.mkdir(parents=True)
    run.log.write_text("lsag: error: an old one - forget it\n")
    (ended,) = execute([run], command=["sh", "-c", "kill -9 $$"], devices=[None])
    assert "killed by SIGKILL" in ended.error


def test_what_is_done_is_not_done_again(tmp_path):
    runs = [replace(run, top1=0.5) for run in plan(TABLES[6], scale="nano", seeds=1, out=tmp_path, **SMALL)]
    assert not list(execute(runs, command=["false"], devices=[None]))


def test_a_silent_failure_is_told_with_its_log(tmp_path):
    (run, *_) = plan(TABLES[6], scale="nano", seeds=1, out=tmp_path, **SMALL)
    (ended,) = execute([run], command=["false"], devices=[None])
    assert "ended with 1" in ended.error and str(run.log) in ended.error
    (absent,) = execute([run], command=["/no/such/program"], devices=[None])
    assert "No such file" in absent.error


def test_leaving_early_stops_the_trainings_and_begins_no_more(tmp_path):
    runs = plan(TABLES[6], scale="nano", seeds=1, out=tmp_path, **SMALL)
    ready = replace(runs[0], folder=tmp_path / "ready/seed-0")
    quick = [
        sys.executable,
        "-c",
        FAKE.replace('float(os.environ.get("FAKE_SECONDS", "0"))', '60 * ("ready" not in sys.argv[4])'),
    ]
    trainings = execute([ready, *runs], command=quick, devices=[None, None])
    assert next(trainings).folder == ready.folder
    started = time.monotonic()
    trainings.close()
    assert time.monotonic() - started < 20
    assert [*tmp_path.glob("*/seed-0/seen.json")] == [ready.folder / "seen.json"]


def runs_of(row, *accuracies, error=""):
    preset = row.at("nano", **SMALL)
    found = [Run(row.name, preset, ROOT / f"{seed}", top1, 60.0) for seed, top1 in enumerate(accuracies)]
    return [*found, *([Run(row.name, preset, ROOT, error=error)] if error else [])]


def test_the_report_says_mean_spread_and_what_failed():
    one, two, full = TABLES[6]
    runs = [*runs_of(one, 0.70, 0.72), *runs_of(two, error="it | broke"), *runs_of(full, 0.74, 0.75, 0.76)]
    found = summarise(TABLES[6], runs, count=lambda preset: count_model(preset.model), paper_dataset="cifar10")
    assert [item.name for item in found] == ["I", "II", "Full"]
    assert found[0].mean == pytest.approx(71) and found[0].deviation == pytest.approx(2**0.5)
    assert found[1].mean is found[1].deviation is None
    lines = markdown(found, title="Table 6", about="About.").splitlines()
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if line[:1] == "|"
    }
    assert rows["I"][4:] == ["71.00 ± 1.41", "2", "-4.00", "96.30", "-0.70"]
    assert rows["II"][4:] == ["-", "0", "-", "96.00", "-1.00"]
    assert rows["Full"][4:] == ["75.00 ± 1.00", "3", "+0.00", "97.00", "+0.00"]
    assert len({line.count("|") for line in lines if line[:1] == "|"}) == 1
    assert "- II: it | broke" in lines


TINY_RUN = [
    "--dataset=folder", "--device=cpu", "--epochs=1", "--seeds=1", "--out=out",
    "--set=train.batch_size=4", "--set=train.warmup_epochs=0", "--set=model.image_size=8",
]  # fmt: skip


@pytest.mark.slow
def test_a_table_from_the_command_line(lsag, folder):
    """Trained once; the second time only looked up, and with another seed only that one is trained."""
    done = lsag("reproduce", "--table", 5, "--rows", "a,FULL", *TINY_RUN, "--data-dir", folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "2 trainings, about" in done.stderr and "(2 of 2)" in done.stderr
    assert "| A | cifar-nano-a |" in done.stdout and "| C | cifar-nano-c |" in done.stdout
    assert (folder / "out/table-5.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((folder / "out/table-5.json").read_text())
    assert [len(row["top1"]) for row in report["rows"]] == [0, 1, 0, 0, 0, 0, 1]
    before = {path: path.stat().st_mtime for path in folder.glob("out/*/seed-*/metrics.jsonl")}
    assert len(before) == 2
    again = lsag(
        "reproduce", "--table=5", "--rows=A,Full", *TINY_RUN, "--seeds=2", "--json", "--data-dir", folder, cwd=folder
    )
    assert again.returncode == 0 and "(2 of 2)" in again.stderr, again.stderr
    assert {path: path.stat().st_mtime for path in before} == before
    elsewhere = lsag("reproduce", "--table=5", *TINY_RUN, "--data-dir", folder / "train", cwd=folder)
    assert_refused(elsewhere, 6, "the runs in out were trained on", "another --out")
    rows = json.loads(again.stdout)["rows"]
    assert [len(row["top1"]) for row in rows] == [0, 2, 0, 0, 0, 0, 2]


def test_trainings_are_started_as_this_command_was(folder, monkeypatch):
    """`python -m lsag_cli` would run a queue.py of the current folder."""
    import lsag_cli.reproduce as module

    commands = []

    def nothing(todo, *, command, **others):
        commands.append(command)
        yield from ()

    monkeypatch.chdir(folder)
    monkeypatch.setattr(module, "execute", nothing)
    monkeypatch.setattr(module, "estimate_hours", lambda *args, **options: 0.0)
    done = CliRunner().invoke(app, ["reproduce", "--table=6", "--rows=I", *TINY_RUN, f"--data-dir={folder}"])
    assert done.exit_code == 0, done.output
    start = lsag_command()
    assert [command[: len(start) + 1] for command in commands] == [[*start, "train"]]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_trainings_which_go_on_later(lsag, folder, number):
    arguments = ["reproduce", "--table=6", "--rows=I", *TINY_RUN, f"--data-dir={folder}"]
    arguments[arguments.index("--epochs=1")] = "--epochs=2000"
    process = Spawned(arguments, folder)
    metrics = folder / "out/cifar-nano-i/seed-0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, number)
    assert process.wait(60) == 143
    log = (folder / "out/cifar-nano-i/seed-0.log").read_text()
    assert "is saved in" in log and "Traceback" not in log
    assert_refused(lsag(*[arg.replace("2000", "1999") for arg in arguments], cwd=folder), 6, "another train.epochs")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--table", "4"], 2, ["no such rows at the scale nano", "--scale full"]),
        (["--table", "5", "--rows", "A,Z"], 2, ["table 5 has no row 'Z'", "NesT-T, A, B"]),
        (["--table", "3", "--rows", "DeiT-S"], 2, ["no such rows at the scale nano"]),
        (["--table", "5", "--rows", ""], 2, ["table 5 has no row ''"]),
        (["--table", "7"], 2, ["less than or equal to 6"]),
        (["--table", "2", "--epochs", "3"], 2, ["table 2 is counted"]),
        (["--table", "5", "--set", "name=x"], 2, ["--set name is not for reproduce"]),
        (["--table", "5", "--set", "train.seed=1"], 2, ["--set train.seed is not for reproduce"]),
        (["--table", "5", "--set", "train.lr=1", "--set", "train.lr=2"], 2, ["train.lr is set twice"]),
        (["--table", "5", "--out", "/dev/null"], 6, ["cannot write /dev/null"]),
        (["--table", "5", "--dataset", "folder", "--data-dir", "nowhere"], 3, ["nowhere"]),
    ],
)
def test_wrong_uses(lsag, arguments, code, words):
    assert_refused(lsag("reproduce", *arguments), code, *words)


def test_a_failed_training_is_an_error_also_as_json(lsag, folder):
    done = lsag("reproduce", "--table=6", "--rows=I", *TINY_RUN, "--set=train.lr=1e30", "--json", "--data-dir", folder)
    assert done.returncode == 5 and "1 of 1 trainings failed, first I: " in done.stderr.splitlines()[-1]
    assert json.loads(done.stdout)["ok"] is False


@pytest.mark.slow
def test_the_papers_setting_states_its_cost_and_waits_for_yes(lsag, tmp_path):
    done = lsag("reproduce", "--table=6", "--scale=full", "--rows=I", "--seeds=1", "--device=cpu", "--out=out")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and "add --yes" in lines[-1] and "1 training, about" in lines[-2]
    assert lines[0] == "mixup is drawn once a batch; in the release by each of 8 GPUs: --accum 8"
    assert not [*tmp_path.glob("out/*/")]


def test_table_2_is_counted(lsag, tmp_path):
    done = lsag("reproduce", "--table=2", "--out=out")
    assert done.returncode == 0 and "| cifar-base | cifar-base | 115.77 M | 115.8 M |" in done.stdout, done.stderr
    assert not (tmp_path / "out/table-2.png").exists()


def test_a_baseline_without_a_network_of_that_size_is_refused():
    with pytest.raises(UsageError, match="timm has no model"):
        build_model(load_preset("cifar-tiny", timm="NestX,patch_size=1").model)
