"""Every gradient that a step uses came through engine.backward, all of it, once; on one to three ranks."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from redline import Engine, EngineError
from redline.accumulation import AccumulationState
from redline.optimizer_step import OptimizerStep
from tests.by_hand import GRIDS, ByHand, Case, Kinds, differences, failures_of_kinds, loss_of
from tests.distributed import run_ranks
from tests.engine.test_master_params import BOTH, pair, set_flags, step, world_size
from tests.plain_loop import Broken, batch, mse
from tests.tiny import X, make_engine, train


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


def cleared_by_hand_before_the_step(case: Case, rank: int) -> str | None:
    """Gradients of the optimizer's own parameters that are set to None, once the last backward has given them."""
    engine, hand = pair(case)
    assert engine.optimizer is not None
    for number in range(case.accumulation):
        engine.backward(loss(case, engine, 50 + number))
        if number < case.accumulation - 1:
            engine.step()
    params = [param for group in engine.optimizer.param_groups for param in group["params"]]
    had_gradients = any(param.grad is not None for param in params)  # on one rank master params get them in step()
    for param in params:
        param.grad = None
    if had_gradients and (fault := refused("changed", engine.step)):
        return fault
    engine.drop_update()
    step(case, engine, hand, 0)
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


def plain_backward_of_thawed_parameters(case: Case, rank: int) -> str | None:
    """A head that is thawed, and reached by a plain backward before the engine has seen that it trains."""
    engine, hand = pair(case, ("b",))
    step(case, engine, hand, 0)
    for backwards in range(case.accumulation):
        for number in range(backwards):
            engine.backward(loss(case, engine, 50 + number))
            engine.step()
        set_flags(engine, hand, True, "b")
        weight = engine.module.get_parameter("b.weight")
        weight.grad = torch.ones_like(weight)
        next_loss = loss(case, engine, 60)
        if fault := refused("did not come from engine.backward", functools.partial(engine.backward, next_loss)):
            return f"after {backwards} micro-batches: {fault}"
        engine.zero_grad()
        engine.drop_update()
        set_flags(engine, hand, False, "b")
        step(case, engine, hand, 10 + 10 * backwards)
    set_flags(engine, hand, True, "b")
    step(case, engine, hand, 40)
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


def flushed_with_mixed_scaling(case: Case, rank: int) -> str | None:
    """Refused on all ranks: where one rank has both, and where each rank has scaled in its own way."""
    engine, hand = pair(case)
    for mine in ((True, False) if rank == 0 else (True, True), (rank == 0, rank == 0)):
        if world_size() == 1 and len(set(mine)) == 1:
            continue
        for number, divided in enumerate(mine):
            engine.backward(loss(case, engine, 50 + number), scale_wrt_gas=divided)
            engine.step()
        if fault := refused("scale all of them in one way", engine.flush):
            return fault
        engine.drop_update()
    step(case, engine, hand, 10)
    return differences(case, engine, hand)


def weighted_by_tokens(case: Case, rank: int) -> str | None:
    """Losses over all tokens of the step, whose numbers differ between micro-batches, equal one large batch."""
    engine, hand = pair(case)
    numbers = range(case.accumulation)
    tokens = {(number, each): 1 + (number + 2 * each) % 5 for number in numbers for each in range(world_size())}
    total = sum(tokens.values())
    for number in numbers:
        x, y = batch(number, rank, case.dtype)
        own = tokens[number, rank]
        errors = (engine(x[:own], BOTH).float() - y[:own]).square().mean(1)
        engine.backward(errors.sum() * world_size() / total, scale_wrt_gas=False)
        engine.step()
    batches = [(*batch(*key, case.dtype), own) for key, own in tokens.items()]
    x, y = (torch.cat([each[index][: each[2]] for each in batches]) for index in (0, 1))
    hand.backward(lambda _: mse(hand.call(x, BOTH), y), divide=False)  # every rank has all of it
    hand.step()
    return differences(case, engine, hand)


