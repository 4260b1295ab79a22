"""Every gradient that a step uses came through engine.backward, all of it, once; on one to three ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineError
from tests.by_hand import ByHand, Case, differences, failures, grid, loss_of
from tests.distributed import run_ranks
from tests.engine.test_master_params import BOTH, pair, step, world_size
from tests.plain_loop import Broken, mse

Check = Callable[[Case, int], str | None]


def loss(case: Case, engine: Engine, number: int, *route: str) -> Tensor:
    return loss_of(engine, number, engine.global_rank, *(route or BOTH), dtype=case.dtype)


def refused(what: str, action: Callable[[], Any]) -> str | None:
    try:
        action()
    except EngineError as error:
        return None if what in str(error) else f"the reason is another: {error}"
    return f"not refused: {what}"


def cleared_between_steps(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    assert engine.optimizer is not None
    for number, zero_grad in enumerate((engine.zero_grad, engine.optimizer.zero_grad, engine.module.zero_grad)):
        loss(case, engine, 99).backward()  # as another engine's loss leaves gradients in this model
        zero_grad()
        step(case, engine, hand, 10 * number)
    return differences(case, engine, hand)


def cleared_within_an_accumulation(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    assert engine.optimizer is not None
    for number, zero_grad in enumerate((engine.zero_grad, engine.optimizer.zero_grad, engine.module.zero_grad)):
        engine.backward(loss(case, engine, 50))
        engine.step()
        zero_grad()
        next_loss = loss(case, engine, 51)
        if fault := refused("cleared", functools.partial(engine.backward, next_loss)):
            return f"{zero_grad.__qualname__}: {fault}"
        engine.drop_update()
        step(case, engine, hand, 10 * number)
    return differences(case, engine, hand)


def plain_backward(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    loss(case, engine, 50).backward()
    next_loss = loss(case, engine, 51)
    fault = refused("did not come from engine.backward", lambda: engine.backward(next_loss))
    if fault:
        return f"before: {fault}"
    engine.zero_grad()
    step(case, engine, hand, 0)
    for number in range(case.accumulation):
        engine.backward(loss(case, engine, 60 + number))
        if number < case.accumulation - 1:
            engine.step()
    loss(case, engine, 70).backward()
    if fault := refused("loss.backward()", engine.step):
        return f"after: {fault}"
    engine.drop_update()
    step(case, engine, hand, 10)
    return differences(case, engine, hand)


def two_backwards(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    for number in range(case.accumulation):
        engine.backward(loss(case, engine, number, "a"))
        engine.backward(loss(case, engine, 10 + number, "b"))
        engine.step()
        hand.micro_batch(number, ("a",))
        hand.micro_batch(10 + number, ("b",))
    hand.step()
    return differences(case, engine, hand)


def exceptions(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    step(case, engine, hand, 0)
    from tests.plain_loop import batch

    for number, place in enumerate(("forward", "backward")):
        try:
            x, y = batch(50, rank, case.dtype)
            engine.backward(mse(engine(x, BOTH, place), y))
            return f"{place} did not raise"
        except Broken:
            engine.zero_grad()
        step(case, engine, hand, 10 + 10 * number)
    return differences(case, engine, hand)


def without_a_graph_on_one_rank(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    step(case, engine, hand, 0)

    def broken() -> None:
        for number in range(case.accumulation):
            value = loss(case, engine, 50 + number)
            engine.backward(value.detach() if rank == world_size() - 1 else value)
            engine.step()

    if fault := refused("does not require gradients", broken):
        return fault
    engine.zero_grad()
    step(case, engine, hand, 10)
    return differences(case, engine, hand)


def without_a_gradient(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)

    def broken() -> None:
        for _ in range(case.accumulation):
            value = torch.ones((), requires_grad=True)
            engine.backward(value * 2)
            engine.step()

    if fault := refused("no loss has reached", broken):
        return fault
    step(case, engine, hand, 10)
    return differences(case, engine, hand)


def only_rank_0_has_two(case: Case, hand: ByHand, number: int, rank: int) -> Tensor:
    """The loss of a micro-batch; of one that a rank does not have, zero."""
    return loss_of(hand.call, number, rank, *BOTH, dtype=case.dtype) if rank == 0 or number == 0 else torch.zeros(())


def flushed(case: Case, rank: int) -> str | None:
    """Rank 0 has one micro-batch more than the others, which it has not ended by a step()."""
    engine, hand = pair(case)
    mine = 2 if rank == 0 else 1
    for number in range(mine):
        engine.backward(loss(case, engine, number), scale_wrt_gas=False)
        if number < mine - 1:
            engine.step()
    engine.flush()
    for number in range(2):
        hand.backward(functools.partial(only_rank_0_has_two, case, hand, number), divide=False)
    hand.step()
    return differences(case, engine, hand)


def flushed_mean(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    mine = 2 if rank == 0 else 1
    for number in range(mine):
        engine.backward(loss(case, engine, number))
        if number < mine - 1:
            engine.step()
    engine.flush()
    for number in range(2):
        hand.backward(functools.partial(only_rank_0_has_two, case, hand, number), divide=False)
    size = world_size()
    hand.step(size / (size + 1))  # one mean over all micro-batches of all ranks
    return differences(case, engine, hand)


def the_optimizers_own_step(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    step(case, engine, hand, 0)
    assert engine.optimizer is not None
    engine.optimizer.step()  # no parameter has a gradient
    value = loss(case, engine, 50)
    if fault := refused("call engine.step()", lambda: engine.backward(value)):
        return fault
    step(case, engine, hand, 10)
    return differences(case, engine, hand)


TWO = {"accumulations": (2,)}
UNSHARDED = {"stages": (0, 1, 2)}
KINDS: dict[str, tuple[Check, dict[str, Any]]] = {
    "gradients cleared between steps": (cleared_between_steps, {}),
    "gradients cleared within an accumulation": (cleared_within_an_accumulation, TWO),
    "plain backwards": (plain_backward, {}),
    "two backwards before a step": (two_backwards, {}),
    "exceptions in forward and backward": (exceptions, {}),
    "a loss without a graph on one rank": (without_a_graph_on_one_rank, UNSHARDED),
    "a step without a gradient": (without_a_gradient, UNSHARDED),
    "flush of losses that the script scales": (flushed, {**UNSHARDED, "accumulations": (3,)}),
    "flush of unequal numbers of micro-batches": (flushed_mean, {**UNSHARDED, "accumulations": (3,)}),
    "the optimizer's own step": (the_optimizers_own_step, {}),
}


def on_all(ranks: int) -> dict[str, list[str]]:
    few = {"precisions": ("fp32", "bf16")} if ranks > 2 else {}  # three ranks divide rows unevenly, in any precision
    return {name: failures(check, grid(ranks, **options, **few)) for name, (check, options) in KINDS.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_step_uses_the_gradients_of_engine_backward_once(ranks: int) -> None:
    found = run_ranks(on_all, ranks, ranks)  # one start for all kinds
    assert found == [{kind: [] for kind in KINDS}] * ranks
