"""benchmarks/gpu.py on the CPU, with one round of a small model: that it runs, goes on after failures, and resumes."""

import signal
from types import SimpleNamespace

import pytest

from benchmarks import gpu
from lsag import bench


def call(part, out, *more):
    gpu.main(["--part", str(part), "--out", str(out), "--device", "cpu", "--quick", *map(str, more)])
    machine, *records = gpu.read([out / "gpu.jsonl"])
    assert machine["machine"]["TFLOP/s in bf16"] > 0
    return records


@pytest.mark.parametrize(
    ("part", "figure"),
    [
        pytest.param(1, "logits", marks=pytest.mark.slow),
        pytest.param(2, "nodes", marks=pytest.mark.slow),
        pytest.param(3, "images_per_second", marks=pytest.mark.slow),
        pytest.param(4, "share", marks=pytest.mark.slow),
        pytest.param(5, "top1", marks=pytest.mark.slow),
        pytest.param(6, "calls", marks=pytest.mark.slow),
    ],
)
def test_each_part_runs(part, figure, folder):
    records = call(part, folder / "out", "--data-dir", folder)
    assert any(figure in record for record in records)
    assert part == 6 or not any("error" in record for record in records)  # a CPU has one kind of fused attention


def test_what_is_known_is_not_measured_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "first").mkdir()
    first = call(3, tmp_path / "first")
    (tmp_path / "first/gpu.jsonl").open("a").write('{"part": 3, "what": "cut o')
    monkeypatch.setattr(gpu, "open_contender", lambda *args, **kwargs: pytest.fail("measured again"))
    assert len(call(3, tmp_path / "first")) == len(first) + 1  # the machine's line
    assert call(3, tmp_path / "second", "--have", tmp_path / "first/gpu.jsonl") == []
    capsys.readouterr()
    gpu.main(["--report", *map(str, tmp_path.glob("*/gpu.jsonl"))])
    text = capsys.readouterr().out
    assert text.startswith("## On a GPU") and text.count("- part 3: device ") == 3
    assert f"| plain:digits-nano | 2 | bf16 | {first[1]['images_per_second']:,.0f} |" in text


def test_a_failure_is_a_record_and_the_part_goes_on(tmp_path, monkeypatch):
    def opened(spec, **options):
        if spec.startswith("plain:"):
            raise MemoryError("no room")
        return bench.open_contender(spec, **options)

    monkeypatch.setattr(gpu, "open_contender", opened)
    records = call(3, tmp_path)
    assert len(records) == 4
    for record in records:
        failed = record["contender"] == "plain:digits-nano"
        assert record.get("error") == ("MemoryError: no room" if failed else None)


def test_without_time_nothing_begins(tmp_path, capsys):
    assert call(4, tmp_path, "--minutes", 0) == []
    assert "left: training steps: digits-nano, batch 16, bf16: recompute none, " in capsys.readouterr().out


def test_a_training_that_runs_out_of_time_is_resumed_elsewhere(folder, monkeypatch, capsys):
    events = []

    def after_an_epoch(number):
        events.append(number)
        if len(events) == 3:  # Started, Step, Epoch
            signal.raise_signal(number)

    monkeypatch.setattr(gpu, "STOP_SECONDS", 10**6)
    monkeypatch.setattr(gpu, "signal", SimpleNamespace(SIGTERM=signal.SIGTERM, raise_signal=after_an_epoch))
    assert [record["contender"] for record in call(5, folder / "first", "--data-dir", folder)] == ["epoch 1"]
    saved = folder / "first/digits-nano/step-0000000004.pt"
    assert str(saved) in capsys.readouterr().out
    monkeypatch.undo()
    (folder / "carried").mkdir()
    saved.rename(folder / "carried" / saved.name)
    records = call(5, folder / "second", "--data-dir", folder, "--run-folder", folder / "carried")
    assert [record["contender"] for record in records] == ["epoch 2", "digits-nano"]
