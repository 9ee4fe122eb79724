"""Real trainings in processes of their own, to be killed, starved and resumed."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from tests.conftest import ROOT

# Everything that draws random numbers is on, so that a resume that forgets one of them shows.
PRESET = """
[model]
image_size = 8
num_classes = 4
shifts = [[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]
patch_kernel = 3
patch_stride = 1
patch_padding = 1
drop_path = 0.2
stages = [{embed_dim = 32, depth = 1, num_heads = 2, num_kv_heads = 1}, {embed_dim = 32, depth = 1, num_heads = 2}]
[data]
dataset = "folder"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
train_crop = "padded"
crop_padding = 1
[train]
epochs = 3
batch_size = 16
lr = 2e-2
warmup_epochs = 1
ema_decay = 0.9
"""
STEPS_PER_EPOCH = 40
STEPS = 3 * STEPS_PER_EPOCH

SERVER = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
import lsag_cli.app, lsag.training.loop, timm.data, PIL.PngImagePlugin
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        for fd, path in ((1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        import lsag.failpoints
        lsag.failpoints._armed = [point for point in job["env"].get("LSAG_FAILPOINT", "").split(",") if point]
        sys.argv = ["lsag", *job["argv"]]
        try:
            lsag_cli.app.main()
        except SystemExit as exit:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(exit.code or 0)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def make_data(folder: Path) -> Path:
    """640 training and 30 evaluation images of four coloured shapes with noise."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16 * STEPS_PER_EPOCH // 4), ("val", 8)):
        for label in range(4):
            place = folder / split / f"class-{label}"
            place.mkdir(parents=True)
            for index in range(count - (split == "val" and label > 1)):
                pixels = torch.randint(0, 120, (8, 8, 3), generator=generator, dtype=torch.uint8)
                pixels[label : label + 4, label : label + 4, label % 3] += 100
                Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    return folder


class Server:
    """Forks trainings from a process that has torch imported already: a start takes tenths of a second."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(root=str(ROOT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def start(self, argv: list[str], cwd: Path, env: dict[str, str]) -> "Forked":
        assert self.process.stdin
        streams = {"stdout": str(cwd / "stdout"), "stderr": str(cwd / "stderr")}
        print(json.dumps({"argv": argv, "cwd": str(cwd), "env": env, **streams}), file=self.process.stdin, flush=True)
        return Forked(self, int(self._read()), cwd)

    def close(self) -> None:
        # Its children, too: those of a test that failed.
        for process in [*descendants(self.process.pid), self.process.pid]:
            os.kill(process, signal.SIGKILL)
        self.process.wait(30)


class Forked:
    """A training that the server has forked; one at a time."""

    def __init__(self, server: Server, pid: int, cwd: Path) -> None:
        self.server, self.pid, self.cwd = server, pid, cwd

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        stdout = self.server.process.stdout
        if not select.select([stdout], [], [], 120)[0]:
            os.kill(self.pid, signal.SIGKILL)
            self.server._read()
            raise TimeoutError(f"still running after two minutes: {self.stderr}")
        return int(self.server._read())

    @property
    def stderr(self) -> str:
        return (self.cwd / "stderr").read_text()


class Spawned:
    """A training that is started as a user does; several processes if it launches them."""

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str] | None = None) -> None:
        self.errors = cwd / "stderr"
        with (cwd / "stdout").open("w") as out, self.errors.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lsag_cli", *argv],
                cwd=cwd,
                stdout=out,
                stderr=err,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
                start_new_session=True,
            )
        self.pid = self.process.pid

    def wait(self, timeout: float = 180) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            print(self.stderr)
            for process in [self.pid, *descendants(self.pid)]:
                os.kill(process, signal.SIGKILL)
            raise

    @property
    def stderr(self) -> str:
        return self.errors.read_text()

    def ranks(self) -> list[int]:
        """Process numbers of the ranks, once they all run; in the order of their rank."""
        found = {}
        for process in children(self.pid):
            environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            rank = next((int(item[5:]) for item in environment if item.startswith(b"RANK=")), None)
            if rank is not None:
                found[rank] = process
        return [found[rank] for rank in sorted(found)]


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def descendants(parent: int) -> list[int]:
    return [one for child in children(parent) for one in (child, *descendants(child))]


def gone(processes: list[int], within: float) -> bool:
    """Whether none of the processes is left `within` seconds."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(alive(process) for process in processes):
            return True
        time.sleep(0.05)
    return False


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for_step(out: Path, step: int, timeout: float = 120) -> None:
    """Until the log of a run shows that `step` is done."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if steps_logged(out) >= step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{out} did not reach step {step}")


def steps_logged(out: Path) -> int:
    path = out / "steps.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue
    return 0


def result(out: Path) -> dict[str, object]:
    """All that must not depend on how often a run was stopped: each step's loss, the metrics, the final state."""
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    timing = {"images_per_second", "data_wait", "save_share", "seconds"}
    epochs = [
        {key: value for key, value in json.loads(line).items() if key not in timing}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    newest = max(out.glob("step-*.pt"))
    tensors: dict[str, object] = {}

    def flatten(value: object, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                flatten(inner, f"{key}/{name}")
        elif isinstance(value, torch.Tensor):
            tensors[key] = value.numpy().tobytes()
        elif not key.endswith("seconds"):
            tensors[key] = value

    flatten(torch.load(newest), newest.name)
    flatten(torch.load(out / "best.pt"), "best.pt")
    return {"steps": steps, "epochs": epochs, "state": tensors}


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    for name, value in expected.items():
        if found[name] != value:
            if isinstance(value, list):
                theirs = found[name]
                assert isinstance(theirs, list)
                assert len(theirs) == len(value), f"{len(theirs)} rows of {name}, not {len(value)}"
                first = next(i for i, (a, b) in enumerate(zip(theirs, value, strict=True)) if a != b)
                raise AssertionError(f"{name} differ first at {first}: {theirs[first]} against {value[first]}")
            assert isinstance(value, dict)
            other = found[name]
            assert isinstance(other, dict)
            raise AssertionError(f"{name} differs in {[key for key in value if other.get(key) != value[key]][:5]}")
