"""Pictures of results, as PNG files. matplotlib is imported only when one is drawn."""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsag.files import replacing

if TYPE_CHECKING:
    from lsag.inference.explain import Explanation

MAX_CELLS = 1000
"""Rows of a picture of a confusion matrix; there are no more pixels."""
ATTENTION_MAP = "PuOr_r"
"""The colours of attention: purple is less than uniform, orange more, which survives colour blindness."""
CONFUSED_PAIRS = 10
"""Pairs of classes that the picture of a large confusion matrix names."""


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Loss and accuracy over the epochs, from the rows of metrics.jsonl."""
    figure, (left, right) = _figure(1, 2, (10, 4))
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) == 1 else None
    left.plot(epochs, [row["train_loss"] for row in history], label="training (augmented, smoothed)", marker=marker)
    left.plot(epochs, [row["eval_loss"] for row in history], label="evaluation", marker=marker)
    left.set(xlabel="epoch", ylabel="loss (nats)")
    left.legend()
    right.plot(epochs, [100 * row["top1"] for row in history], color="tab:green", marker=marker)
    best = max(history, key=lambda row: row["top1"])
    right.plot(best["epoch"], 100 * best["top1"], "o", color="tab:green")
    right.set(
        xlabel="epoch", ylabel="top-1 accuracy (%)", title=f"best {100 * best['top1']:.2f} % in epoch {best['epoch']}"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if marker:
            axes.set_xticks(epochs)
    figure.suptitle(_plain(title))
    _save(figure, path)


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path, *, title: str) -> None:
    """The confusion matrix (true, predicted): colours in percent of a row, counts and names where there is room.

    Where there is no room for the names, the pairs that are confused most often are named below. A cell of a sparse
    matrix stands for as many classes as there are to a pixel.

    scikit-learn's ConfusionMatrixDisplay writes all zeros and all names, and colours by the numbers that it writes.
    """
    count, names = len(classes), [_plain(name) for name in classes]
    cell, counts = 1, confusion if confusion.is_sparse else confusion.to_sparse()
    if confusion.is_sparse:
        cell = math.ceil(count / MAX_CELLS)
        side = math.ceil(count / cell)
        confusion = torch.sparse_coo_tensor(
            counts.indices() // cell, counts.values(), (side, side), check_invariants=True
        ).to_dense()
    size = min(max(4.5, 0.55 * count + 2), 14)
    figure, axes = _figure(1, 1, (size, size))
    share = 100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    end = len(share) * cell - 0.5
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, extent=(-0.5, end, end, -0.5))
    figure.colorbar(image, ax=axes, label="% of the class", fraction=0.046, pad=0.04)
    if count <= 30:
        axes.set_xticks(range(count), names, rotation=45, ha="right")
        axes.set_yticks(range(count), names)
    else:
        (true, predicted), numbers = counts.indices(), counts.values() * (counts.indices()[0] != counts.indices()[1])
        most = numbers.topk(min(CONFUSED_PAIRS, len(numbers))).indices.tolist()
        pairs = [
            f"{numbers[place]} x {names[true[place]]}, taken for {names[predicted[place]]}"
            for place in most
            if numbers[place]
        ]
        figure.supxlabel("\n".join(["confused most often:", *pairs]), x=0.05, ha="left", fontsize=9)
    if count <= 20:
        for row in range(count):
            for column in range(count):
                if confusion[row, column]:
                    color = "white" if share[row, column] > 50 else "black"
                    axes.text(
                        column, row, int(confusion[row, column]), ha="center", va="center", color=color, fontsize=8
                    )
    each = f" ({cell} classes to a cell)" if cell > 1 else ""
    axes.set(xlabel="predicted", ylabel=f"true{each}", title=_plain(title))
    _save(figure, path)


def draw_bench(speeds: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, *, title: str) -> None:
    """Images per second of each contender as a bar with its spread.

    `speeds` has, for each group a panel is drawn of, its contenders by name: images per second, and relative spread.
    """
    heights = [len(panel) for panel in speeds.values()]
    figure, panels = _figure(len(speeds), 1, (10, 0.35 * sum(heights) + 1.2 * len(heights)), height_ratios=heights)
    for axes, (group, panel) in zip(panels.flat if len(speeds) > 1 else [panels], speeds.items(), strict=True):
        colors = ["tab:gray" if ":" in name else "tab:blue" for name in panel]
        names = [_plain(name).replace(",", "\n", 1) for name in panel]
        rates = [rate for rate, _ in panel.values()]
        whiskers = {"ecolor": "black", "capsize": 3}
        spreads = [rate * spread for rate, spread in panel.values()]
        bars = axes.barh(names, rates, xerr=spreads, color=colors, error_kw=whiskers)
        axes.bar_label(bars, [f"{rate:,.1f}" for rate in rates], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.tick_params(axis="y", labelsize=8)
        axes.set(xlabel="images per second", title=group)
    figure.suptitle(title)
    _save(figure, path)


def draw_table(rows: Sequence[tuple[str, Sequence[float], float | None]], path: Path, *, title: str) -> None:
    """Top-1 accuracies in percent of rows (name, of each seed, of the paper if it has one).

    Every seed is a dot, their mean a line; the paper's are in a panel of their own, at the same scale.
    """
    figure, (left, right) = _figure(1, 2, (10, 0.45 * len(rows) + 1.8), sharey=True)
    for place, (_, top1, paper_top1) in enumerate(rows):
        left.plot(top1, [place] * len(top1), "o", color="tab:blue", alpha=0.6)
        if top1:
            left.plot([fmean(top1)] * 2, [place - 0.3, place + 0.3], color="black")
        if paper_top1 is not None:
            right.plot(paper_top1, place, "D", color="tab:orange")
    left.set_yticks(range(len(rows)), [_plain(name) for name, *_ in rows])
    left.invert_yaxis()
    left.set(xlabel="top-1 accuracy (%)", title="here: each seed, and the mean")
    right.set(xlabel="top-1 accuracy (%)", title="the paper")
    span = max(limits[1] - limits[0] for limits in (left.get_xlim(), right.get_xlim()))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        middle = sum(axes.get_xlim()) / 2
        axes.set_xlim(middle - span / 2, middle + span / 2)
    figure.suptitle(_plain(title))
    _save(figure, path)


def draw_explanation(explanation: "Explanation", path: Path, *, title: str) -> None:
    """Above, the shifts that the local attention chose; below, where the chosen token looks in each stage.

    The choice of a shift fades where it is barely one: the colour is full at a weight of 1, white at that of a uniform
    choice. Attention is in multiples of uniform attention, at one scale for all stages.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    heads, stages = len(explanation.local), explanation.stages
    columns = max(heads + 4, len(stages) + 1)
    figure, panels = _figure(2, columns, (2.3 * columns, 5.8))
    size = len(explanation.pixels)
    pixels = explanation.pixels.squeeze(2) if explanation.pixels.shape[2] == 1 else explanation.pixels
    extent = (-0.5, size - 0.5, size - 0.5, -0.5)
    for axes in panels.flat:
        axes.axis("off")

    def show(axes: Any, label: str, *, faint: bool = False) -> Any:
        axes.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, alpha=0.45 if faint else 1, extent=extent)
        axes.set_title(label, fontsize=9)
        return axes

    axes = show(panels[0, 0], "input of the model")
    axes.plot(*explanation.point, "+", color="red", markersize=12, markeredgewidth=2)

    # The mean shift that each patch attends to, as an arrow; where there are too many, one for each block of patches.
    mean = explanation.local.mean(dim=0)
    shifts = torch.tensor(explanation.shifts, dtype=torch.float32)
    across, down = torch.einsum("tyx,tc->cyx", mean, shifts)
    step = max(1, len(across) // 16)
    across, down = (F.avg_pool2d(part[None], step)[0] for part in (across, down))
    centers = (torch.arange(len(across)) + 0.5) * size / len(across) - 0.5
    axes = show(panels[0, 1], "mean shift", faint=True)
    axes.quiver(centers, centers, across, down, angles="xy", color="black", width=0.008)

    colors = shift_colors(explanation.shifts)
    for index, weights in enumerate([mean, *explanation.local]):
        axes = panels[0, 2 + index]
        axes.imshow(strongest_shifts(weights, colors), extent=extent, interpolation="nearest")
        axes.set_title("strongest shift,\nmean of heads" if index == 0 else f"head {index}", fontsize=9)
    axes = panels[0, 3 + heads]
    shown = axes.imshow(explanation.entropy, cmap="viridis", extent=extent, interpolation="nearest", vmin=0)
    axes.set_title("entropy (bits)", fontsize=9)
    figure.colorbar(shown, ax=axes, fraction=0.046)

    multiples = [None if weights is None else weights.mean(dim=0) * weights[0].numel() for weights in stages]
    top = max([4.0, *(float(attention.max()) for attention in multiples if attention is not None)])
    for index, attention in enumerate(multiples):
        if attention is None:
            panels[1, index].set_title(f"stage {index + 1}:\nno global block", fontsize=9)
            continue
        side = len(attention)
        axes = show(panels[1, index], f"stage {index + 1}: attention of \u25a1,\n{side} x {side} tokens", faint=True)
        scale = LogNorm(1 / top, top, clip=True)
        shown = axes.imshow(attention, ATTENTION_MAP, scale, alpha=0.75, extent=extent, interpolation="nearest")
        token = size / side
        x, y = (place // token * token - 0.5 for place in explanation.point)
        axes.add_patch(Rectangle((x, y), token, token, fill=False, edgecolor="black", linewidth=1.5))
    if any(attention is not None for attention in multiples):
        bar = figure.colorbar(shown, ax=panels[1, -1], fraction=0.046, label="times uniform attention")
        bar.set_ticks([1 / top, 1, top], labels=[f"1/{top:.0f}", "1", f"{top:.0f}"])
        bar.minorticks_off()
    axes = panels[1, len(stages)]
    axes.axis("on")
    axes.scatter(*shifts.T, c=colors, s=160, marker="s", edgecolors="black", linewidths=0.5)
    axes.invert_yaxis()
    axes.set(aspect="equal", xlabel="right (pixels)", ylabel="down (pixels)")
    axes.set_title("colour of each shift", fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.margins(0.2)
    classes = ", ".join(f"{name} {100 * share:.1f} %" for name, share in explanation.classes)
    figure.suptitle(_plain(f"{title}\n{classes}"), fontsize=11)
    _save(figure, path)


def strongest_shifts(weights: Tensor, colors: Tensor) -> Tensor:
    """A picture (side, side, 3) of the strongest shifts by weights (T, side, side), white where it barely leads."""
    strongest, chosen = weights.max(dim=0)
    uniform = 1 / len(colors)
    strength = ((strongest - uniform) / max(1 - uniform, 1e-9)).clamp(0, 1)[..., None].sqrt()
    return 1 - strength + strength * colors[chosen]


def shift_colors(shifts: Sequence[tuple[int, int]]) -> Tensor:
    """The RGB colours (T, 3) of shifts: a direction on a cyclic map, paler if it is short; the unshifted one is yellow.

    The map is one whose order of brightness and colours survives colour blindness.
    """
    from matplotlib import colormaps

    longest, colors = max(math.hypot(*shift) for shift in shifts), []
    for right, down in shifts:
        if not (right or down):
            colors.append([0.94, 0.89, 0.26])
            continue
        strength = 0.3 + 0.7 * math.hypot(right, down) / longest
        turn = (math.atan2(down, right) / (2 * math.pi)) % 1
        # Darker than the map's own colours, the lightest of which look like the white of a faded choice.
        parts = colormaps["twilight_shifted"](turn)[:3]
        colors.append([0.75 * (1 - strength) + strength * 0.8 * part for part in parts])
    return torch.tensor(colors)


def _figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    # The object interface, not pyplot: no window, no state, no display needed.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _plain(text: str) -> str:
    """Text that matplotlib draws literally: without formulas or characters that cannot be encoded."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings(action="ignore"), replacing(path) as file:  # about glyphs that the font lacks
        figure.savefig(file, format="png", dpi=120)
