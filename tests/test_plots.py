import math

import matplotlib.colors
import pytest
import torch

import lsag.plots
from lsag.inference.explain import Explanation
from lsag.plots import draw_bench, draw_confusion, draw_curves, draw_explanation, draw_table, shift_colors

SHIFTS = ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, as matplotlib has them before they are written."""
    figures = []
    monkeypatch.setattr(lsag.plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_curves_have_whole_ticks(drawn, epochs, tmp_path):
    rows = [{"epoch": epoch, "train_loss": 2.0, "eval_loss": 1.0, "top1": 0.5} for epoch in range(1, epochs + 1)]
    draw_curves(rows, tmp_path / "curves.png", title="a run")
    for axes in drawn[0].axes:
        assert all(tick == int(tick) for tick in axes.get_xticks())


def test_a_large_confusion_matrix_names_what_is_confused_most(drawn, tmp_path):
    confusion = torch.eye(120, dtype=torch.int64) * 9
    confusion[3, 7], confusion[90, 12] = 8, 5
    names = [f"class {index}" for index in range(120)]
    draw_confusion(confusion, names, tmp_path / "confusion.png", title="many")
    (listed,) = [text for text in texts(drawn[0]) if "confused most often" in text]
    assert listed.splitlines()[1:] == ["8 x class 3, taken for class 7", "5 x class 90, taken for class 12"]
    assert confusion[0, 0] == 9  # the matrix itself is left as it was


def test_a_sparse_confusion_matrix_is_drawn_by_cells_of_classes(drawn, tmp_path):
    pairs = torch.tensor([[0, 2_500, 7], [0, 4, 9]])
    confusion = torch.sparse_coo_tensor(pairs, torch.tensor([3, 2, 1]), (2_501, 2_501), check_invariants=True)
    draw_confusion(confusion.coalesce(), [f"n{i}" for i in range(2_501)], tmp_path / "a.png", title="many")
    words = "\n".join(texts(drawn[0]))
    assert "2 x n2500, taken for n4\n1 x n7, taken for n9" in words and "n0, taken" not in words
    assert "true (3 classes to a cell)" in words
    cells = drawn[0].axes[0].images[0].get_array()
    assert cells.shape == (834, 834) and cells[833, 1] == cells[2, 3] == cells[0, 0] == 100


def test_bars_show_their_spread(drawn, tmp_path):
    draw_bench({"": {"one": (80.0, 0.05), "two": (40.0, 0.1)}}, tmp_path / "bench.png", title="bench")
    (whiskers,) = [part for part in drawn[0].axes[0].containers if hasattr(part, "has_xerr")]
    widths = [segment[1, 0] - segment[0, 0] for segment in whiskers.lines[2][0].get_segments()]
    assert widths == pytest.approx([8, 8])


def test_both_panels_of_a_table_have_one_scale(drawn, tmp_path):
    draw_table([("A", [60, 62.0], 96.5), ("B", [66.0], 96.7)], tmp_path / "table.png", title="Table 5")
    spans = [axes.get_xlim()[1] - axes.get_xlim()[0] for axes in drawn[0].axes]
    assert spans[0] == pytest.approx(spans[1]) and spans[0] > 6


def test_uniform_attention_looks_like_no_choice(drawn, tmp_path):
    explanation = Explanation(
        pixels=torch.zeros(8, 8, 3, dtype=torch.uint8).numpy(),
        shifts=SHIFTS,
        local=torch.full((2, 5, 4, 4), 1 / 5),
        stages=(torch.full((2, 4, 4), 1 / 16), torch.eye(4).reshape(1, 4, 4) / 4, None),
        looks=(torch.ones(16, 4, 4), torch.ones(4, 2, 2), None),
        point=(5, 2),
        classes=(("a very long name of a class " * 3, 0.9), ("another", 0.1)),
    )
    draw_explanation(explanation, tmp_path / "explained.png", title="model: image")
    (figure,) = drawn
    choice = {axes.get_title(): axes for axes in figure.axes}["head 1"].images[0].get_array()
    assert torch.allclose(torch.as_tensor(choice), torch.ones(4, 4, 3, dtype=torch.float64), atol=1e-3)
    attention = [
        image for axes in figure.axes for image in axes.images if isinstance(image.norm, matplotlib.colors.LogNorm)
    ]
    assert len(attention) == 2 and len({(image.norm.vmin, image.norm.vmax) for image in attention}) == 1
    assert "times uniform attention" in {axes.get_ylabel() for axes in figure.axes}, "the scale has a bar"
    white, colored = attention[0].cmap(0.5), attention[0].to_rgba(attention[0].get_array())
    assert (abs(colored[..., :3] - white[:3]) < 0.02).all()
    outlines = [axes.patches[0].get_bbox().bounds for axes in figure.axes if axes.patches and axes.images]
    assert outlines == [(3.5, 1.5, 2.0, 2.0)] * 2  # the token with pixel (5, 2)
    assert "a very long name" in figure.get_suptitle()


def test_colours_of_shifts_are_ordered_by_their_brightness():
    """Once up and once down around the wheel, which no colour blindness hides."""
    turns = [2 * math.pi * step / 32 for step in range(32)]
    ring = [(round(1000 * math.cos(turn)), round(1000 * math.sin(turn))) for turn in turns]
    colors = shift_colors(ring).double()
    brightness = colors @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    rising = (brightness > brightness.roll(1)).tolist()
    assert sum(now != before for now, before in zip(rising, [rising[-1], *rising], strict=False)) == 2
