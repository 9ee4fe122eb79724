"""What only a GPU can show, in six parts. Each ends in time, and writes down every figure as soon as it is known.

    python benchmarks/gpu.py --part 1 --out DIR [--have FILE]        # all parts: benchmarks/README.md
    python benchmarks/gpu.py --report DIR/gpu.jsonl > section.md

A measurement that fails becomes a record with its error. What DIR/gpu.jsonl and the `--have` files hold is not measured
again, so the command that began a part also continues it.
"""

import argparse
import importlib.util
import json
import multiprocessing
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import lsag.inference.export
from lsag import load_preset
from lsag.bench import MATRIX_SIZE, PEERS, Contender, Mode, Turn, make_run, open_contender, take_turns, tensor_memory
from lsag.checkpoint import random_checkpoint
from lsag.config import Recompute
from lsag.device import DTYPES, choose_device, tf32
from lsag.errors import TerminatedError, first_line
from lsag.inference.classifier import Classifier
from lsag.inference.export import export_onnx, made_up_images
from lsag.inference.providers import driver_version
from lsag.inference.session import Session
from lsag.machine import available_cores, processor
from lsag.model.blocks import CHUNK_BYTES, GPU_CHUNK_FACTOR, LocalBlock
from lsag.model.build import count_model, set_recompute
from lsag.presets import preset_paths
from lsag.training.events import Epoch, Finished
from lsag.training.loop import train
from lsag.training.options import TrainOptions

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TABLE_2 = ("cifar-tiny", "in1k-tiny", "in1k-small", "cifar-small", "cifar-base")
SIMILAR = ("in1k-small-release", "cifar-small-release", "cifar-base-release")
"""Large networks that no kernel treats unlike those of Table 2."""
RELEASE_GPUS = 8
"""The release cut its batches over so many."""
PREDICTED_GIB = {
    "cifar-tiny": {"none": 30.2, "local": 14.1, "all": 7.6},
    "in1k-tiny": {"none": 28.7, "local": 18.9, "all": 11.9},
    "in1k-small": {"none": 38.0, "local": 31.7, "all": 12.3},
}
"""Peak memory of a training step in bf16 with the whole batch, by --recompute, as stub libraries count it."""
STOP_SECONDS = 20
"""Time for a training to save its step and stop."""

Figures = dict[str, Any]
Named = Iterable[tuple[str, Figures]]
Change = Callable[[nn.Module], object]
COLUMNS = {
    "images_per_second": ("img/s", "{:,.0f}"),
    "milliseconds": ("ms", "{:,.2f}"),
    "spread": ("spread", "{:.0%}"),
    "share": ("of matmul", "{:.0%}"),
    "gib": ("GiB", "{:,.2f}"),
    "predicted_gib": ("predicted GiB", "{:,.1f}"),
    "logits": ("difference of logits", "{:.1e}"),
    "gradients": ("of gradients", "{:.1e}"),
    "nodes": ("nodes", "{}"),
    "calls": ("calls", "{:,}"),
    "top1": ("top-1", "{:.2%}"),
    "data_wait": ("waiting for data", "{:.0%}"),
    "seconds": ("s", "{:,.0f}"),
    "result": ("result", "{}"),
    "error": ("error", "{}"),
}
"""The figures of records, with their titles and formats in the report."""


@dataclass(frozen=True)
class Task:
    """Something to measure in about `seconds`: `run` gives the figures of the `contenders` that it is passed."""

    what: str
    contenders: Sequence[str]
    run: Callable[[Sequence[str]], Named]
    batch: int | None = None
    dtype: str | None = None
    seconds: float = 30


def one(what: str, contender: str, measured: Callable[[], Figures], **about: Any) -> Task:
    """A task of a single contender."""
    return Task(what, [contender], lambda _: [(contender, measured())], **about)


