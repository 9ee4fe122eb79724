"""Models measured side by side: warmed up, taking turns in one process; medians with their spread."""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lsag.checkpoint import load_checkpoint, random_checkpoint
from lsag.config import Precision, Preset, Recompute, TimmConfig, parse_spec
from lsag.device import DTYPES, autocast, choose_device, choose_precision, peak_memory, tf32
from lsag.errors import UsageError
from lsag.inference.session import Session
from lsag.model.build import (
    build_model,
    count_macs,
    count_model,
    freeze,
    image_shape,
    set_recompute,
    timm_model,
)
from lsag.model.cpu import linear
from lsag.model.network import LSAG
from lsag.paper.released import as_released
from lsag.paper.tables import TABLES
from lsag.presets import load_preset

MIN_SECONDS = 0.05
"""A turn repeats its run for about this long, so that neither the clock nor kernel launches dominate."""
LATENCY_REPEATS = 3
"""Measurements of one image in a round, for each of a batch."""
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}
"""Rows and columns of the square matrices whose product shows what the machine can do."""

PEERS: dict[str, dict[str, float | None]] = {
    group: {
        f"timm:{row.timm}{arguments}" if row.timm else row.preset: row.printed()[1] for row in reversed(TABLES[table])
    }
    for group, table, arguments in (
        ("CIFAR (Table 3)", 3, ",img_size=32,num_classes=10"),
        ("ImageNet (Table 4)", 4, ""),
    )
}
"""Contenders and the images per second that the paper prints for them, on its GPU. lsag's come first."""

Mode = Literal["inference", "training"]


@dataclass(frozen=True)
class Result:
    """What was measured of one contender; None where it cannot be known.

    `macs` are those of a forward pass of one image; a training step counts three times as many. Latencies are the
    seconds of a batch of one image. `peak_memory` is in bytes of tensors, parameters and optimizer included. `spread`
    is half the distance of the quartiles over the median, `share` the share of the rate of matrix products in the same
    `precision`, `ratio` the images per second over the first contender's.
    """

    name: str
    precision: str
    params: int
    macs: int
    images_per_second: float
    spread: float
    ratio: float
    latency_p50: float | None
    latency_p90: float | None
    peak_memory: int | None
    macs_per_second: float
    share: float


@dataclass(frozen=True)
class Bench:
    """The results, and for each precision the MACs per second of matrix products, measured between them."""

    results: list[Result]
    matrix_rates: dict[str, float]
    device: str
    threads: int


@dataclass(frozen=True)
class Contender:
    """A model in `precision`; `classify` takes images of `shape` (C, height, width). `model` is None for a graph."""

    name: str
    precision: str
    shape: tuple[int, int, int]
    params: int
    macs: int
    classify: Callable[[Tensor], Any]
    model: nn.Module | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def prefixes(self) -> list[str]:
        """What stands before colons in its name, such as "plain"."""
        return self.name.split(":")[:-1]


@dataclass(frozen=True)
class Turn:
    """What is measured `repeats` times in each round, and the seconds of each measurement."""

    run: Callable[[], object]
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)


