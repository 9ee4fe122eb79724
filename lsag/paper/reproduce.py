"""The paper's tables, run again: the trainings of their rows, and a report next to the paper's figures.

Nothing here imports torch: each training is its own process. Finished runs are skipped.
"""

import itertools
import json
import math
import os
import queue
import signal
import statistics
import subprocess
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lsag.config import Preset, changed_keys
from lsag.errors import InputError, LsagError, OutputError
from lsag.files import replacing, writing
from lsag.model.flops import Count
from lsag.paper.tables import Row, Scale
from lsag.presets import load_preset
from lsag.runs import METRICS, PRESET


@dataclass(frozen=True)
class Run:
    """One training of a row, in `folder`, and its result: an accuracy, an error, or neither yet.

    `top1` (0..1) is that of the last epoch: the best epoch would be chosen on the very images that measure it.
    """

    row: str
    preset: Preset
    folder: Path
    top1: float | None = None
    seconds: float | None = None
    error: str = ""

    @property
    def log(self) -> Path:
        """The output of `lsag train`."""
        return self.folder.with_suffix(".log")

    def with_result(self) -> "Run":
        """This run with its accuracy and time, if it is complete.

        OutputError if its folder contains a run with other settings, InputError if its log is damaged.
        """
        preset, log = self.folder / PRESET, self.folder / METRICS
        if not preset.is_file():
            return self
        different = [key for key in changed_keys(load_preset(preset), self.preset) if key != "model.num_classes"]
        if different:
            raise OutputError(f"{self.folder} is a run with another {', '.join(different[:3])}", "choose another --out")
        if not log.is_file():
            return self
        try:
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            if not rows or rows[-1]["epoch"] != self.preset.train.epochs:
                return self
            top1, seconds = float(rows[-1]["top1"]), float(rows[-1]["seconds"])
            if not (0 <= top1 <= 1 and 0 <= seconds < math.inf):
                raise ValueError
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{log} is damaged", f"remove {self.folder} to train it again") from error
        return replace(self, top1=top1, seconds=seconds)


def plan(
    rows: Sequence[Row], *, scale: Scale, seeds: int, out: Path, dataset: str | None, overrides: dict[str, Any]
) -> list[Run]:
    """The runs of `rows` with seeds 0, 1, ...; those that are complete in `out` have their accuracy.

    All rows with one seed come before the next seed, so that an interrupted table has the same seeds for each row.
    Raises the errors of `Run.with_result`.
    """
    runs = []
    for seed, row in itertools.product(range(seeds), rows):
        preset = row.at(scale, dataset=dataset, overrides={**overrides, "train.seed": seed})
        if preset is not None:
            runs.append(Run(row.name, preset, out / preset.name / f"seed-{seed}").with_result())
    return runs


def execute(
    runs: Sequence[Run], *, command: Sequence[str], devices: Sequence[str | None], threads: int | None = None
) -> Generator[Run, None, None]:
    """Train the runs that are not complete, one at a time on each of `devices`, and yield each as it ends.

    `command` is an `lsag train`, to which preset and folder are added. A device is the number of a GPU, or None to let
    the command choose; `threads` limits those of each training. A run that was interrupted is resumed. Closing the
    generator stops the trainings and waits until they have saved.
    """
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for device in devices:
        free.put(device)
    trainings = _Trainings(command, threads)

    def train(run: Run) -> Run:
        device = free.get()
        try:
            return trainings.train(run, device)
        except LsagError as error:
            return replace(run, error=error.what)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        waiting = [pool.submit(train, run) for run in runs if run.top1 is None]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            trainings.stop()
            for future in waiting:
                future.cancel()