@dataclass
class Lab:
    """Where, how and until when is measured. `rates` are MACs per second of matrix products, by precision."""

    options: argparse.Namespace
    device: torch.device
    deadline: float
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out, self.quick = self.options.out, self.options.quick

    def presets(self, *names: str) -> Sequence[str]:
        return ["digits-nano"] if self.quick else names

    def measure(self, turns: Sequence[Turn]) -> None:
        take_turns(turns, rounds=1 if self.quick else 10, device=self.device, on_round=lambda done: None)

    def free(self) -> int:
        """Bytes of the GPU's memory that no program holds."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def open(self, spec: str, dtype: str, *, mode: Mode = "inference", change: Change | None = None) -> Contender:
        """A model, changed by `change`."""
        contender = open_contender(spec, mode=mode, device=self.device, precision=dtype)
        if change and contender.model:
            change(contender.model)
        return contender

    def prepare(self, opened: Callable[[], Contender], mode: Mode, batch: int) -> tuple[Contender, Turn, int]:
        """A contender, warmed up, and the bytes that it takes."""
        free = self.free()
        contender = opened()
        turn = Turn(make_run(contender, mode, batch, self.device))
        turn.run()
        memory = tensor_memory(contender, turn.run, mode, self.device)
        return contender, turn, free - self.free() if memory is None else memory

    def compare(
        self,
        what: str,
        contenders: Mapping[str, Callable[[], Contender]],
        batch: int,
        dtype: str,
        *,
        mode: Mode = "inference",
        seconds: float = 30,
        known: Mapping[str, Figures] | None = None,
    ) -> Task:
        """A task whose contenders take turns; what is `known` of a contender is added to its figures."""

        def run(wanted: Sequence[str]) -> Named:
            ready, failures = {}, {}
            for name in wanted:
                try:
                    ready[name] = self.prepare(contenders[name], mode, batch)
                except Exception as error:
                    failures[name] = failed(error)
            yield from failures.items()
            self.measure([turn for _, turn, _ in ready.values()])
            for name, (contender, turn, memory) in ready.items():
                low, median, high = np.quantile(turn.seconds, [0.25, 0.5, 0.75]).tolist()
                macs = contender.macs * batch * (3 if mode == "training" else 1)
                figures = {"images_per_second": batch / median, "milliseconds": 1000 * median, "gib": memory / 2**30}
                figures["spread"] = (high - low) / 2 / median
                figures["share"] = macs / median / self.rates[contender.precision]
                yield name, figures | (known or {}).get(name, {})

        return Task(what, list(contenders), run, batch, dtype, seconds)


def failed(error: Exception) -> Figures:
    return {"error": f"{type(error).__name__}: {first_line(error)[:300]}"}


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((found - expected).norm() / expected.norm())


def correctness(lab: Lab) -> Iterator[Task]:
    """Part 1."""
    yield one("tests", "pytest -m gpu", partial(run_tests, lab), seconds=180)
    for dtype in ("bf16", "fp16", "fp32"):
        yield one("a whole training", "digits-nano", partial(train_digits, lab, dtype), dtype=dtype, seconds=45)
    names = [name for name in preset_paths() if name not in SIMILAR]
    for name, dtype in product(lab.presets(*names), ("fp64", "fp32", "tf32", "bf16", "fp16")):
        measured = partial(deviations, name, lab.device, dtype)
        yield one("compared with the CPU in fp64", name, measured, batch=2, dtype=dtype, seconds=20)


def run_tests(lab: Lab) -> Figures:
    """The summary of `pytest -m gpu`, and the tests that failed."""
    processes = "0" if lab.quick else "4"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", processes, "-rfE", "tests/test_gpu.py"]
    limit = max(1, lab.deadline - time.monotonic())
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit).stdout.splitlines()
    return {"result": "; ".join([*(line for line in lines if line.startswith(("FAILED", "ERROR"))), *lines[-1:]])}


def train_digits(lab: Lab, dtype: Any) -> Figures:
    narrow = {"model.stages": 2 * [{"embed_dim": 8, "depth": 1, "num_heads": 1}], "train.epochs": 1}
    options = TrainOptions(
        data_dir=lab.out, out=lab.out / f"digits-{dtype}", device=str(lab.device), precision=dtype, resume=True
    )
    *_, end = train(load_preset("digits-nano", narrow if lab.quick else {}), options)
    assert isinstance(end, Finished)
    return {"top1": end.last_top1, "seconds": end.seconds}


def deviations(spec: str, device: torch.device, dtype: str) -> Figures:
    """How far the logits of two images on `device`, and in fp64 the gradients, are from the CPU's in fp64.

    Gradients in fp32 are no test: where two values nearly tie, max pooling passes them to the one or the other.
    """
    expected, gradient = step_on_cpu(spec)
    logits, found = step_of_two(spec, device, dtype)
    of_gradients = {"gradients": relative(found, gradient)} if dtype == "fp64" else {}
    return {"logits": relative(logits, expected), **of_gradients}


def step_of_two(spec: str, device: torch.device, dtype: str) -> tuple[Tensor, Tensor]:
    """The logits of two images on `device`, and the gradients of all parameters in a row."""
    contender = open_contender(spec, device=CPU)
    model: Any = contender.model
    images = torch.randn(2, *contender.shape, generator=torch.Generator().manual_seed(0))
    kind = DTYPES.get(dtype, torch.float64)
    with tf32(dtype == "tf32"):
        logits = model.to(device, kind)(images.to(device, kind)).double()
        F.cross_entropy(logits, torch.arange(2, device=device)).backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return logits.detach().cpu(), torch.cat(gradients).cpu()


@lru_cache(maxsize=1)
def step_on_cpu(spec: str) -> tuple[Tensor, Tensor]:
    return step_of_two(spec, CPU, "fp64")


def onnxruntime(lab: Lab) -> Iterator[Task]:
    """Part 2. A graph is a preset, an opset, a precision and a fixed batch size or None."""
    presets, cuda, batches = lab.presets(*TABLE_2[:3]), lab.device.type == "cuda", [2] if lab.quick else [64, 1, 8, 256]
    graphs: list[Any] = list(product(presets, (23, 20), ("fp32", "fp16"), (None,)))
    fixed = list(product(presets, (23,), ("fp32", "fp16"), batches[:2])) if cuda else []  # as a CUDA graph needs
    pool = ProcessPoolExecutor(available_cores(), multiprocessing.get_context("spawn"))
    files = {graph: pool.submit(export, lab.out, *graph) for graph in [*graphs, *fixed]}

    def contender(*graph: Any, **options: Any) -> Contender:
        path = str(files[graph].result())
        opened = open_contender(path, device=lab.device)
        if not options:
            return opened
        session = Session(path, provider=lab.device.type, **options)
        return replace(opened, classify=session, precision=session.precision)

    try:
        for name, opset, dtype, _ in graphs:
            for options in [{}, {"precision": "tf32"}] if cuda and dtype == "fp32" else [{}]:
                measured = partial(parity, lab, partial(contender, name, opset, dtype, None, **options))
                about = {"batch": 8, "dtype": options.get("precision", dtype), "seconds": 60}
                yield one("graphs compared with PyTorch in fp32", f"{name}, opset {opset}", measured, **about)
        for batch, name, dtype in product(batches, presets, ("fp32", "fp16")):
            contenders = {"PyTorch": partial(lab.open, name, dtype)}
            contenders["opset 23"] = partial(contender, name, 23, dtype, None)
            if (name, 23, dtype, batch) in fixed:
                contenders["opset 23, CUDA graph"] = partial(contender, name, 23, dtype, batch, cuda_graph=True)
            if cuda and dtype == "fp32":
                contenders["opset 23, tf32"] = partial(contender, name, 23, dtype, None, precision="tf32")
            contenders["opset 20"] = partial(contender, name, 20, dtype, None)  # last, as it needs the most memory
            yield lab.compare(f"graphs of {name} in onnxruntime", contenders, batch, dtype, seconds=40)
    finally:
        pool.shutdown(cancel_futures=True)


def export(folder: Path, name: str, opset: Any, dtype: str, batch: int | None) -> Path:
    """The graph of a preset with random weights, verified with one image; in a process of its own."""
    path = folder / f"{name}-{opset}-{dtype}-{batch or 'any'}.onnx"
    if not path.exists():
        torch.set_num_threads(1)
        lsag.inference.export.CHECKED_BATCHES = (1,)  # type: ignore[assignment]
        export_onnx(random_checkpoint(load_preset(name)), path, opset=opset, half=dtype == "fp16", batch=batch)
    return path


def parity(lab: Lab, opened: Callable[[], Contender]) -> Figures:
    """How far a graph's logits are from PyTorch's in fp32 on the same device, and which provider runs its nodes."""
    graph: Any = opened().classify
    checkpoint = random_checkpoint(graph.preset)
    images = made_up_images(8, checkpoint)
    expected = Classifier(checkpoint, device=lab.device, precision="fp32")(images).cpu()
    nodes = ", ".join(f"{count} {name}" for name, count in graph.nodes_by_provider().items())
    return {"logits": relative(graph(images), expected), "nodes": nodes}


def inference(lab: Lab) -> Iterator[Task]:
    """Part 3. Compilation takes minutes, and comes last."""
    ours = lab.presets(*TABLE_2)
    groups = [("inference", [name, f"plain:{name}"]) for name in ours]
    if not lab.quick:
        groups += [(f"inference: {group}", list(peers)) for group, peers in PEERS.items()]
    kinds = list(product([2] if lab.quick else [64, 1, 256], ("bf16", "fp32")))
    cases = list(product(kinds, groups))
    if not lab.quick:
        cases += product(kinds, [("compiled inference", [name, f"compiled:{name}"]) for name in ours])
    for (batch, dtype), (what, specs) in cases:
        contenders = {spec: partial(lab.open, spec, dtype) for spec in specs}
        yield lab.compare(what, contenders, batch, dtype, seconds=30 if what == "inference" else 90)


def training(lab: Lab) -> Iterator[Task]:
    """Part 4. Compilation takes minutes, and comes last."""
    compiling = [False] if lab.quick else [False, True]
    for compiled, parts, name in product(compiling, (1, RELEASE_GPUS), lab.presets(*TABLE_2[:3])):
        batch = (16 if lab.quick else load_preset(name).train.batch_size) // parts
        opened = partial(lab.open, dtype="bf16", mode="training")
        contenders, known = {}, {}
        if compiled:
            contenders["compiled"] = partial(opened, f"compiled:{name}")
        else:
            for which in get_args(Recompute):
                label, change = f"recompute {which}", partial(set_recompute, recompute=which)
                contenders[label] = partial(opened, name, change=change)
                if parts == 1 and not lab.quick:
                    known[label] = {"predicted_gib": PREDICTED_GIB[name][which]}
            contenders["plain"] = partial(opened, f"plain:{name}")
        what = f"training steps: {name}"
        yield lab.compare(what, contenders, batch, "bf16", mode="training", seconds=90, known=known)


def whole_training(lab: Lab) -> Iterator[Task]:
    """Part 5."""
    if lab.options.data_dir is None:
        raise SystemExit("part 5 needs --data-dir, a folder with train/CLASS/* and test/CLASS/*")
    for name in lab.presets("cifar-tiny"):
        yield Task("training", [name], partial(train_on_folder, lab, name), seconds=60)


def train_on_folder(lab: Lab, name: str, _: object) -> Named:
    """The epochs that fit into the time, and at the end of all of them the whole; a run is resumed."""
    folder = lab.options.run_folder or lab.out / name
    changes: dict[str, Any] = {"train.epochs": 2, "train.batch_size": 2} if lab.quick else {}
    if lab.options.epochs:
        changes = {"train.epochs": lab.options.epochs, "train.warmup_epochs": min(2, lab.options.epochs - 1)}
    preset = load_preset(name, changes, dataset="folder")
    workers = 0 if lab.quick else available_cores()
    options = TrainOptions(
        data_dir=lab.options.data_dir, out=folder, device=str(lab.device), workers=workers, resume=True
    )
    rate = lab.rates["bf16" if lab.device.type == "cuda" else "fp32"]
    try:
        for event in train(preset, options):
            if isinstance(event, Finished):
                yield name, {"top1": event.last_top1, "seconds": event.seconds}
                return
            if isinstance(event, Epoch):
                figures = {key: getattr(event, key) for key in ("images_per_second", "data_wait", "top1", "seconds")}
                share = event.images_per_second * 3 * count_model(preset.model).macs_run / rate
                yield f"epoch {event.epoch}", figures | {"share": share}
            if time.monotonic() > lab.deadline - STOP_SECONDS:
                signal.raise_signal(signal.SIGTERM)
    except TerminatedError:
        print(f"to be resumed with --run-folder {folder}: {max(folder.glob('step-*.pt'))}")


def guesses(lab: Lab) -> Iterator[Task]:
    """Part 6."""
    changes: dict[str, Change] = {"no chunks": partial(set_local, "chunk_bytes", None)}
    for factor in (8, GPU_CHUNK_FACTOR, 512):
        size = CHUNK_BYTES * factor // GPU_CHUNK_FACTOR
        changes[f"chunk factor {factor}"] = partial(set_local, "chunk_bytes", size)
    for kind in ("FLASH", "CUDNN", "EFFICIENT"):
        changes[f"{kind.lower()} attention"] = partial(attend_with, SDPBackend.__members__[f"{kind}_ATTENTION"])
    cases = list(product([2] if lab.quick else [256, 64], lab.presets(*TABLE_2[:3])))
    for batch, name in cases:
        contenders = {label: partial(lab.open, name, "bf16", change=change) for label, change in changes.items()}
        yield lab.compare(f"chunks and attention in {name}", contenders, batch, "bf16", seconds=60)
    for batch, name in cases:
        run = partial(profile_local_block, lab, name, batch)
        yield Task(f"kernels of the local block of {name}", ["all"], run, batch, "bf16")


def set_local(name: str, value: object, model: nn.Module) -> None:
    """Set an attribute of the local block."""
    for block in model.modules():
        if isinstance(block, LocalBlock):
            setattr(block, name, value)


def attend_with(backend: SDPBackend, model: nn.Module) -> None:
    model.forward = sdpa_kernel(backend)(model.forward)


def profile_local_block(lab: Lab, name: str, batch: int, _: object) -> Named:
    """The kernels that take most of the local block's time in inference."""
    opened = lab.open(name, "bf16")
    model: Any = opened.model
    stage, images = model.stages[0], torch.randn(batch, *opened.shape, device=lab.device, dtype=opened.dtype)

    @torch.inference_mode()
    def run() -> None:
        stage.blocks[0](images, model.embed, stage.norm1, stage.norm2)
        if lab.device.type == "cuda":
            torch.cuda.synchronize()

    turn = Turn(run)
    lab.measure([turn])
    yield "all", {"milliseconds": 1000 * float(np.median(turn.seconds))}
    with profile(activities=[getattr(ProfilerActivity, lab.device.type.upper())]) as profiled:
        run()
    own = f"self_{'device' if lab.device.type == 'cuda' else 'cpu'}_time_total"
    for event in sorted(profiled.key_averages(), key=lambda event: -getattr(event, own))[:15]:
        yield event.key[:100], {"milliseconds": getattr(event, own) / 1000, "calls": event.count}


