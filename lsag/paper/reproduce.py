"""The paper's tables, run again: the trainings of their rows, and a report beside the paper's figures.

Nothing here imports torch: each training is a process of its own, and what is done is not done again.
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
    """One training of a row, in `folder`, and how it ended: with an accuracy, an error, or not yet.

    `top1` (0..1) is that of the last epoch; the best epoch would be chosen on the images that measure it.
    """

    row: str
    preset: Preset
    folder: Path
    top1: float | None = None
    seconds: float | None = None
    error: str = ""

    @property
    def log(self) -> Path:
        """What `lsag train` said."""
        return self.folder.with_suffix(".log")

    def looked_up(self) -> "Run":
        """This run with its accuracy, if it is complete. OutputError if its folder holds a run with other settings.

        InputError if its log is damaged.
        """
        given, log = self.folder / PRESET, self.folder / METRICS
        if not given.is_file():
            return self
        different = [key for key in changed_keys(load_preset(given), self.preset) if key != "model.num_classes"]
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
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{log} is damaged", f"remove {self.folder} to train it again") from error
        return replace(self, top1=top1, seconds=seconds)


def plan(
    rows: Sequence[Row], *, scale: Scale, seeds: int, out: Path, dataset: str | None, overrides: dict[str, Any]
) -> list[Run]:
    """The runs of `rows` with seeds 0, 1, ...; those that are complete in `out` with their accuracy.

    All rows with one seed come before the next seed: a table that is stopped has as many of each. The errors of
    `Run.looked_up`.
    """
    runs = []
    for seed, row in itertools.product(range(seeds), rows):
        preset = row.at(scale, dataset=dataset, overrides={**overrides, "train.seed": seed})
        if preset is None:
            continue
        runs.append(Run(row.name, preset, out / preset.name / f"seed-{seed}").looked_up())
    return runs


def execute(
    runs: Sequence[Run], *, command: Sequence[str], devices: Sequence[str | None], threads: int | None = None
) -> Generator[Run, None, None]:
    """Do the runs that are not complete, one at a time on each of `devices`; yields each as it ends.

    `command` is that of `lsag train`, to which preset and folder are added. A device is a GPU's number, or None for
    what the command chooses; `threads` limits those of each training. A run that was begun is resumed. When this is
    left early, the trainings are told to stop, and waited for while they save.
    """
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for device in devices:
        free.put(device)
    lock, stopping, processes = threading.Lock(), False, set[subprocess.Popen[bytes]]()

    def start(run: Run, device: str | None) -> "subprocess.Popen[bytes] | None":
        given = run.folder.with_suffix(".json")
        with writing(given):
            given.parent.mkdir(parents=True, exist_ok=True)
        with replacing(given) as file:
            file.write(run.preset.model_dump_json(indent=2).encode())
        environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        words = [*command, "--preset", str(given), "--out", str(run.folder), "--resume"]
        with lock, writing(run.log), run.log.open("ab") as log:
            if stopping:
                return None
            # In a session of its own: Ctrl-C reaches this process alone, which then stops its trainings once.
            process = subprocess.Popen(
                words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
            processes.add(process)
            return process

    def execute_one(run: Run) -> Run:
        device = free.get()
        try:
            before = run.log.stat().st_size if run.log.is_file() else 0
            process = start(run, device)
            if process is None:
                return run
            code = process.wait()
            with lock:
                processes.discard(process)
            done = run.looked_up()
            if code == 0 and done.top1 is not None:
                return done
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            said = run.log.read_bytes()[before:].decode(errors="replace").splitlines()
            errors = [line.partition("error: ")[2] for line in said if line.startswith("lsag: error: ")]
            return replace(run, error=errors[-1] if errors else f"lsag train {how}; see {run.log}")
        except LsagError as error:
            return replace(run, error=error.what)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        waiting = [pool.submit(execute_one, run) for run in runs if run.top1 is None]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            with lock:
                stopping = True
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            for future in waiting:
                future.cancel()


@dataclass(frozen=True)
class Summary:
    """A row of a report: what was measured, in percent, beside what the paper prints; None where there is neither."""

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
        """The sample's standard deviation over the seeds."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


def summarise(
    rows: Sequence[Row], runs: Sequence[Run], *, count: Callable[[Preset], Count], paper_dataset: str
) -> list[Summary]:
    """One line for each of `rows` that has runs, beside what the paper prints for `paper_dataset`.

    `count` counts a preset's network.
    """
    summaries = []
    for row in rows:
        own = [run for run in runs if run.row == row.name]
        if not own:
            continue
        params_m, _, printed = row.printed()
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
                paper_top1=printed.get(paper_dataset),
                minutes=statistics.fmean(seconds) / 60 if seconds else None,
                errors=tuple(run.error for run in own if run.error),
            )
        )
    return summaries


def markdown(summaries: Sequence[Summary], *, title: str, about: str) -> str:
    """The report as a table. Differences are to the last row, which is the whole method in the paper's tables."""
    last = summaries[-1]
    lines = [
        f"## {title}",
        "",
        about,
        "",
        "| row | preset | parameters | the paper's | MACs | top-1 (%) | seeds | to the last "
        "| the paper's | to its last |",
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
    return "\n".join([*lines, *(["", "Not done:", "", *failed] if failed else []), ""])


def _difference(value: float | None, of: float | None) -> str:
    return f"{value - of:+.2f}" if value is not None and of is not None else "-"
