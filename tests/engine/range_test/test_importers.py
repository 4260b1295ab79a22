"""Records of other tools: found by their columns, or refused with what is there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from redline import RangeTestError
from redline.range_test.importers import kind_of_growth, read_curves
from tests.records import make_result, make_run


def written(folder: Path, text: str, name: str = "losses.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "header",
    ["lr,loss", "Lr,Loss", "learning_rate,train_loss", "Learning Rate,trainLoss", "train/lr,train/loss",
     "lr-Adam,train_loss_step", " lr , loss ", "lrs,losses"],
)  # fmt: skip
def test_common_headers_are_recognised(header: str, tmp_path: Path) -> None:
    (curve,) = read_curves(written(tmp_path, f"{header}\n0.1,2.0\n0.2,1.5\n0.3,1.0\n"))
    assert (curve.name, curve.kind, curve.rate) == ("losses", "linear", 1.0)
    assert (curve.steps, curve.lrs, curve.losses) == ((0, 1, 2), (0.1, 0.2, 0.3), (2.0, 1.5, 1.0))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_may_have_commas_semicolons_or_tabs(delimiter: str, tmp_path: Path) -> None:
    rows = [("iteration", "lr", "loss", "val_loss"), ("10", "1e-3", "2", ""), ("20", "1e-2", "nan", "1.5")]
    (curve,) = read_curves(written(tmp_path, "\ufeff" + "\n".join(map(delimiter.join, rows))))
    assert (curve.steps, curve.lrs, curve.validation) == ((10, 20), (1e-3, 1e-2), ((21, 1.5),))
    assert curve.losses[0] == 2.0
    assert math.isnan(curve.losses[1])


def test_columns_may_be_named_and_must_be_there(tmp_path: Path) -> None:
    path = written(tmp_path, "lr,loss,a,b\n1,1,0.5,7\n2,2,0.6,8\n")
    (curve,) = read_curves(path, lr_column="a", loss_column="b")
    assert (curve.lrs, curve.losses) == ((0.5, 0.6), (7.0, 8.0))
    with pytest.raises(RangeTestError, match=r"has no column 'rate'; its columns are 'lr', 'loss', 'a', 'b'"):
        read_curves(path, lr_column="rate")


def test_json_of_other_tools_is_read(tmp_path: Path) -> None:
    history = {"lr": [1e-5 * 10**k for k in range(6)], "loss": [2.3, 2.2, 2.0, 1.5, 1.0, math.nan]}
    (curve,) = read_curves(written(tmp_path, json.dumps(history), "history.json"))
    assert (curve.name, curve.kind, curve.rate) == ("history", "exponential", 9.0)
    assert curve.losses[:5] == (2.3, 2.2, 2.0, 1.5, 1.0)
    for key in ("results", "history"):
        text = json.dumps({key: {"lr": [1.0, 2.0, 3.0], "loss": [3.0, 2.0]}, "mode": "exponential"})
        (curve,) = read_curves(written(tmp_path, text, "a.JSON"))
        assert curve.lrs == (1.0, 2.0), "the loss of the last step is missing"
    text = json.dumps([{"step": 3, "lr": 0.1, "loss": 1}, {"step": 5, "lr": 0.2, "loss": 0.5}])
    (curve,) = read_curves(written(tmp_path, text, "a.json"))
    assert curve.steps == (3, 5)


def test_what_a_logger_spreads_over_rows_is_put_together(tmp_path: Path) -> None:
    text = "epoch,lr-SGD,step,train_loss\n,0.1,0,\n0,,0,2.0\n,0.2,1,\n0,,1,1.0\n,0.3,2,\n"
    (curve,) = read_curves(written(tmp_path, text, "metrics.csv"))
    assert (curve.steps, curve.lrs, curve.losses) == ((0, 1), (0.1, 0.2), (2.0, 1.0))


def test_batches_that_are_counted_anew_in_each_epoch_are_no_steps(tmp_path: Path) -> None:
    (curve,) = read_curves(written(tmp_path, "batch,lr,loss\n0,0.1,4\n1,0.2,3\n0,0.3,2\n1,0.4,1\n"))
    assert (curve.steps, curve.losses) == ((0, 1, 2, 3), (4.0, 3.0, 2.0, 1.0))


def test_our_own_table_comes_back_with_all_its_runs(tmp_path: Path) -> None:
    curves = (make_run(None, validated=True), make_run(5, validated=True), make_run(500, validated=True))
    path = make_result(*curves).save(tmp_path)["csv"]
    read = read_curves(path)
    assert [curve.name for curve in read] == ["fixed 0.001", "rate 5", "rate 500"]
    assert [curve.kind for curve in read] == ["fixed", "linear", "linear"]
    for one, other in zip(curves, read):
        assert (one.steps, one.lrs, one.losses) == (other.steps, other.lrs, other.losses)
        assert one.validation[1:] == other.validation


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "a,b\n1,2\n",
            r"has no column with a learning rate and column with a loss; its columns are 'a', 'b'\.",
        ),
        ("lr,b\n1,2\n", r"has no column with a loss; its columns are 'lr', 'b'"),
        ("1e-3,2.0\n", r"its columns are '1e-3', '2\.0'\. Expected a table with a header, such as lr,loss"),
        ("", "has no column with a learning rate"),
        ("lr,loss\n", "no row has both a learning rate and a loss"),
        ("lr,loss\n0.1,1\ninf,2\n", "lr of row 2 is inf; expected a finite number"),
        ("step,lr,loss\n1,0.1,1\n" + "9" * 5000 + ",0.2,2\n", "step of row 2 is inf; expected a finite number"),
        ('lr,loss\n0.1,1\n"' + "a" * 200_000 + '",2\n', "field larger than field limit"),
        ("lr,loss\n" + "0.1,1\n" * 200_001, "has 200,001 rows; at most 200,000 can be read; leave out some"),
        ("lr,loss\n0.1,\n", "no row has both a learning rate and a loss"),
        ("lr,loss\n0.1,two\n", "loss of row 1 is 'two'; expected a number"),
        ("step,lr,loss\n7,0.1,1\n8,0.2,1\n9,0.1,1\n", "falls from 0.2 to 0.1 at step 9; in a range test it grows"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_what_is_there(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RangeTestError, match=says):
        read_curves(written(tmp_path, text))


@pytest.mark.parametrize("text", ["[1, 2]", "3", "{}", '{"lr": 1}', "{"])
def test_json_that_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RangeTestError, match=r"a\.json: (not valid JSON|has no .* JSON such as)"):
        read_curves(written(tmp_path, text, "a.json"))


def test_rows_may_have_fewer_cells_than_the_header_or_more(tmp_path: Path) -> None:
    (curve,) = read_curves(written(tmp_path, "lr,loss\n0.1,3\n,\n0.2\n0.2,2,7,7\n0.3,1\n"))
    assert (curve.lrs, curve.losses) == ((0.1, 0.2, 0.3), (3.0, 2.0, 1.0))


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RangeTestError, match=r"a\.json: maximum recursion depth exceeded"):
        read_curves(written(tmp_path, "[" * 100_000, "a.json"))


def test_a_file_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00lr")
    with pytest.raises(RangeTestError, match=r"a\.csv: cannot be read"):
        read_curves(tmp_path / "a.csv")
    with pytest.raises(RangeTestError, match=r"cannot be read \(No such file"):
        read_curves(tmp_path / "b.csv")


def test_growth_is_seen_through_rounding_and_stairs() -> None:
    assert kind_of_growth([float(f"{1e-4 * (1 + k):.3g}") for k in range(100)]) == "linear"
    assert kind_of_growth([float(f"{1e-6 * 1.1**k:.3g}") for k in range(100)]) == "exponential"
    assert kind_of_growth([1e-4 * (1 + k // 10) for k in range(100)]) == "linear"
    assert kind_of_growth([1e-6 * 2 ** (k // 10) for k in range(100)]) == "exponential"
    assert kind_of_growth([0.0, 0.1, 0.2]) == "linear"
    assert kind_of_growth([0.1, 0.1 * (1 - 1e-9), 0.1]) == "fixed"
    assert kind_of_growth([0.1, 0.2, 0.1]) is None
    assert kind_of_growth([]) == kind_of_growth([0.1]) == "fixed"