PARTS = {1: correctness, 2: onnxruntime, 3: inference, 4: training, 5: whole_training, 6: guesses}


def machine(lab: Lab) -> Figures:
    """What a part runs on, with the machine's own rates, which also go to `lab`."""
    side, size = (128, 2**20) if lab.quick else (MATRIX_SIZE[lab.device.type], 2**30)
    turns = {}
    for name, dtype in DTYPES.items():
        matrices = torch.randn(2, side, side, device=lab.device, dtype=dtype)
        turns[name] = Turn(tf32(name == "tf32")(partial(torch.matmul, *matrices)))
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=lab.device)
    copying = Turn(partial(target.copy_, source))
    lab.measure([*turns.values(), copying])
    lab.rates = {name: side**3 / float(np.median(turn.seconds)) for name, turn in turns.items()}
    runtime = importlib.import_module("onnxruntime") if importlib.util.find_spec("onnxruntime") else None
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "device": torch.cuda.get_device_name(lab.device) if lab.device.type == "cuda" else processor(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.strip() or None,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": getattr(runtime, "__version__", None),
        **{f"TFLOP/s in {name}": round(2 * rate / 1e12, 3) for name, rate in lab.rates.items()},
        "GB/s of copies": round(2 * size / float(np.median(copying.seconds)) / 1e9),
    }


