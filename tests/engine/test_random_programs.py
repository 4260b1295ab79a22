"""Programs that users could write, at random: the engine trains as a loop written by hand, or refuses by name.

A failure prints the program as a short script. More of them: python -m tests.programs --count 2000 --ranks 2 --seed 7
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

from redline import EngineError, initialize
from tests import programs
from tests.plain_loop import Loop, Setup, batch, mse
from tests.programs import Backward, Evaluate, Loss, Outcome, Program, Step, generate, report, run_alone, run_together

Runner = Callable[[Sequence[Program]], Iterator[Outcome]]


def check(seeds: Iterable[int], ranks: int, run: Runner) -> None:
    """Run programs; show the first failure in full, and count the others."""
    wanted = list(seeds)
    written = [generate(seed, ranks) for seed in wanted]
    outcomes = list(run(written))
    failures = [each for each in zip(wanted, written, outcomes) if each[2].failed]
    if failures:
        others = "".join(f"\n{seed}: {outcome.kind}: {outcome.why.strip()[-200:]}" for seed, _, outcome in failures[1:])
        pytest.fail(f"{len(failures)} of {len(wanted)} programs fail\n{report(*failures[0])}{others}", pytrace=False)
    # A refusal is no way out: most programs have to train.
    refused = Counter(outcome.why for outcome in outcomes if outcome.kind == "refused")
    assert refused.total() <= 0.4 * len(wanted), refused


@pytest.mark.parametrize("first", [0, 20])
def test_programs_of_one_rank_train_as_the_loop_does(first: int) -> None:
    check(range(first, first + 20), 1, run_alone)


def test_programs_of_two_ranks_train_as_the_loop_does() -> None:
    check(range(10), 2, run_together)


@pytest.mark.long
@pytest.mark.parametrize("first", range(40, 440, 50))
def test_many_programs_of_one_rank_train_as_the_loop_does(first: int) -> None:
    check(range(first, first + 50), 1, run_alone)


@pytest.mark.long
@pytest.mark.parametrize("first", range(10, 110, 25))
def test_many_programs_of_two_ranks_train_as_the_loop_does(first: int) -> None:
    check(range(first, first + 25), 2, run_together)


# DeepSpeed 0.19.8 with torch's own optimizers: fp32, clipping at 0.3, `branch` frozen, losses that reach only a part of
# the model. The norms of the four steps (None at stage 0), and the sum of squares of each weight after them.
ROUTES = [("a", "late"), ("a", "b"), ("b",), ("branch", "b")]
DEEPSPEED: dict[tuple[int, str], tuple[list[float] | None, dict[str, float]]] = {
    (0, "SGD"): (
        None,
        {"trunk": 1.408551, "gain": 0.832853, "branch": 1.745811, "a": 0.726943, "b": 0.969021, "late": 0.752728},
    ),
    (0, "AdamW"): (
        None,
        {"trunk": 1.148853, "gain": 0.569186, "branch": 1.745811, "a": 0.631446, "b": 0.802061, "late": 0.752728},
    ),
    (1, "SGD"): (
        [1.60191, 1.078778, 0.543762, 1.677587],
        {"trunk": 1.40438, "gain": 0.826194, "branch": 1.745811, "a": 0.721971, "b": 0.968977, "late": 0.752728},
    ),
    (1, "AdamW"): (
        [1.60191, 1.017425, 0.443998, 1.414555],
        {"trunk": 1.148888, "gain": 0.563774, "branch": 1.745811, "a": 0.628589, "b": 0.802471, "late": 0.752728},
    ),
}


@pytest.mark.parametrize("stage, optimizer", DEEPSPEED)
def test_the_loop_comes_to_deepspeeds_weights_and_norms(stage: int, optimizer: str) -> None:
    loop = Loop(Setup(stage=stage, optimizer=optimizer, clipping=0.3, frozen=("branch",)))
    norms = []
    for number, route in enumerate(ROUTES):
        loop.backward(functools.partial(loop.call, number=number, route=route))
        loop.step()
        norms.append(loop.norm)
    want_norms, want = DEEPSPEED[stage, optimizer]
    if want_norms is not None:
        assert norms == pytest.approx(want_norms, rel=1e-5)
    squares = {name: loop.params[f"{name}.weight"].double().square().sum().item() for name in want}
    assert squares == pytest.approx(want, rel=1e-5)


def test_the_loop_of_two_ranks_is_a_loop_over_both_batches() -> None:
    loop = Loop(Setup(ranks=2))
    loop.backward(lambda rank: loop.call(rank, 3, ("a", "b")))
    loop.step()
    alone = Loop(Setup())
    pairs = [batch(3, rank) for rank in (0, 1)]
    x, y = (torch.cat(each) for each in zip(*pairs))
    alone.backward(lambda rank: mse(alone.model(x, ("a", "b")), y))
    alone.step()
    assert loop.norm == pytest.approx(alone.norm, rel=1e-5)
    for name, param in loop.params.items():
        torch.testing.assert_close(param, alone.params[name], rtol=1e-5, atol=1e-6)


def a_loss(number: int, *route: str) -> Loss:
    return Loss(number, (("engine", (route,)),))


def test_a_seed_gives_one_program() -> None:
    assert generate(5, 2) == generate(5, 2) != generate(6, 2)
    assert generate(5, 2).rehearse()


def test_an_engine_that_trains_otherwise_is_found_and_shown_as_a_short_script(monkeypatch: pytest.MonkeyPatch) -> None:
    def clips_by_mistake(model: Any, config: dict[str, Any], **arguments: Any) -> Any:
        return initialize(model, {**config, "gradient_clipping": 0.1}, **arguments)

    monkeypatch.setattr(programs, "initialize", clips_by_mistake)
    evaluation = Evaluate(a_loss(0, "a"), "no_grad")
    program = Program(Setup(), (evaluation, Backward(a_loss(1, "a", "b")), evaluation, Step(), evaluation))
    (outcome,) = run_alone([program])
    assert (outcome.kind, outcome.place) == ("wrong", 3)
    text = report(1, program, outcome)
    assert "engine.eval()" not in text
    assert text.count("engine.backward(") == text.count("engine.step()") == 1


def test_a_refusal_without_a_reason_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any, **options: Any) -> Any:
        raise EngineError("not today")

    monkeypatch.setattr(programs, "initialize", refuses)
    (outcome,) = run_alone([Program(Setup(), ())])
    assert (outcome.kind, outcome.why) == ("wrong", "refused without a reason: not today")
