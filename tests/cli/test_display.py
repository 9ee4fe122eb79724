from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

import lsag_cli.output
from lsag import load_preset
from lsag.inference.predict import Prediction
from lsag.training.events import Started, Step
from lsag_cli.app import app
from lsag_cli.display import Display
from lsag_cli.output import say_table
from lsag_cli.predict import show

COLUMNS = ("image", "class", "probability", "runner-up")
ROWS = [
    ("a/folder/with/a/long/name/photo.jpg", "cat", "90.00 %", "a dog 9.00 %"),
    ("猫.jpg", "犬", "1.00 %", "cat 0.5 %"),
]


@pytest.fixture
def terminal(monkeypatch):
    """stdout is a terminal of so many columns."""

    def of(width):
        monkeypatch.setattr(lsag_cli.output, "is_terminal", lambda stream: True)
        monkeypatch.setenv("COLUMNS", str(width))

    return of


@pytest.mark.parametrize("width", [40, 50, 60, 70, 80, 120])
def test_tables_fit_the_terminal(terminal, capsys, width):
    terminal(width)
    say_table(COLUMNS, ROWS, drop=("runner-up",))
    shown, noted = capsys.readouterr()
    lines = shown.splitlines()
    assert len(lines) == 3 and all(cell_len(line) <= width for line in lines)
    assert "90.00 %" in lines[1] and "photo.jpg" in lines[1] and "猫.jpg" in lines[2]
    assert ("a/folder/with" in lines[1]) == (width >= 60) and ("a dog" in lines[1]) == (width >= 70)
    assert ("no room for: runner-up" in noted) == (width < 70)


def test_files_get_every_column(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    say_table(COLUMNS, ROWS, drop=("runner-up",))
    shown = capsys.readouterr().out
    assert all(word in shown for row in ROWS for word in row)


@pytest.mark.parametrize(
    ("command", "width"),
    [
        (["flops", "--preset", "cifar-tiny"], 60),
        (["presets"], 70),
        (["bench", "digits-nano", "--rounds", "1", "--batch-size", "1", "--device", "cpu"], 80),
    ],
    ids=["flops", "presets", "bench"],
)
def test_the_tables_of_the_commands_drop_columns_instead_of_breaking_lines(terminal, command, width):
    terminal(width)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "no room for: " in done.stderr, done.output
    assert all(cell_len(line) <= width for line in done.stdout.splitlines())


def test_predictions_drop_the_last_runners_up_first(terminal, capsys):
    terminal(80)
    names = tuple(f"a class of a long name {rank}" for rank in range(4))
    show([Prediction(Path("a.jpg"), names, (0.4, 0.3, 0.2, 0.1))])
    shown, noted = capsys.readouterr()
    assert all(cell_len(line) <= 80 for line in shown.splitlines()) and names[1] in shown
    assert "no room for: runner-up 2, runner-up 3" in noted


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_progress_line_keeps_the_time_left(terminal, monkeypatch, width):
    terminal(width)
    monkeypatch.setattr("lsag_cli.display.is_terminal", lambda stream: True)
    started = Started(
        preset=load_preset("cifar-tiny"),
        out=Path("runs/one"),
        device="cpu",
        parameters=10_000_000,
        train_images=50_000,
        eval_images=10_000,
        steps_per_epoch=390,
        first_step=0,
        ranks=1,
        slice_size=128,
        notes=(),
    )
    display = Display(started)
    try:
        display.accuracy = "90.12 %"
        display.step(
            Step(epoch=12, step=34, loss=1.234, lr=5e-4, images_per_second=1234.5, data_wait=0.01, memory=2**30)
        )
        text = display.bar.tasks[0].description
    finally:
        display.close()
    assert len(text) <= width - 12 and "loss 1.234" in text and text.endswith("left")
    assert ("lr" in text) == (width > 120) and ("img/s" in text) == (width > 60)