def carry_out(tasks: Iterator[Task], lab: Lab, have: set[Any], write: Callable[[Figures], None]) -> None:
    """Measure what nobody has as long as there is time, and say what is left."""
    for task in tasks:
        about = {"part": lab.options.part, "what": task.what, "batch": task.batch, "dtype": task.dtype}
        wanted = [name for name in task.contenders if key({**about, "contender": name}) not in have]
        if not wanted:
            continue
        if time.monotonic() + task.seconds > lab.deadline:
            for left in (task, *tasks):
                print(f"left: {left.what}, batch {left.batch}, {left.dtype}: {', '.join(left.contenders)}")
            return
        missing = dict.fromkeys(wanted)
        try:
            for name, figures in task.run(wanted):
                missing.pop(name, None)
                write({**about, "contender": name, **figures})
        except Exception as error:
            for name in missing:
                write({**about, "contender": name, **failed(error)})
        if lab.device.type == "cuda":
            torch.cuda.synchronize()  # an error that lasts ends the part here, before it is blamed on others


def key(record: Figures) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("part", "what", "contender", "batch", "dtype"))


def read(paths: Iterable[Path]) -> list[Figures]:
    """The records in files. An empty line is none, nor is one that was cut off."""
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def report(paths: Iterable[Path]) -> str:
    """The section "On a GPU" of docs/benchmarks.md."""
    lines = ["## On a GPU", "", "    python benchmarks/gpu.py --part N --out DIR", ""]
    tables: dict[str, dict[Any, Figures]] = {}
    for record in sorted(read(paths), key=lambda record: record["part"]):
        if "machine" in record:
            facts = ", ".join(f"{name} {fact}" for name, fact in record["machine"].items())
            lines.append(f"- part {record['part']}: {facts}")
        else:
            tables.setdefault(record["what"], {})[key(record)] = record
    lines += ["", 'A difference is the norm of the difference over the norm; "of matmul" as in the tables above.']
    for what, records in tables.items():
        columns = [name for name in COLUMNS if any(row.get(name) is not None for row in records.values())]
        lines += ["", f"### {what[0].upper()}{what[1:]}", ""]
        lines.append("| | batch | type | " + " | ".join(COLUMNS[name][0] for name in columns) + " |")
        lines.append("|---" * (3 + len(columns)) + "|")
        for row in records.values():
            cells = ["" if row.get(name) is None else COLUMNS[name][1].format(row[name]) for name in columns]
            lines.append(f"| {' | '.join([row['contender'], str(row['batch'] or ''), row['dtype'] or '', *cells])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS)
    parser.add_argument("--minutes", type=float, default=8.5, help="how long the part may take")
    parser.add_argument("--out", type=Path, help="folder of gpu.jsonl, and of the graphs and runs that are made")
    parser.add_argument("--have", type=Path, nargs="+", default=[], help="records of earlier calls")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10 in class folders, for part 5")
    parser.add_argument("--run-folder", type=Path, help="run of part 5, resumed if there is one (default: in --out)")
    parser.add_argument("--epochs", type=int, help="shorten the training of part 5, with 2 epochs of warm-up")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="one round of a small model, to try the script")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="print records as Markdown, and end")
    options = parser.parse_args(arguments)
    if options.report:
        print(report(options.report))
        return
    if options.part is None or options.out is None:
        parser.error("give --part and --out, or --report")
    options.out.mkdir(parents=True, exist_ok=True)
    lab = Lab(options, choose_device(options.device), started + 60 * options.minutes)
    path = options.out / "gpu.jsonl"
    path.touch()
    have = {key(record) for record in read([path, *options.have])}
    with path.open("a") as file:
        print(file=file)  # ends a line that was cut off

        def write(record: Figures) -> None:
            line = json.dumps(record)
            print(line, file=file, flush=True)
            print(line, flush=True)

        write({"part": options.part, "machine": machine(lab)})
        carry_out(PARTS[options.part](lab), lab, have, write)


if __name__ == "__main__":
    main()