def bench(
    specs: Sequence[str],
    *,
    mode: Mode = "inference",
    batch_size: int = 8,
    device: str = "auto",
    precision: Precision = "auto",
    compile: bool = False,
    recompute: Recompute = "none",
    threads: int | None = None,
    keep_memory: bool = True,
    rounds: int = 10,
    on_round: Callable[[int], object] = lambda done: None,
) -> Bench:
    """Measure each of `specs` (see `open_contender`), `rounds` times in turn, on made-up images.

    Inference is a forward pass as the product runs it, with the batch already on the device; training is forward,
    cross-entropy, backward and an AdamW step, with `recompute` as in lsag.train for lsag's own models. `precision` is
    that of models and of graphs in OpenVINO; another graph has the one that it was exported with. `keep_memory` is that
    of `choose_device`, for all contenders alike. `on_round` is called with the number of rounds done.
    UsageError for what cannot be measured in this way.
    """
    used = choose_device(device, keep_memory=keep_memory)
    if threads:
        torch.set_num_threads(threads)
    contenders = [open_contender(spec, mode=mode, device=used, precision=precision, threads=threads) for spec in specs]
    _set_up(contenders, precision=precision, compile=compile, recompute=recompute)
    batches = [Turn(make_run(contender, mode, batch_size, used)) for contender in contenders]
    singles = [
        Turn(make_run(contender, mode, 1, used), LATENCY_REPEATS)
        if mode == "inference" and getattr(contender.classify, "batch", None) in (None, 1)  # a graph's may be fixed
        else None
        for contender in contenders
    ]
    side = MATRIX_SIZE[used.type]
    products = {}
    for name in dict.fromkeys(contender.precision for contender in contenders):
        matrices = torch.randn(2, side, side, device=used, dtype=DTYPES[name])
        products[name] = Turn(torch.inference_mode()(tf32(name == "tf32")(partial(linear, *matrices))))
    memory = [tensor_memory(each, turn.run, mode, used) for each, turn in zip(contenders, batches, strict=True)]
    take_turns([*batches, *filter(None, singles), *products.values()], rounds=rounds, device=used, on_round=on_round)

    matrix_rates = {name: side**3 / float(np.median(product.seconds)) for name, product in products.items()}
    first_rate = batch_size / float(np.quantile(batches[0].seconds, 0.5))
    results = []
    for contender, batch, single, num_bytes in zip(contenders, batches, singles, memory, strict=True):
        low, median, high = np.quantile(batch.seconds, [0.25, 0.5, 0.75]).tolist()
        p50, p90 = np.quantile(single.seconds, [0.5, 0.9]).tolist() if single else (None, None)
        rate = batch_size / median
        macs_rate = rate * contender.macs * (3 if mode == "training" else 1)
        results.append(
            Result(
                name=contender.name,
                precision=contender.precision,
                params=contender.params,
                macs=contender.macs,
                images_per_second=rate,
                spread=(high - low) / 2 / median,
                ratio=rate / first_rate,
                latency_p50=p50,
                latency_p90=p90,
                peak_memory=num_bytes,
                macs_per_second=macs_rate,
                share=macs_rate / matrix_rates[contender.precision],
            )
        )
    return Bench(results, matrix_rates, str(used), torch.get_num_threads())


def _set_up(contenders: Sequence[Contender], *, precision: str, compile: bool, recompute: Recompute) -> None:
    """Compile all models, and let lsag's own recompute."""
    if precision != "auto" and not any(each.model or "openvino" in each.prefixes for each in contenders):
        raise UsageError("a graph has the precision it was exported with", "remove --precision")
    if compile and all(contender.model is None for contender in contenders):
        raise UsageError("there is nothing to compile: .onnx graphs run in other runtimes", "remove --compile")
    for contender in contenders:
        if compile and contender.model is not None:
            contender.model.compile()
        if isinstance(contender.model, LSAG) and "plain" not in contender.prefixes:
            set_recompute(contender.model, recompute)


def take_turns(turns: Sequence[Turn], *, rounds: int, device: torch.device, on_round: Callable[[int], object]) -> None:
    """Warm up, then measure all turns in each round, so that a slow minute of the machine is slow for all of them."""
    for turn in turns:
        turn.run()
    times = [max(1, round(MIN_SECONDS / seconds(turn.run, 1, device))) for turn in turns]
    for done in range(rounds):
        on_round(done)
        for turn, often in zip(turns, times, strict=True):
            turn.seconds.extend(seconds(turn.run, often, device) for _ in range(turn.repeats))
    on_round(rounds)


def open_contender(
    spec: str,
    *,
    mode: Mode = "inference",
    device: torch.device,
    precision: Precision = "fp32",
    threads: int | None = None,
) -> Contender:
    """A preset's name or file, a checkpoint, an .onnx file, or `timm:NAME`.

    The prefix `plain:` takes the released formulation of LSAG, `compiled:` compiles with torch. `,KEY=VALUE` after a
    preset are settings of it, after a name of timm's arguments. Presets and timm's models have random weights.
    A graph gets images that are already on the device, as models do; `host:` includes copying them there and
    the logits back, and `openvino:` runs it in OpenVINO instead of onnxruntime, in `precision`. In front of all that
    `bf16:` and the like take the place of `precision`. UsageError or InputError for what is none of these.
    """
    kind, _, rest = spec.partition(":")
    if kind in DTYPES:
        opened = open_contender(rest, mode=mode, device=device, precision=kind, threads=threads)  # type: ignore[arg-type]
        if opened.precision != kind:
            raise UsageError(f"{rest} computes in {opened.precision}, as it was exported", f"remove {kind}:")
        return replace(opened, name=spec)
    if spec.endswith(".onnx"):
        if mode == "training":
            raise UsageError(f"{spec} is a graph, which cannot be trained", "choose a preset or a checkpoint")
        if kind == "openvino":
            if device.type != "cpu":
                raise UsageError(f"{spec} runs on the CPU", "--device cpu")
            graph = Session(rest, provider="openvino", precision=precision, threads=threads)
        else:
            file = rest if kind == "host" else spec
            graph = Session(file, provider=device.type, device_id=device.index or 0, threads=threads)
        total = count_model(graph.preset.model)
        return Contender(spec, graph.precision, image_shape(graph.preset.model), total.params, total.macs_run, graph)
    model: nn.Module
    shape: tuple[int, int, int]
    if kind == "timm":
        model, shape = timm_contender(rest)
    else:
        name, settings = parse_spec(rest if kind in ("plain", "compiled") else spec)
        if name.endswith(".pt"):
            if settings:
                raise UsageError(f"{spec}: a checkpoint has its own settings", "remove them")
            checkpoint = load_checkpoint(name)
        else:
            checkpoint = random_checkpoint(load_preset(name, settings))
        shape = image_shape(checkpoint.preset.model)
        model = checkpoint.model
        if kind == "plain":
            if not isinstance(model, LSAG):
                raise UsageError(f"{spec}: only LSAG has a released formulation", "remove plain:")
            model = as_released(model)
    precision = choose_precision(device, precision)
    params = sum(parameter.numel() for parameter in model.parameters())
    model, macs = model.train(mode == "training"), count_macs(model, shape)
    model = model.to(device, DTYPES[precision] if mode == "inference" else torch.float32)
    if kind == "compiled":
        model.compile()
    return Contender(spec, precision, shape, params, macs, model, model)