def the_optimizers_own_step(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    step(case, engine, hand, 0)
    assert engine.optimizer is not None
    engine.optimizer.step()  # no parameter has a gradient
    value = loss(case, engine, 50)
    if fault := refused("call only engine.step()", lambda: engine.backward(value)):
        return fault
    step(case, engine, hand, 10)
    return differences(case, engine, hand)


TWO = {"accumulations": (2,)}
UNSHARDED = {"stages": (0, 1, 2)}
KINDS: Kinds = {
    "gradients cleared between steps": (cleared_between_steps, {}),
    "gradients cleared within an accumulation": (cleared_within_an_accumulation, TWO),
    "gradients cleared by hand before the step": (cleared_by_hand_before_the_step, {}),
    "plain backwards": (plain_backward, {}),
    "plain backwards of thawed parameters": (plain_backward_of_thawed_parameters, {}),
    "two backwards before a step": (two_backwards, {}),
    "exceptions in forward and backward": (exceptions, {}),
    "a loss without a graph on one rank": (without_a_graph_on_one_rank, UNSHARDED),
    "a step without a gradient": (without_a_gradient, UNSHARDED),
    "flush of losses that the script scales": (flushed, {**UNSHARDED, "accumulations": (3,)}),
    "flush of unequal numbers of micro-batches": (flushed_mean, {**UNSHARDED, "accumulations": (3,)}),
    "flush of mixed scaling": (flushed_with_mixed_scaling, {"accumulations": (3,)}),
    "losses weighted by their tokens": (weighted_by_tokens, {}),
    "the optimizer's own step": (the_optimizers_own_step, {}),
}


def on_all(ranks: int, every: int) -> dict[str, list[str]]:
    few = {"precisions": ("fp32", "bf16")} if ranks > 2 else {}
    return failures_of_kinds(KINDS, ranks, every, **few)


@GRIDS
def test_a_step_uses_the_gradients_of_engine_backward_once(ranks: int, every: int) -> None:
    found = run_ranks(on_all, ranks, ranks, every)  # one start for all kinds
    assert found == [{kind: [] for kind in KINDS}] * ranks


# -- the count of micro-batches ----------------------------------------------------------------------------


def test_two_backwards_are_one_micro_batch_which_counts_before_its_step() -> None:
    state = AccumulationState(2, managed=True)
    for accumulated in (1, 2):
        for _ in range(2):
            state.add_backward(torch.zeros(()), divided=True)
        assert (state.accumulated, state.pending) == (accumulated, True)
        assert state.end_micro_batch() is (accumulated == 2)
        assert (state.accumulated, state.pending) == (accumulated, False)


def test_a_new_accumulation_keeps_what_the_script_has_set() -> None:
    state = AccumulationState(2, managed=True)
    state.boundary = False
    state.add_backward(torch.zeros(()), divided=False)
    state.no_graph = state.reached = True
    state.reset()
    assert (state.backwards, state.pending, state.no_graph, state.reached) == (0, False, False, False)
    assert (state.divided, state.boundary, state.steps) == (0, False, 2)


# -- a step that ends in an exception ----------------------------------------------------------------


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_an_interrupted_flush_drops_its_micro_batches_and_the_next_ones_train(
    precision: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(gradient_accumulation_steps=2, **precision)
    engine.backward(engine(X[:4]).float().mean())
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr("redline.accumulation.scale_by", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.flush()
    assert "flush was interrupted by KeyboardInterrupt" in caplog.text
    train(engine, 2)
    assert engine.global_steps == 1


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def flush_after_an_overflow() -> tuple[float | None, int]:
    """The last step overflows, and only rank 0 has a backward since; only the device knows of the overflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("redline.device._READ_AT_ONCE", ())
        fp16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
        engine = make_engine(gradient_accumulation_steps=2, fp16=fp16)
        train(engine, 1)
        engine.backward(engine(X[:4]).mean() * float("inf"))
        engine.step()
        if engine.global_rank == 0:
            train(engine, 1)
        engine.flush()
        assert engine.scaler is not None
        return engine.scaler.value, engine.skipped_steps


def test_a_flush_on_a_rank_without_a_backward_takes_the_loss_scale_of_the_others() -> None:
    assert run_ranks(flush_after_an_overflow, 2) == [(128.0, 1)] * 2


def test_nothing_waits_for_a_lost_rank_after_a_broken_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completing a step is a collective at ZeRO stages 1 and 2: it is not tried where a rank is lost."""
    engine = make_engine(bf16={"enabled": True})
    engine.backward(engine(X[:4]).float().mean())
    lost = EngineError("lost rank 1")

    def explain(error: BaseException, call: str) -> None:
        raise lost from error

    monkeypatch.setattr("redline.step_loop.explain_failure", explain)
    monkeypatch.setattr(OptimizerStep, "recover", lambda self: pytest.fail("recovered"))
    monkeypatch.setattr(OptimizerStep, "run", interrupt)
    with pytest.raises(EngineError, match="lost rank 1"):
        engine.step()


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_a_step_frees_the_gradients(precision: dict[str, Any]) -> None:
    engine = make_engine(optimizer={"type": "AdamW"}, **precision)
    engine.backward(engine(X[:4]).float().mean())
    gradients = [weakref.ref(param.grad) for param in engine.module.parameters()]
    engine.step()
    assert [each() for each in gradients] == [None] * len(gradients)


def without_a_graph_where_reads_wait(stage: int) -> str:
    """As on CUDA, where reading the sums of a reduction would wait for the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("redline.device._READ_AT_ONCE", ())
        engine = make_engine(zero_optimization={"stage": stage})
        train(engine, 1)
        loss = engine(X[:4]).square().mean()
        with pytest.raises(EngineError) as error:
            engine.backward(loss.detach() if engine.global_rank == 1 else loss)
            engine.step()
        return str(error.value)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loss_without_a_graph_is_an_error_on_all_ranks_also_on_a_gpu(stage: int) -> None:
    first, second = run_ranks(without_a_graph_where_reads_wait, 2, stage)
    assert first == f"on another rank, {second}" and "does not require gradients" in second
