"""A small run with all randomness on, and what it gives when nobody disturbs it."""

import os
from pathlib import Path

import pytest

from tests.conftest import MadeOnce
from tests.faults.driver import PRESET, STEPS, make_data, result
from tests.processes import Server, Spawned

FP32 = ["--precision", "fp32"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests read lists of processes from /proc; without it they are shown as skipped."""
    if not Path("/proc/self/stat").exists():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs /proc"))


@pytest.fixture(scope="session")
def material(made_once: MadeOnce) -> Path:
    def make(folder: Path) -> None:
        make_data(folder / "data")
        (folder / "small.toml").write_text(PRESET)

    return made_once("material", make)


@pytest.fixture
def arguments(material: Path) -> list[str]:
    """The run, to be begun or resumed in ./run: two slices of accumulation, no workers."""
    preset, data = str(material / "small.toml"), str(material / "data")
    shared = ["train", "--preset", preset, "--data-dir", data, "--resume", *FP32, "--out", "run", "--device", "cpu"]
    return [*shared, "--workers", "0", "--save-minutes", "0.003"]


@pytest.fixture(scope="session")
def undisturbed(server: Server, material: Path, made_once: MadeOnce) -> dict[str, object]:
    """The result of one process with --accum 2 that nobody disturbs."""

    def make(cwd: Path) -> None:
        run = server.start([*undisturbed_run(material), "--accum", "2"], cwd)
        assert run.wait() == 0, run.stderr

    found = result(made_once("undisturbed", make) / "run")
    assert len(found["steps"]) == STEPS  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="session")
def undisturbed_4(material: Path, made_once: MadeOnce) -> dict[str, object]:
    """The result of four processes that nobody disturbs."""

    def make(cwd: Path) -> None:
        run = Spawned([*undisturbed_run(material), "--procs", "4", "--accum", "2"], cwd)
        assert run.wait() == 0, run.stderr

    return result(made_once("undisturbed-4", make) / "run")


def undisturbed_run(material: Path) -> list[str]:
    preset, data = str(material / "small.toml"), str(material / "data")
    return ["train", "--preset", preset, "--data-dir", data, *FP32, "--out", "run", "--device", "cpu", "--workers", "0"]


@pytest.fixture(autouse=True)
def no_inherited_failpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LSAG_FAILPOINT", raising=False)
    assert "RANK" not in os.environ