def timm_contender(spec: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """timm's model for `NAME[,KEY=VALUE...]`, and the shape of its images."""
    name, options = parse_spec(spec)
    model = timm_model(name, options)
    known = getattr(model, "pretrained_cfg", {})
    channels, height, width = known.get("input_size", (3, 224, 224))
    size = options.get("img_size", (height, width))
    height, width = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    if not isinstance(height, int) or not isinstance(width, int):
        raise UsageError(f"timm:{spec}: img_size is no size", "for example img_size=224")
    return model, (options.get("in_chans", channels), height, width)


def make_run(contender: Contender, mode: Mode, batch_size: int, device: torch.device) -> Callable[[], object]:
    """A function that does one inference or one training step on made-up images."""
    generator = torch.Generator().manual_seed(0)
    if contender.model is None:
        pixels = torch.randint(0, 256, (batch_size, *contender.shape), dtype=torch.uint8, generator=generator)
        if isinstance(contender.classify, Session) and "host" not in contender.prefixes:
            return contender.classify.bind(pixels)
        return lambda: contender.classify(pixels)
    model, images = contender.model, torch.randn(batch_size, *contender.shape, generator=generator).to(device)
    if mode == "inference":
        return torch.inference_mode()(tf32(contender.precision == "tf32")(partial(model, images.to(contender.dtype))))
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW(model.parameters())

    @tf32(contender.precision == "tf32")
    def step() -> None:
        with autocast(device, contender.dtype):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one `run`, averaged over `times` in a row.

    torch.utils.benchmark.Timer would run it at least twice more before each measurement: minutes for large models.
    """

    def synchronize() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize()
    return (time.perf_counter() - start) / times


def tensor_memory(contender: Contender, run: Callable[[], object], mode: Mode, device: torch.device) -> int | None:
    """The peak bytes of tensors during a `run`, with the parameters, and in training the optimizer's moments.

    As torch's allocator sees it: without libraries, and without what they allocate past torch.
    """
    if contender.model is None or device.type == "mps":
        return None
    run()
    own = sum(tensor.nbytes for tensor in [*contender.model.parameters(), *contender.model.buffers()])
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peak = max(itertools.accumulate(held), default=0)
    return peak + own * (3 if mode == "training" else 1)


def probe(
    preset: Preset,
    *,
    device: str = "auto",
    slice_size: int,
    precision: Precision = "auto",
    compile: bool = False,
    recompute: Recompute = "none",
    steps: int = 3,
) -> tuple[float, int]:
    """Seconds of a training step on `slice_size` made-up images, and the peak memory of the process in bytes."""
    used = choose_device(device)
    model = build_model(preset.model).to(used)
    set_recompute(model, recompute)
    freeze(model, preset.train.freeze)
    if compile:
        model.compile()
    shape = image_shape(preset.model)
    chosen = choose_precision(used, precision, timm=isinstance(preset.model, TimmConfig))
    contender = Contender(preset.name, chosen, shape, 0, 0, model, model)
    run = make_run(contender, "training", slice_size, used)
    seconds(run, 1, used)  # the first warms up
    return min(seconds(run, 1, used) for _ in range(steps)), peak_memory(used)