class _Trainings:
    """The processes of trainings that several threads start and wait for, and that one of them may stop."""

    def __init__(self, command: Sequence[str], threads: int | None) -> None:
        self.command, self.threads = command, threads
        self.lock, self.stopped, self.processes = threading.Lock(), False, set[subprocess.Popen[bytes]]()

    def train(self, run: Run, device: str | None) -> Run:
        """The run with its result or its error; as it was if the trainings are stopped."""
        log_bytes = run.log.stat().st_size if run.log.is_file() else 0
        process = self._start(run, device)
        if process is None:
            return run
        code = process.wait()
        with self.lock:
            self.processes.discard(process)
        ended = run.with_result()
        if code == 0 and ended.top1 is not None:
            return ended
        lines = run.log.read_bytes()[log_bytes:].decode(errors="replace").splitlines()
        errors = [line.partition("error: ")[2] for line in lines if line.startswith("lsag: error: ")]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return replace(run, error=errors[-1] if errors else f"lsag train {how}; see {run.log}")

    def _start(self, run: Run, device: str | None) -> "subprocess.Popen[bytes] | None":
        preset = run.folder.with_suffix(".json")
        with writing(preset):
            preset.parent.mkdir(parents=True, exist_ok=True)
        with replacing(preset) as file:
            file.write(run.preset.model_dump_json(indent=2).encode())
        environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        environment |= {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        command = [*self.command, "--preset", str(preset), "--out", str(run.folder), "--resume"]
        with self.lock, writing(run.log), run.log.open("ab") as log:
            if self.stopped:
                return None
            # In its own session, so that Ctrl-C reaches only this process, which then stops each training once.
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
            self.processes.add(process)
            return process

    def stop(self) -> None:
        """Tell the trainings to save and end; no more are started."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.send_signal(signal.SIGTERM)


@dataclass(frozen=True)
class Summary:
    """A row of a report: the measured top-1 in percent next to the paper's figures; None where there is no figure."""

    name: str
    preset: str
    params: int
    macs: int
    paper_params_m: float | None
    top1: tuple[float, ...]
    paper_top1: float | None
    minutes: float | None
    errors: tuple[str, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.top1) if self.top1 else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over the seeds."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


def summarise(
    rows: Sequence[Row], runs: Sequence[Run], *, count: Callable[[Preset], Count], paper_dataset: str
) -> list[Summary]:
    """One line for each of `rows` that has runs, with the paper's figures for `paper_dataset`.

    `count` counts the network of a preset.
    """
    summaries = []
    for row in rows:
        own = [run for run in runs if run.row == row.name]
        if not own:
            continue
        params_m, _, paper_top1 = row.printed()
        total = count(own[0].preset)
        seconds = [run.seconds for run in own if run.seconds is not None]
        summaries.append(
            Summary(
                name=row.name,
                preset=own[0].preset.name,
                params=total.params,
                macs=total.macs,
                paper_params_m=params_m,
                top1=tuple(100 * run.top1 for run in own if run.top1 is not None),
                paper_top1=paper_top1.get(paper_dataset),
                minutes=statistics.fmean(seconds) / 60 if seconds else None,
                errors=tuple(run.error for run in own if run.error),
            )
        )
    return summaries


def markdown(summaries: Sequence[Summary], *, title: str, about: str) -> str:
    """The report as a Markdown table. Differences are to the last row, in the paper's tables the whole method."""
    last = summaries[-1]
    lines = [
        f"## {title}",
        "",
        about,
        "",
        "| row | preset | parameters | paper's | MACs | top-1 (%) | seeds | minus last row "
        "| paper's top-1 | minus last row |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in summaries:
        spread = f" ± {item.deviation:.2f}" if item.deviation is not None else ""
        cells = [
            item.name,
            item.preset,
            f"{item.params / 1e6:.2f} M",
            f"{item.paper_params_m} M" if item.paper_params_m else "-",
            f"{item.macs / 1e9:.3f} G",
            f"{item.mean:.2f}{spread}" if item.mean is not None else "-",
            str(len(item.top1)),
            _difference(item.mean, last.mean),
            f"{item.paper_top1:.2f}" if item.paper_top1 else "-",
            _difference(item.paper_top1, last.paper_top1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"- {item.name}: {error}" for item in summaries for error in item.errors]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else []), ""])


def _difference(value: float | None, of: float | None) -> str:
    return f"{value - of:+.2f}" if value is not None and of is not None else "-"
