"""What a report shows, as plain pieces: which runs are one line, in which panel, in which look."""

from __future__ import annotations

from engine.range_test.contents import batch_boundaries, contents_of, groups_of, looks_of
from engine.range_test.suggestion import Suggestion
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


def test_a_run_that_was_made_twice_is_said_to_be_repeated() -> None:
    assert shown(make_run(5), make_run(5)) == [("rate 5 (repeated)", "", 2)]


def test_runs_of_another_name_are_other_lines() -> None:
    assert shown(make_run(None, name="fixed 0.1"), make_run(None, name="fixed 0.01")) == [
        ("fixed 0.1", "", 1),
        ("fixed 0.01", "", 1),
    ]


def test_other_batch_sizes_and_settings_stand_beside_the_same_test_as_configured() -> None:
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


def test_a_baseline_has_a_look_of_its_own_kind() -> None:
    curves = [make_run(None, name="a"), make_run(5), make_run(None, name="b"), make_run(50)]
    assert looks_of(groups_of(curves, 32)) == [-1, 0, -2, 1]


def test_boundaries_are_read_at_each_batch_size_from_its_own_tests() -> None:
    curves = [make_run(50), *(make_run(50, train_batch_size=size, best=1e-2) for size in (256, 64))]
    (own, one), (_, two), (most, three) = batch_boundaries(curves, 32, 1000)
    assert (own, most) == (32, 256)
    assert isinstance(one, Suggestion) and isinstance(two, Suggestion) and isinstance(three, Suggestion)
    assert one.cycle_max_lr > two.cycle_max_lr
    assert batch_boundaries(curves[:1], 32, 1000) == ()


def test_the_other_rules_stand_beside_ours() -> None:
    curves = (make_run(50), make_run(500, settings=(("weight_decay", 0.1),)))
    contents = contents_of(make_result(*curves))
    assert [mark.rule for mark in contents.marks] == ["steepest", "valley", "minimum / 10", "last stable", "redline"]
    assert isinstance(contents.answer, Suggestion)
    assert contents.marks[-1].lr == contents.answer.cycle_max_lr
    assert all(mark.lr is not None and mark.lr <= curves[0].lrs[-1] for mark in contents.marks), "of the first test"


def test_where_ours_refuses_it_has_no_answer() -> None:
    flat = make_result(make_run(5, best=1e9, noise=0.2, name="flat", updates=30))
    mark = contents_of(flat).marks[-1]
    assert (mark.rule, mark.lr) == ("redline", None)
    assert mark.why.startswith("The loss does not fall")
    assert contents_of(make_result(make_run(None))).marks == ()


def test_what_nobody_knows_is_no_fact() -> None:
    names = [name for name, _ in contents_of(make_result(make_run(5))).facts]
    assert names == ["optimizer", "batch size", "processes", "planned training"]
