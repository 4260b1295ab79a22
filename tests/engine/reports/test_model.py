"""What a report shows, as plain values: which runs are one line, in which panel, in which color."""

from __future__ import annotations

from redline.range_test.suggest import Suggestion
from redline.reports.model import groups_of, report_of
from tests.records import make_result, make_run


def shown(*curves: object) -> list[tuple[str, str, int]]:
    groups = groups_of(curves, 32)  # type: ignore[arg-type]
    return [(group.label, group.panel, len(group.curves)) for group in groups]


def test_runs_that_differ_in_their_seed_are_one_line() -> None:
    names = ["rate 5", "rate 5, seed 1", "rate 5 (seed 2)"]
    assert shown(*(make_run(5, name=name, seed=seed) for seed, name in enumerate(names)), make_run(50)) == [
        ("rate 5 (3 seeds)", "", 3),
        ("rate 50", "", 1),
    ]
    assert shown(make_run(5), make_run(5)) == [("rate 5 (repeated)", "", 2)]


def test_baselines_of_other_names_are_other_lines_with_dashes_of_their_own() -> None:
    curves = [make_run(None, name="a"), make_run(5), make_run(None, name="b"), make_run(50)]
    assert [(group.label, group.look) for group in groups_of(curves, 32)] == [
        ("a", -1), ("rate 5", 0), ("b", -2), ("rate 50", 1)
    ]  # fmt: skip


def test_other_batch_sizes_and_settings_are_next_to_the_same_test_as_configured() -> None:
    batch = make_run(5, name="rate 5, batch 64", train_batch_size=64)
    decay = make_run(5, name="rate 5, weight_decay 0.1", settings=(("weight_decay", 0.1),))
    assert shown(make_run(5), make_run(50), batch, decay) == [
        ("rate 5", "", 1),
        ("rate 50", "", 1),
        ("rate 5, batch 32", "batch size", 1),
        ("rate 5, as configured", "weight_decay", 1),
        ("rate 5, batch 64", "batch size", 1),
        ("rate 5, weight_decay 0.1", "weight_decay", 1),
    ]


def test_the_first_panel_is_never_empty() -> None:
    assert shown(make_run(5, train_batch_size=64), make_run(5, name="b", settings=(("momentum", 0.5),))) == [
        ("rate 5", "", 1),
        ("b", "", 1),
    ]


def test_boundaries_are_read_at_each_batch_size_from_its_own_tests() -> None:
    curves = [make_run(50), *(make_run(50, train_batch_size=size, best=1e-2) for size in (256, 64))]
    (own, one), (_, two), (most, three) = make_result(*curves).batches
    assert (own, most) == (32, 256)
    assert isinstance(one, Suggestion) and isinstance(two, Suggestion) and isinstance(three, Suggestion)
    assert one.cycle_max_lr > two.cycle_max_lr
    assert make_result(curves[0]).batches == ()


def test_a_report_has_the_other_rules_next_to_ours_and_what_is_known() -> None:
    curves = (make_run(50), make_run(500, settings=(("weight_decay", 0.1),)))
    report = report_of(make_result(*curves))
    assert [mark.rule for mark in report.marks] == ["steepest", "valley", "minimum / 10", "last stable", "redline"]
    assert isinstance(report.answer, Suggestion)
    assert report.marks[-1].lr == report.answer.cycle_max_lr
    assert all(mark.lr is not None and mark.lr <= curves[0].lrs[-1] for mark in report.marks), "of the first test"
    assert [name for name, _ in report.facts] == ["optimizer", "batch size", "ranks", "planned training"]


def test_where_ours_refuses_it_has_no_answer() -> None:
    flat = make_result(make_run(5, best=1e9, noise=0.2, name="flat", updates=30))
    mark = report_of(flat).marks[-1]
    assert (mark.rule, mark.lr) == ("redline", None)
    assert mark.why.startswith("The loss does not fall")
    assert report_of(make_result(make_run(None))).marks == ()
