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
    figure.suptitle(_plain(title))
    _save(figure, path)


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path, *, title: str) -> None:
    """The confusion matrix (true, predicted): colours in percent of a row, counts and names where there is room.

    scikit-learn's ConfusionMatrixDisplay writes all zeros and all names, and colours by the numbers that it writes.
    """
    count, names = len(classes), [_plain(name) for name in classes]
    size = min(max(4.5, 0.55 * count + 2), 14)
    figure, axes = _figure(1, 1, (size, size))
    share = 100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the class", fraction=0.046, pad=0.04)
    if count <= 30:
        axes.set_xticks(range(count), names, rotation=45, ha="right")
        axes.set_yticks(range(count), names)
    if count <= 20:
        for row in range(count):
            for column in range(count):
                if confusion[row, column]:
                    color = "white" if share[row, column] > 50 else "black"
                    axes.text(
                        column, row, int(confusion[row, column]), ha="center", va="center", color=color, fontsize=8
                    )
    axes.set(xlabel="predicted", ylabel="true", title=_plain(title))
    _save(figure, path)


def draw_bench(speeds: Mapping[str, Mapping[str, float]], path: Path, *, title: str) -> None:
    """Images per second of each contender as a bar; `speeds` has a panel's contenders by name, for each group."""
    heights = [len(panel) for panel in speeds.values()]
    figure, panels = _figure(len(speeds), 1, (10, 0.35 * sum(heights) + 1.2 * len(heights)), height_ratios=heights)
    for axes, (group, panel) in zip(panels.flat if len(speeds) > 1 else [panels], speeds.items(), strict=True):
        colors = ["tab:gray" if ":" in name else "tab:blue" for name in panel]
        names = [_plain(name).replace(",", "\n", 1) for name in panel]
        bars = axes.barh(names, list(panel.values()), color=colors)
        axes.bar_label(bars, [f"{speed:,.1f}" for speed in panel.values()], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.tick_params(axis="y", labelsize=8)
        axes.set(xlabel="images per second", title=group)
    figure.suptitle(title)
    _save(figure, path)


def draw_table(rows: Sequence[tuple[str, Sequence[float], float | None]], path: Path, *, title: str) -> None:
    """Top-1 accuracies in percent of rows (name, of each seed, of the paper if it has one).

    Every seed is a dot, their mean a line; the paper's are in a panel of their own.
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
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(_plain(title))
    _save(figure, path)


def draw_explanation(explanation: "Explanation", path: Path, *, title: str) -> None:
    """Above, the shifts that the local attention chose; below, where the chosen token looks in each stage."""
    heads, stages = len(explanation.local), explanation.stages
    columns = max(heads + 4, len(stages) + 1)
    figure, panels = _figure(2, columns, (2.3 * columns, 5.6))
    size = len(explanation.pixels)
    pixels = explanation.pixels.squeeze(2) if explanation.pixels.shape[2] == 1 else explanation.pixels
    extent = (-0.5, size - 0.5, size - 0.5, -0.5)
    for axes in panels.flat:
        axes.axis("off")

    def show(axes: Any, label: str, *, faint: bool = False) -> Any:
        axes.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, alpha=0.45 if faint else 1, extent=extent)
        axes.set_title(label, fontsize=9)
        return axes

    colors = [_shift_color(shift, explanation.shifts) for shift in explanation.shifts]
    mean = explanation.local.mean(dim=0)
    axes = show(panels[0, 0], "\n".join(f"{_plain(name)} {100 * share:.1f} %" for name, share in explanation.classes))
    axes.plot(*explanation.point, "+", color="red", markersize=12, markeredgewidth=2)

    # The mean shift that each patch attends to, as an arrow; where there are too many, one for each block of patches.
    shifts = torch.tensor(explanation.shifts, dtype=torch.float32)
    across, down = torch.einsum("tyx,tc->cyx", mean, shifts)
    step = max(1, len(across) // 16)
    across, down = (F.avg_pool2d(part[None], step)[0] for part in (across, down))
    centers = (torch.arange(len(across)) + 0.5) * size / len(across) - 0.5
    axes = show(panels[0, 1], "mean shift", faint=True)
    axes.quiver(centers, centers, across, down, angles="xy", color="black", width=0.008)

    for index, weights in enumerate([mean, *explanation.local]):
        axes = panels[0, 2 + index]
        chosen = torch.tensor(colors)[weights.argmax(dim=0)]
        axes.imshow(chosen, extent=extent, interpolation="nearest")
        axes.set_title("strongest shift,\nmean of heads" if index == 0 else f"head {index}", fontsize=9)
    axes = panels[0, 3 + heads]
    shown = axes.imshow(explanation.entropy, cmap="viridis", extent=extent, interpolation="nearest", vmin=0)
    axes.set_title("entropy (bits)", fontsize=9)
    figure.colorbar(shown, ax=axes, fraction=0.046)

    for index, weights in enumerate(stages):
        if weights is not None:
            axes = show(
                panels[1, index],
                f"stage {index + 1}: attention of +\n{len(weights[0])} x {len(weights[0])} tokens",
                faint=True,
            )
            axes.imshow(weights.mean(dim=0), cmap="inferno", alpha=0.75, extent=extent, interpolation="nearest")
            axes.plot(*explanation.point, "+", color="cyan", markersize=10, markeredgewidth=2)
    axes = panels[1, len(stages)]
    axes.axis("on")
    axes.scatter(*shifts.T, c=colors, s=160, marker="s", edgecolors="black", linewidths=0.5)
    axes.invert_yaxis()
    axes.set(aspect="equal", xlabel="right (pixels)", ylabel="down (pixels)")
    axes.set_title("colour of each shift", fontsize=9)
    axes.margins(0.2)
    figure.suptitle(_plain(title))
    _save(figure, path)


def _shift_color(shift: tuple[int, int], shifts: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """The RGB colour of a shift: its direction as hue, its length as saturation; the unshifted variant is white."""
    from matplotlib.colors import hsv_to_rgb

    length = math.hypot(*shift) / max(1.0, *(math.hypot(*other) for other in shifts))
    hue = (math.atan2(shift[1], shift[0]) / (2 * math.pi)) % 1
    return tuple(hsv_to_rgb((hue, 0.25 + 0.75 * length if length else 0.0, 0.95)).tolist())


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
