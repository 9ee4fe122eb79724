"""Pictures of results, as PNG files. matplotlib is imported only when one is drawn."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lsag.files import replacing

if TYPE_CHECKING:
    from lsag.bench import Bench


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Loss and accuracy against the epoch, from the rows of metrics.jsonl."""
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
    """The confusion matrix, row by row in percent of a class's images; names and numbers where there is room."""
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


def draw_bench(measured: Mapping[str, "Bench"], path: Path, *, title: str) -> None:
    """Images per second of each contender as a bar, a panel for each group."""
    heights = [len(found.results) for found in measured.values()]
    figure, panels = _figure(len(measured), 1, (10, 0.35 * sum(heights) + 1.2 * len(heights)), height_ratios=heights)
    for axes, (group, found) in zip(panels.flat if len(measured) > 1 else [panels], measured.items(), strict=True):
        speeds = [result.images_per_second for result in found.results]
        ours = ["tab:gray" if ":" in result.name else "tab:blue" for result in found.results]
        bars = axes.barh([_plain(result.name) for result in found.results], speeds, color=ours)
        axes.bar_label(bars, [f"{speed:,.1f}" for speed in speeds], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(xlabel="images per second", title=group)
    figure.suptitle(f"{title}, {found.dtype} on {found.device}")
    _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    # The object interface, not pyplot: no window, no state, no display needed.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _plain(text: str) -> str:
    """Text that matplotlib draws as it is: no formulas, nothing that cannot be encoded."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings(action="ignore"), replacing(path) as file:  # of glyphs that the font has not
        figure.savefig(file, format="png", dpi=120)
