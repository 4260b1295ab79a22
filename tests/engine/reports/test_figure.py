"""The picture, by its artists; without a display."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redline import RangeTestError
from redline.reports import report_of, save_figure
from redline.reports.model import Report, color_of
from tests.records import KINDS, make_result, make_run, tuning

matplotlib = pytest.importorskip("matplotlib")

RUN = make_run(50, updates=60)


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draws a report; the figure that was saved."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])

    def draw(report: Report) -> Any:
        assert save_figure(report, tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def legend(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.subfigs[0].legends for text in legend.get_texts()]


CURVES = {
    "nan at the end": replace(RUN, losses=(*RUN.losses[:-1], math.nan)),
    "infinite validation": replace(RUN, losses=(*RUN.losses[:-1], math.inf), validation=((0, 2.0), (60, math.inf))),
    "nan at once": replace(make_run(50, updates=1), losses=(math.nan,)),
}
REPORTS = {name: report_of(make_result(curve)) for name, curve in CURVES.items()}
REPORTS |= {f"record: {name}": make() for name, make in KINDS.items() if name != "long"}


@pytest.mark.parametrize("kind", REPORTS)
def test_reports_of_every_kind_are_drawn_without_a_warning(kind: str, draw: Any) -> None:
    assert len(draw(REPORTS[kind]).axes) >= (1 if "alone" in kind else 3)


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_the_suffix_gives_the_format(name: str, start: bytes, tmp_path: Path) -> None:
    result = make_result(RUN)
    assert result.plot(tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(RangeTestError, match=r"a\.xyz: .*png"):
        result.plot(tmp_path / "a.xyz")


def test_there_are_three_panels_and_the_suggestion_is_marked(draw: Any) -> None:
    report = report_of(replace(make_result(make_run(None), make_run(5), make_run(50)), world_size=2))
    figure = draw(report)
    by_step, lrs, by_lr = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["step", "step", "learning rate"]
    assert by_step.get_ylabel() == "training loss"
    assert lrs.get_yscale() == by_lr.get_xscale() == "log"
    *runs, cycle = legend(figure)
    assert runs == ["fixed 0.001", "rate 5", "rate 50"]
    assert cycle == f"suggested 1Cycle: {report.answer.cycle_min_lr:.2g} to {report.answer.cycle_max_lr:.2g}"
    assert figure.get_suptitle() == "Learning rate range test: AdamW, batch size 32, 2 ranks"
    validated = draw(report_of(make_result(replace(RUN, validation=((0, 2.4), (30, 1.0), (60, 0.5)))))).axes[0]
    assert validated.get_ylabel() == "validation loss"
    assert list(validated.get_lines()[0].get_ydata()) == [2.4, 1.0, 0.5]


def test_a_divergence_is_marked_and_does_not_flatten_the_rest(draw: Any) -> None:
    figure = draw(report_of(make_result(replace(RUN, losses=(*RUN.losses[:50], *(10.0**k for k in range(10)))))))
    by_step, lrs, by_lr = figure.axes
    assert legend(figure)[0].startswith("rate 50 (x: diverged at step 5")
    assert by_lr.get_ylim()[1] < 3 and by_step.get_ylim()[1] < 3
    for axes in (by_step, lrs, by_lr):
        assert [line.get_marker() for line in axes.get_lines()].count("X") == 1


def test_the_answers_of_the_rules_are_named_without_overlap_and_skipped_steps_marked(draw: Any) -> None:
    by_step, lrs, by_lr = draw(KINDS["several"]()).axes
    assert [text.get_text() for text in by_lr.texts] == ["steepest", "minimum / 10", "valley", "redline"]
    assert not by_step.texts and not lrs.texts
    at = [line.get_xdata()[0] for line in by_lr.get_lines() if line.get_linewidth() == 1.0]
    assert at == [8e-3, 1.1e-2, 2e-2, 3.2e-2]
    boxes = [text.get_window_extent() for text in by_lr.texts]
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    skipped = [line.get_xdata()[0] for line in by_lr.get_lines() if line.get_marker() == "^"]
    test = KINDS["several"]().curves[1]
    assert skipped == [test.lrs[0], test.lrs[7]]


def test_everything_else_has_panels_in_a_second_row(draw: Any) -> None:
    report = tuning()
    figure = draw(report)
    _, _, by_lr, boundaries, sizes, settings, search, trials = figure.axes
    assert [axes.get_title() for axes in (boundaries, sizes, settings, search, trials)] == [
        "Boundaries by batch size",
        "Training loss by batch size",
        "Training loss by weight decay",
        "Search for the peak",
        "Validation loss of the trials",
    ]
    bands = [band.get_paths()[0].vertices[:, 1] for band in by_lr.collections]
    assert len(bands) == 2, "one for each line of several seeds"
    assert next(iter(legend(figure))) == "rate 5 (3 seeds)"
    tries, cross = (line for line in search.get_lines() if line.get_marker() in ("o", "X"))
    assert list(tries.get_xdata()) == [0.0075, 0.03, 0.06, 0.12] and list(tries.get_ydata()) == [1.6, 1.2, 1.1, 1.4]
    assert list(cross.get_xdata()) == [0.48]
    assert search.get_lines()[-1].get_xdata()[0] == report.answer.cycle_max_lr
    highest, lowest = boundaries.get_lines()
    assert list(highest.get_xdata()) == list(lowest.get_xdata()) == [32, 64, 256]
    labels = [text.get_text() for text in trials.get_legend().get_texts()]
    assert labels == ["OneCycle to 0.03 (winner)", "linear decay", "fixed 0.1"]


def test_the_saved_pixels_show_a_line_and_the_suggested_range(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    pixels = imread(save_figure(report_of(make_result(RUN)), tmp_path / "a.png"))[..., :3]
    assert pixels.shape[:2] == (506, 1375)
    line = (abs(pixels - to_rgb(color_of(0))) < 0.02).all(axis=-1)
    assert line.sum() > 300, "the line of the run"
    yellow = (pixels[..., 2] < 0.85) & (pixels[..., 0] > 0.9) & (pixels[..., 1] > 0.9)
    assert yellow[:, 917:].sum() > 3000, "the suggested range in the panel by learning rate"


def test_a_notebook_shows_the_answer_with_the_picture_and_plots_on_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_result(make_run(5), RUN)
    assert repr(result).startswith("<RangeTestResult of 2 runs, suggested learning rates: ")
    html = result._repr_html_()
    assert "Suggested 1Cycle" in html and '<img alt="The charts"' in html and "<script" not in html
    axes = matplotlib.figure.Figure().subplots()
    assert result.plot(ax=axes) is axes and axes.get_xlabel() == "learning rate"
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == ["rate 5", "rate 50"]
    matplotlib.use("agg")
    inline = result.plot()
    assert inline.figure.number in matplotlib.pyplot.get_fignums()
    matplotlib.pyplot.close(inline.figure)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "a picture needs matplotlib; install it" in result._repr_html_()


def test_titles_of_a_row_are_at_one_height(draw: Any) -> None:
    figure = draw(KINDS["several"]())
    assert len({round(axes.title.get_window_extent().y0) for axes in figure.axes[:3]}) == 1


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    save_figure(report_of(make_result(RUN)), tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
