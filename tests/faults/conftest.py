"""A small run with all randomness on, and what it gives when nobody disturbs it."""

import os
from pathlib import Path

import pytest

from tests.faults.driver import PRESET, STEPS, make_data, result
from tests.processes import Server, Spawned


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests read lists of processes from /proc; without it they are shown as skipped."""
    if not Path("/proc/self/stat").exists():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs /proc"))


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    make_data(folder / "data")
    (folder / "small.toml").write_text(PRESET)
    return folder


@pytest.fixture
def arguments(material: Path) -> list[str]:
    """The run, to be begun or resumed in ./run: two slices of accumulation, no workers."""
    preset, data = str(material / "small.toml"), str(material / "data")
    shared = ["train", "--preset", preset, "--data-dir", data, "--resume", "--out", "run", "--device", "cpu"]
    return [*shared, "--workers", "0", "--save-minutes", "0.003"]


@pytest.fixture(scope="session")
def undisturbed(server: Server, material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The result of one process with --accum 2 that nobody disturbs."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    base = ["train", "--preset", str(material / "small.toml"), "--data-dir", str(material / "data"), "--out", "run"]
    run = server.start([*base, "--device", "cpu", "--accum", "2", "--workers", "0"], cwd)
    assert run.wait() == 0, run.stderr
    found = result(cwd / "run")
    assert len(found["steps"]) == STEPS  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="session")
def undisturbed_4(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The result of four processes that nobody disturbs."""
    cwd = tmp_path_factory.mktemp("undisturbed-4")
    base = ["train", "--preset", str(material / "small.toml"), "--data-dir", str(material / "data"), "--out", "run"]
    run = Spawned([*base, "--device", "cpu", "--procs", "4", "--accum", "2", "--workers", "0"], cwd)
    assert run.wait() == 0, run.stderr
    return result(cwd / "run")


@pytest.fixture(autouse=True)
def no_inherited_failpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LSAG_FAILPOINT", raising=False)
    assert "RANK" not in os.environ
