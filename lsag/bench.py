"""Contenders side by side: in one process, taking turns, warmed up; medians with their spread."""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lsag.checkpoint import load_checkpoint, random_checkpoint
from lsag.config import Preset, Recompute, parse_spec
from lsag.device import autocast, autocast_dtype, choose_device, peak_memory
from lsag.errors import UsageError
from lsag.inference.session import Session
from lsag.model.build import (
    build_model,
    count_macs,
    count_model,
    image_shape,
    set_recompute,
    timm_model,
)
from lsag.model.cpu import linear
from lsag.model.network import LSAG
from lsag.paper.released import plain
from lsag.paper.tables import TABLES
from lsag.presets import load_preset

MIN_SECONDS = 0.05
"""A turn runs its contender as often as takes so long, so that neither clock nor launches are what is measured."""
LATENCY_TURNS = 3
"""Turns with one image for each turn with a batch."""
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}
"""Rows and columns of the square matrices whose product is the measure of what the machine can do."""

PEERS: dict[str, dict[str, float | None]] = {
    group: {
        f"timm:{row.timm}{arguments}" if row.timm else row.preset: row.printed()[1] for row in reversed(TABLES[table])
    }
    for group, table, arguments in (
        ("CIFAR (Table 3)", 3, ",img_size=32,num_classes=10"),
        ("ImageNet (Table 4)", 4, ""),
    )
}
"""Contenders with the images per second that the paper prints for them, on its GPU. Ours come first."""

Mode = Literal["inference", "training"]


@dataclass(frozen=True)
class Result:
    """What was measured of one contender; None where it cannot be known.

    `macs` are those of a forward pass of one image; a training step counts three times as many. Seconds are those of
    one image in a batch of one. `peak_memory` is in bytes of tensors, parameters and optimizer included. `spread` is
    half the distance of the quartiles over the median, `share` the share of the matrix-product rate, `ratio` that of
    the images per second to the first contender's.
    """

    name: str
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
    """The results, and the rate of matrix products in MACs per second that was measured between them."""

    results: list[Result]
    matrix_rate: float
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Contender:
    """A model, images of whose `shape` (C, height, width) `classify` takes; `model` is None for a graph."""

    name: str
    shape: tuple[int, int, int]
    params: int
    macs: int
    classify: Callable[[Tensor], Any]
    model: nn.Module | None = None


def bench(
    specs: Sequence[str],
    *,
    mode: Mode = "inference",
    batch_size: int = 8,
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    recompute: Recompute = "none",
    threads: int | None = None,
    keep_memory: bool = True,
    rounds: int = 10,
    on_round: Callable[[int], object] = lambda done: None,
) -> Bench:
    """Measure each of `specs` (see `open_contender`), `rounds` times in turn, on made-up images.

    Inference is a forward pass in the mode the product runs it, with the batch already on the device; training is
    forward, cross-entropy, backward and an AdamW step, with `recompute` as in lsag.train for lsag's own models.
    `keep_memory` is that of `choose_device`, for all contenders alike. `on_round` hears how many rounds are done.
    UsageError for what cannot be measured in this way.
    """
    on = choose_device(device, keep_memory=keep_memory)
    if threads:
        torch.set_num_threads(threads)
    dtype = autocast_dtype(on, precision)
    contenders = [
        open_contender(spec, mode=mode, on=on, threads=threads, own_precision=dtype is torch.float32) for spec in specs
    ]
    if compile:
        models = [contender.model for contender in contenders if contender.model is not None]
        if not models:
            raise UsageError("there is nothing to compile: .onnx graphs run in onnxruntime", "leave --compile away")
        for model in models:
            model.compile()
    for contender in contenders:
        if isinstance(contender.model, LSAG) and not contender.name.startswith("plain:"):
            set_recompute(contender.model, recompute)
    runs = [make_run(contender, mode, batch_size, on, dtype) for contender in contenders]
    singles = {
        contender.name: make_run(contender, mode, 1, on, dtype)
        for contender in contenders
        if mode == "inference" and getattr(contender.classify, "batch", None) in (None, 1)  # a graph's may be fixed
    }
    side = MATRIX_SIZE[on.type]
    left, right = torch.randn(2, side, side, device=on, dtype=dtype)
    turns: list[Callable[[], object]] = [*runs, *singles.values(), torch.inference_mode()(lambda: linear(left, right))]
    repeats = [LATENCY_TURNS if run in singles.values() else 1 for run in turns]
    memory = [tensor_memory(contender, run, mode, on) for contender, run in zip(contenders, runs, strict=True)]
    for run in turns:
        run()
    often = [max(1, round(MIN_SECONDS / seconds(run, 1, on))) for run in turns]
    times: list[list[float]] = [[] for _ in turns]
    for done in range(rounds):
        on_round(done)
        for index, run in enumerate(turns):
            times[index] += [seconds(run, often[index], on) for _ in range(repeats[index])]
    on_round(rounds)

    matrix_rate = side**3 / float(np.median(times[-1]))
    results: list[Result] = []
    for index, contender in enumerate(contenders):
        low, median, high = np.quantile(times[index], [0.25, 0.5, 0.75]).tolist()
        rate = batch_size / median
        alone = times[turns.index(singles[contender.name])] if contender.name in singles else None
        p50, p90 = np.quantile(alone, [0.5, 0.9]).tolist() if alone else (None, None)
        macs_per_second = rate * contender.macs * (3 if mode == "training" else 1)
        results.append(
            Result(
                name=contender.name,
                params=contender.params,
                macs=contender.macs,
                images_per_second=rate,
                spread=(high - low) / 2 / median,
                ratio=rate / (results[0].images_per_second if results else rate),
                latency_p50=p50,
                latency_p90=p90,
                peak_memory=memory[index],
                macs_per_second=macs_per_second,
                share=macs_per_second / matrix_rate,
            )
        )
    return Bench(results, matrix_rate, str(on), str(dtype).removeprefix("torch."), torch.get_num_threads())


