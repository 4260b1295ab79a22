"""The picture: drawn for curves of every kind, without a display, or refused in one line."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import RangeTestError
from engine.range_test import Curve, RangeTestResult
from engine.range_test.contents import Contents, contents_of
from engine.range_test.picture import draw_range_test
from tests import records

matplotlib = pytest.importorskip("matplotlib")


def make_curve(rate: float | None, *, updates: int = 60, losses: Any = None, validation: Any = ()) -> Curve:
    lrs = tuple(1e-4 * (1 + (rate or 0) * k / 5) for k in range(updates))
    losses = tuple(losses if losses is not None else [max(0.3, 2.3 - 0.05 * k) for k in range(updates)])
    return Curve("fixed" if rate is None else f"rate {rate:g}", rate, tuple(range(updates)), lrs, losses, validation)


def make_result(*curves: Curve, world_size: int = 1) -> RangeTestResult:
    return RangeTestResult(curves, {}, 8, world_size, "AdamW", 1000)


def drawn(contents: Contents, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure that was saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    draw_range_test(contents, path)
    return figures[0]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


FALLING = [2.3 - 0.02 * k for k in range(60)]

KINDS = {
    "falling": [make_curve(50)],
    "beside a baseline": [make_curve(None), make_curve(5), make_curve(50)],
    "with validation": [make_curve(50, validation=((0, 2.4), (30, 1.0), (60, 0.5)))],
    "diverging": [make_curve(50, losses=[*FALLING[:50], *[10.0**k for k in range(10)]])],
    "nan at the end": [make_curve(50, losses=[*FALLING[:-1], math.nan])],
    "infinite validation": [make_curve(50, losses=[*FALLING[:-1], math.inf], validation=((0, 2.0), (60, math.inf)))],
    "nan from the start": [make_curve(50, losses=[math.nan] * 60)],
    "flat": [make_curve(50, losses=[1.0] * 60)],
    "negative": [make_curve(50, losses=[loss - 100 for loss in FALLING])],
    "one update": [make_curve(50, updates=1)],
    "nothing": [make_curve(50, updates=0)],
    "only a baseline": [make_curve(None)],
    "many": [make_curve(rate) for rate in range(1, 10)],
    "no curves": [],
}
CONTENTS = {name: contents_of(make_result(*curves)) for name, curves in KINDS.items()}
CONTENTS |= {f"record: {name}": make() for name, make in records.KINDS.items() if name in ("nan", "twelve", "tuning")}


@pytest.mark.parametrize("kind", CONTENTS)
def test_curves_of_every_kind_are_drawn_without_a_warning(kind: str, tmp_path: Path) -> None:
    path = draw_range_test(CONTENTS[kind], tmp_path / "range_test.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_the_format_goes_by_the_name(name: str, start: bytes, tmp_path: Path) -> None:
    assert make_result(make_curve(50)).plot(tmp_path / "new" / name).read_bytes().startswith(start)


def test_an_unknown_format_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(RangeTestError, match=r"a\.xyz: .*png"):
        make_result(make_curve(50)).plot(tmp_path / "a.xyz")


def test_there_are_three_panels_and_the_suggestion_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_result(make_curve(None), make_curve(5), make_curve(50), world_size=2)
    figure = drawn(contents_of(result), tmp_path / "a.png", monkeypatch)
    by_step, rates, by_rate = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["update (batch)", "update (batch)", "learning rate"]
    assert by_step.get_ylabel() == "training loss"
    assert rates.get_yscale() == by_rate.get_xscale() == "log"
    *runs, cycle = legend(figure)
    assert runs == ["fixed", "rate 5", "rate 50"]
    assert "1Cycle: " in cycle
    assert figure.get_suptitle() == "Learning rate range test: AdamW, batch size 8, 2 processes"


def test_a_validation_loss_takes_the_training_losss_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = make_curve(50, validation=((0, 2.4), (30, 1.0), (60, 0.5)))
    by_step = drawn(contents_of(make_result(curve)), tmp_path / "a.png", monkeypatch).axes[0]
    assert by_step.get_ylabel() == "validation loss"
    assert list(by_step.get_lines()[0].get_ydata()) == [2.4, 1.0, 0.5]


def test_a_divergence_is_marked_and_does_not_flatten_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = make_curve(50, losses=[*FALLING[:50], *[10.0**k for k in range(10)]])
    figure = drawn(contents_of(make_result(curve)), tmp_path / "a.png", monkeypatch)
    by_step, _, by_rate = figure.axes
    assert any("diverged at" in label for label in legend(figure))
    assert by_rate.get_ylim()[1] < 3
    assert by_step.get_ylim()[1] < 3


def names_above(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_each_rules_answer_is_drawn_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_step, rates, by_rate = drawn(records.KINDS["several"](), tmp_path / "a.png", monkeypatch).axes
    assert names_above(by_rate) == ["steepest", "minimum / 10", "valley", "redline"]
    at = [line.get_xdata()[0] for line in by_rate.get_lines() if line.get_linewidth() == 1.0]
    assert at == [8e-3, 1.1e-2, 2e-2, 3.2e-2]
    boxes = [text.get_window_extent() for text in by_rate.texts]
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    assert names_above(by_step) == names_above(rates) == []


def test_seeds_are_a_line_with_a_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(records.tuning(), tmp_path / "a.png", monkeypatch)
    by_rate = figure.axes[2]
    bold = [line for line in by_rate.get_lines() if line.get_linewidth() == 2.0]
    bands = [band.get_paths()[0].vertices[:, 1] for band in by_rate.collections]
    assert len(bold) == len(bands) == 2
    assert all(band.min() <= line.get_ydata().min() <= band.max() for line, band in zip(bold, bands))
    assert next(iter(legend(figure.subfigs[0]))) == "rate 5 (3 seeds)"


def test_batch_sizes_settings_and_trials_have_panels_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = drawn(records.tuning(), tmp_path / "a.png", monkeypatch)
    boundaries, sizes, settings, search, trials = figure.axes[3:]
    assert [axes.get_title() for axes in (boundaries, sizes, settings, search, trials)] == [
        "Boundaries by batch size",
        "Training loss by batch size",
        "Training loss by weight decay",
        "Search for the peak",
        "Validation loss of the trials",
    ]
    tries, cross, peak = search.get_lines()
    assert list(tries.get_xdata()) == [0.0075, 0.03, 0.06, 0.12] and list(tries.get_ydata()) == [-0.8, -1.2, -1.3, -1.0]
    assert list(cross.get_xdata()) == [0.48]
    assert peak.get_label() == f"for the whole training: {records.tuning().answer.cycle_max_lr:g}"
    maximum, minimum = boundaries.get_lines()
    assert list(maximum.get_xdata()) == list(minimum.get_xdata()) == [32, 64, 256]
    assert all(maximum.get_ydata()[k] > minimum.get_ydata()[k] for k in range(3))
    labels = [text.get_text() for text in trials.get_legend().get_texts()]
    assert labels == ["OneCycle to 0.03 (winner)", "linear decay", "fixed 0.1"]


def test_updates_that_were_skipped_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = records.KINDS["several"]()
    by_rate = drawn(contents, tmp_path / "a.png", monkeypatch).axes[2]
    marked = [list(line.get_xdata()) for line in by_rate.get_lines() if line.get_marker() == "^"]
    assert [lr for lrs in marked for lr in lrs] == [contents.curves[1].lrs[0], contents.curves[1].lrs[7]]


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    backend = (
        matplotlib.rcParams._get_backend_or_none() if hasattr(matplotlib.rcParams, "_get_backend_or_none") else None
    )
    draw_range_test(contents_of(make_result(make_curve(50))), tmp_path / "a.png")
    if backend is None and "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RangeTestError) as caught:
        make_result(make_curve(50)).plot(tmp_path / "a.png")
    assert str(caught.value) == "a picture needs matplotlib; install it with `pip install 'redline[plot]'`"


def test_the_curves_of_a_result_are_left_as_they_are(tmp_path: Path) -> None:
    curve = make_curve(50)
    result = make_result(curve)
    result.plot(tmp_path / "a.png")
    assert result.curves == (replace(curve),)