def open_contender(
    spec: str, *, mode: Mode = "inference", on: torch.device, threads: int | None = None, own_precision: bool = True
) -> Contender:
    """A preset's name or file, a checkpoint, an .onnx file, or `timm:NAME`.

    `plain:` before one of ours is the released formulation, `compiled:` has torch compile it. A preset may be followed
    by `,KEY=VALUE` with its settings, a name of timm's with arguments. Presets and timm's models have random weights.
    A graph has its images on the device already, as models have; `host:` before it counts bringing them there and the
    logits back. UsageError or InputError for what is none of them.
    """
    kind, _, rest = spec.partition(":")
    if spec.endswith(".onnx"):
        if mode == "training" or not own_precision:
            raise UsageError(f"{spec} can only be run, and in its own precision", "choose a preset or a checkpoint")
        graph = Session(rest if kind == "host" else spec, provider=on.type, threads=threads)
        total = count_model(graph.preset.model)
        return Contender(spec, image_shape(graph.preset.model), total.params, total.macs_run, graph)
    model: nn.Module
    shape: tuple[int, int, int]
    if kind == "timm":
        model, shape = timm_contender(rest)
    else:
        name, settings = parse_spec(rest if kind in ("plain", "compiled") else spec)
        if name.endswith(".pt"):
            if settings:
                raise UsageError(f"{spec}: a checkpoint has its own settings", "leave them away")
            checkpoint = load_checkpoint(name)
        else:
            checkpoint = random_checkpoint(load_preset(name, settings))
        shape = image_shape(checkpoint.preset.model)
        model = checkpoint.model
        if kind == "plain":
            if not isinstance(model, LSAG):
                raise UsageError(f"{spec}: plain: is the released formulation of LSAG, not of timm's", "leave it away")
            model = plain(model)
    params = sum(parameter.numel() for parameter in model.parameters())
    model, macs = model.train(mode == "training"), count_macs(model, shape)
    if kind == "compiled":
        model.compile()
    return Contender(spec, shape, params, macs, model.to(on), model)


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


def make_run(
    contender: Contender, mode: Mode, batch_size: int, on: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """One inference or one training step."""
    generator = torch.Generator().manual_seed(0)
    if contender.model is None:
        pixels = torch.randint(0, 256, (batch_size, *contender.shape), dtype=torch.uint8, generator=generator)
        if isinstance(contender.classify, Session) and not contender.name.startswith("host:"):
            return contender.classify.bound(pixels)
        return lambda: contender.classify(pixels)
    model, images = contender.model, torch.randn(batch_size, *contender.shape, generator=generator).to(on)

    def infer() -> None:
        with torch.inference_mode(), autocast(on, dtype):
            model(images)

    if mode == "inference":
        return infer
    labels = torch.zeros(batch_size, dtype=torch.int64, device=on)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with autocast(on, dtype):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(run: Callable[[], object], times: int, on: torch.device) -> float:
    """Seconds of one `run`, averaged over `times` in a row."""
    synchronize(on)
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(on)
    return (time.perf_counter() - start) / times


def synchronize(on: torch.device) -> None:
    if on.type != "cpu":
        torch.accelerator.synchronize()


def tensor_memory(contender: Contender, run: Callable[[], object], mode: Mode, on: torch.device) -> int | None:
    """The most bytes that tensors take during a `run`, with the parameters, and in training the optimizer's moments.

    It is what the allocator handed out: libraries, and what they allocate past torch, are not in it.
    """
    if contender.model is None or on.type == "mps":
        return None
    run()
    own = sum(tensor.nbytes for tensor in [*contender.model.parameters(), *contender.model.buffers()])
    if on.type == "cuda":
        before = torch.cuda.memory_allocated(on)
        torch.cuda.reset_peak_memory_stats(on)
        run()
        most = torch.cuda.max_memory_allocated(on) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        most = max(itertools.accumulate(held), default=0)
    return most + own * (3 if mode == "training" else 1)


def probe(
    preset: Preset,
    *,
    device: str = "auto",
    slice_size: int,
    precision: str = "auto",
    compile: bool = False,
    recompute: Recompute = "none",
    steps: int = 3,
) -> tuple[float, int]:
    """Seconds that one training step on made-up images takes, a slice at a time, and the peak memory in bytes."""
    on = choose_device(device)
    model = build_model(preset.model).to(on)
    set_recompute(model, recompute)
    if compile:
        model.compile()
    contender = Contender(preset.name, image_shape(preset.model), 0, 0, model, model)
    run = make_run(contender, "training", slice_size, on, autocast_dtype(on, precision))
    seconds(run, 1, on)  # the first warms up
    return min(seconds(run, 1, on) for _ in range(steps)), peak_memory(on)
