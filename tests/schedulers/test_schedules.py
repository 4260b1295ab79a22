"""What a schedule promises beside DeepSpeed's numbers: closed form, state, corrected variants, any optimizer."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from redline.schedulers import (
    LRRangeTest,
    OneCycle,
    Schedule,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    WarmupStableDecayLR,
)

LR = 0.05  # of the optimizers here

EVERY = [
    (LRRangeTest, {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 5.0}),
    (OneCycle, {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4, "decay_step_size": 2,
                "decay_lr_rate": 0.5, "decay_mom_rate": 0.01}),
    (WarmupLR, {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_num_steps": 4}),
    (WarmupDecayLR, {"total_num_steps": 10, "warmup_max_lr": 0.1, "warmup_num_steps": 4}),
    (WarmupCosineLR, {"total_num_steps": 10, "warmup_num_steps": 4, "warmup_type": "linear"}),
    (WarmupStableDecayLR, {"total_num_steps": 10, "decay_num_steps": 3, "warmup_max_lr": 0.1, "warmup_num_steps": 4}),
]  # fmt: skip
every = pytest.mark.parametrize(("cls", "arguments"), EVERY, ids=[cls.__name__ for cls, _ in EVERY])
both_modes = pytest.mark.parametrize("corrected", [False, True], ids=["deepspeed", "corrected"])


def make_optimizer(kind: str = "Adam", *, groups: int = 1, tensor: bool = False, **arguments: Any) -> Any:
    lr = torch.tensor(LR) if tensor else LR
    parameters = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": lr.clone() if isinstance(lr, torch.Tensor) else lr}
        for _ in range(groups)
    ]
    return getattr(torch.optim, kind)(parameters, lr=lr, **arguments)


def rates(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def momentum(optimizer: Any) -> float:
    group = optimizer.param_groups[0]
    return group["betas"][0] if "betas" in group else group["momentum"]


def trace(schedule: Schedule, updates: int) -> list[tuple[float, float]]:
    """Rate and momentum of each update, by stepping."""
    steps = []
    for _ in range(updates):
        steps.append((rates(schedule.optimizer)[0], momentum(schedule.optimizer)))
        schedule.step()
    return steps


# -- arguments of every kind -----------------------------------------------------------------------------

small = st.floats(0.0, 0.1)
counts = st.integers(1, 12)


@st.composite
def ordered(draw: st.DrawFn, values: Any) -> tuple[float, float]:
    low, high = sorted((draw(values), draw(values)))
    return low, high


@st.composite
def range_tests(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    return LRRangeTest, {
        "lr_range_test_min_lr": draw(st.floats(1e-8, 0.1)),
        "lr_range_test_step_size": draw(counts),
        "lr_range_test_step_rate": draw(st.floats(0.0, 100.0)),
        "lr_range_test_staircase": draw(st.booleans()),
        "growth": draw(st.sampled_from(["linear", "exponential"])),
    }


@st.composite
def one_cycles(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    low, high = draw(ordered(small))
    min_mom, max_mom = draw(ordered(st.floats(0.5, 0.95)))
    return OneCycle, {
        "cycle_min_lr": low,
        "cycle_max_lr": high,
        "cycle_first_step_size": draw(counts),
        "cycle_second_step_size": draw(st.none() | st.integers(0, 12)),
        "cycle_first_stair_count": draw(st.integers(0, 4)),
        "cycle_second_stair_count": draw(st.none() | st.integers(0, 4)),
        "decay_step_size": draw(st.integers(0, 5)),
        "decay_lr_rate": draw(st.floats(0.0, 1.0)),
        "decay_mom_rate": draw(st.floats(0.0, 0.01)),
        "cycle_momentum": draw(st.booleans()),
        "cycle_min_mom": min_mom,
        "cycle_max_mom": max_mom,
    }


@st.composite
def warmups(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    shape = {"warmup_num_steps": draw(counts), "warmup_type": draw(st.sampled_from(["log", "linear"]))}
    total = shape["warmup_num_steps"] + draw(st.integers(1, 12))
    if draw(st.booleans()):
        ratios = {"warmup_min_ratio": draw(st.floats(0, 1)), "cos_min_ratio": draw(st.floats(0, 1))}
        return WarmupCosineLR, {"total_num_steps": total, **shape, **ratios}
    low, high = draw(ordered(small))
    bounds = {"warmup_min_lr": low, "warmup_max_lr": high}
    if draw(st.booleans()):
        return WarmupDecayLR, {"total_num_steps": total, **shape, **bounds}
    return WarmupLR, {**shape, **bounds}


any_schedule = range_tests() | one_cycles() | warmups()
of_any_arguments = settings(max_examples=150)


# -- the closed form -------------------------------------------------------------------------------------


def test_an_exponential_range_test_multiplies_where_a_linear_one_adds() -> None:
    test = LRRangeTest(None, 1e-3, 4, 8.0, growth="exponential")
    assert test.lr_at([0, 2, 4, 8, 12]) == pytest.approx([0.001, 0.003, 0.009, 0.081, 0.729], rel=1e-12)
    assert LRRangeTest(None, 1e-3, 4, 8.0).lr_at([0, 4, 8]) == pytest.approx([0.001, 0.009, 0.017])
    stairs = LRRangeTest(make_optimizer("SGD", groups=2), [1e-3, 2e-5], 2, 9.0, True, growth="exponential")
    assert stairs.lr_at(range(6)) == pytest.approx([0.001, 0.001, 0.01, 0.01, 0.1, 0.1], rel=1e-12)
    stairs.step(3)
    assert rates(stairs.optimizer) == pytest.approx([0.1, 2e-3])


def test_an_exponential_range_test_that_nobody_stops_ends_at_infinity_and_raises_nothing() -> None:
    for rate in (99.0, 1e308):
        optimizer = make_optimizer("SGD", tensor=rate == 99.0)
        test = LRRangeTest(optimizer, 1e-4, 1, rate, growth="exponential")
        test.step(10_000)
        assert rates(optimizer) == [float("inf")]


@every
@both_modes
def test_one_index_or_any_sequence_of_them_can_be_evaluated(cls: Any, arguments: Any, corrected: bool) -> None:
    schedule = cls(None, **arguments, corrected=corrected)
    expected = [schedule.lr_at(k) for k in range(12)]
    assert all(type(value) is float for value in expected)
    for steps in (range(12), list(range(12)), numpy.arange(12), torch.arange(12), (k for k in range(12))):
        assert schedule.lr_at(steps) == expected
    for step in (7, numpy.int64(7), torch.tensor(7), numpy.array(7)):
        assert schedule.lr_at(step) == expected[7]
    assert schedule.last_epoch == 0


@every
def test_a_step_before_the_first_is_refused(cls: Any, arguments: Any) -> None:
    for step in (-1, [0, -1], numpy.array([-1])):
        with pytest.raises(ValueError, match="got -1; steps are counted from 0"):
            cls(None, **arguments).lr_at(step)


@both_modes
def test_momentum_can_be_evaluated_alike_and_is_none_where_none_is_cycled(corrected: bool) -> None:
    cycle = OneCycle(None, 0.01, 0.1, cycle_first_step_size=4, corrected=corrected)
    expected = [0.9 if corrected else 0.8, 0.875, 0.85, 0.825, 0.8, 0.825, 0.85, 0.875, 0.9]
    for steps in (range(9), numpy.arange(9), torch.arange(9)):
        assert cycle.momentum_at(steps) == pytest.approx(expected)
    assert cycle.momentum_at(torch.tensor(2)) == pytest.approx(0.85)
    still = OneCycle(None, 0.01, 0.1, cycle_momentum=False)
    assert still.momentum_at(3) is None
    assert still.momentum_at(range(3)) is None
    assert WarmupLR(None).momentum_at(3) is None


def test_without_an_optimizer_there_are_as_many_groups_as_values() -> None:
    cycle = OneCycle(None, [0.01, 0.02], [0.1, 0.2], cycle_first_step_size=2)
    assert [cycle.lr_at(2, group) for group in (0, 1)] == pytest.approx([0.1, 0.2])
    assert len(cycle.get_lr()) == 2


@of_any_arguments
@given(case=any_schedule, corrected=st.booleans())
def test_evaluation_equals_stepping(case: Any, corrected: bool) -> None:
    cls, arguments = case
    schedule = cls(make_optimizer(), **arguments, corrected=corrected)
    untouched = cls(make_optimizer(), **arguments, corrected=corrected)
    assert schedule.get_lr() == schedule.get_last_lr() == rates(schedule.optimizer)
    for k, (lr, mom) in enumerate(trace(schedule, 40)):
        assert untouched.lr_at(k) == lr
        cycled = untouched.momentum_at(k)
        assert cycled is None or cycled == mom
    assert schedule.get_lr() == schedule.get_last_lr() == rates(schedule.optimizer)


@of_any_arguments
@given(case=one_cycles() | warmups(), corrected=st.booleans())
def test_the_rate_never_leaves_its_bounds(case: Any, corrected: bool) -> None:
    cls, arguments = case
    schedule = cls(make_optimizer(), **arguments, corrected=corrected)
    if cls is OneCycle:
        low = 0.0 if arguments["decay_lr_rate"] else arguments["cycle_min_lr"]
        high = arguments["cycle_max_lr"]
    elif cls is WarmupCosineLR:
        low, high = 0.0, LR
    else:
        low, high = arguments["warmup_min_lr"], arguments["warmup_max_lr"]
    room = 1e-12 * high
    assert all(low - room <= lr <= high + room for lr in schedule.lr_at(range(60)))


@of_any_arguments
@given(case=any_schedule, corrected=st.booleans(), at=st.integers(0, 30))
def test_a_schedule_goes_on_from_any_saved_step(case: Any, corrected: bool, at: int) -> None:
    cls, arguments = case
    whole = cls(make_optimizer(), **arguments, corrected=corrected)
    trace(whole, at)
    resumed = cls(make_optimizer(), **arguments, corrected=corrected)
    resumed.optimizer.load_state_dict(whole.optimizer.state_dict())
    resumed.load_state_dict(whole.state_dict())
    assert trace(resumed, 10) == trace(whole, 10)


# -- state ---------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("state", [{"last_batch_iteration": 4}, {"last_epoch": 5, "_step_count": 6, "base_lrs": [9.0]}])
def test_deepspeeds_state_and_torchs_are_loaded_alike(cls: Any, arguments: Any, state: dict[str, Any]) -> None:
    schedule = cls(make_optimizer(), **arguments)
    assert isinstance(schedule, LRScheduler)
    assert schedule.state_dict() == {"last_batch_iteration": -1}
    expected = schedule.lr_at([5, 6])
    schedule.load_state_dict(state)
    assert schedule.get_lr() == schedule.get_last_lr() == [expected[0]]
    schedule.step()
    assert rates(schedule.optimizer) == [expected[1]]
    assert schedule.state_dict() == {"last_batch_iteration": 5}
    assert (schedule.last_epoch, schedule.last_batch_iteration) == (6, 5)
    with pytest.raises(KeyError, match="expected last_batch_iteration or last_epoch"):
        schedule.load_state_dict({"step": 3})


@every
def test_loading_leaves_the_groups_to_the_optimizers_own_state(cls: Any, arguments: Any) -> None:
    resumed = cls(make_optimizer(), **arguments, last_batch_iteration=4)
    assert rates(resumed.optimizer) == [LR]
    resumed.step()
    assert rates(resumed.optimizer) == [resumed.lr_at(6)]
    optimizer = make_optimizer()
    keys = set(optimizer.param_groups[0])
    schedule = cls(optimizer, **arguments)
    assert set(optimizer.param_groups[0]) == keys and "step" not in vars(optimizer)
    before = copy.deepcopy(optimizer.param_groups[0]["lr"])
    schedule.load_state_dict({"last_batch_iteration": 4})
    assert rates(optimizer) == [before]


@every
def test_loading_into_a_corrected_schedule_writes_rate_and_momentum(cls: Any, arguments: Any) -> None:
    optimizer = make_optimizer()
    schedule = cls(optimizer, **arguments, corrected=True)
    schedule.load_state_dict({"last_batch_iteration": 4})
    assert rates(optimizer) == [schedule.lr_at(5)]
    assert schedule.momentum_at(5) in (None, momentum(optimizer))


# -- on any optimizer ----------------------------------------------------------------------------------------


@every
@both_modes
def test_a_tensor_rate_keeps_its_identity(cls: Any, arguments: Any, corrected: bool) -> None:
    optimizer = make_optimizer(tensor=True)
    tensor = optimizer.param_groups[0]["lr"]
    schedule = cls(optimizer, **arguments, corrected=corrected)
    base = schedule.base_lrs[0].clone()
    seen = []
    for _ in range(8):
        seen.append(float(tensor))
        schedule.step()
        assert optimizer.param_groups[0]["lr"] is tensor
    assert seen == pytest.approx(cls(make_optimizer(), **arguments, corrected=corrected).lr_at(range(8)), rel=1e-6)
    assert torch.equal(schedule.base_lrs[0], base), "the rate to start from is a copy"


@every
def test_stepping_still_reaches_groups_that_loading_an_optimizer_replaced(cls: Any, arguments: Any) -> None:
    optimizer = make_optimizer()
    schedule = cls(optimizer, **arguments)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trace(schedule, 3)
    assert rates(optimizer) == [schedule.lr_at(3)]


@every
def test_a_wrapper_that_holds_an_optimizer_is_looked_into(cls: Any, arguments: Any) -> None:
    class Wrapper:
        def __init__(self) -> None:
            self.optimizer = make_optimizer()

    wrapper = Wrapper()
    schedule = cls(wrapper, **arguments)
    schedule.step()
    assert rates(wrapper.optimizer) == [schedule.lr_at(1)]
    for thing in (nn.Linear(1, 1), "Adam", object()):
        with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
            cls(thing, **arguments)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (LRRangeTest, {"lr_range_test_step_size": 0}, "lr_range_test_step_size: got 0; expected an integer >= 1"),
        (LRRangeTest, {"lr_range_test_step_size": 2.5}, "lr_range_test_step_size: got 2.5"),
        (
            OneCycle,
            {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 0},
            "cycle_first_step_size: got 0",
        ),
        (OneCycle, {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_second_step_size": -1}, "cycle_second_step_size"),
        (WarmupLR, {"warmup_num_steps": 0}, "warmup_num_steps: got 0; expected an integer >= 1"),
        (WarmupLR, {"warmup_min_lr": [0.0, 0.1]}, "warmup_min_lr: got 2 values for 1 parameter groups; give one each"),
        (LRRangeTest, {"growth": "geometric"}, 'growth: got \'geometric\'; expected "linear" or "exponential"'),
        (LRRangeTest, {"growth": "exponential", "lr_range_test_step_rate": -1.0}, "step_rate: got -1.0; expected more"),
    ],
)
def test_sizes_that_make_no_schedule_are_refused(cls: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(make_optimizer(), **arguments)


def test_an_unknown_warmup_type_runs_as_log_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="redline.schedulers"):
        odd = WarmupLR(None, 0.0, 0.1, 5, "cubic")
    assert "warmup_type: got 'cubic'; expected log or linear; running with log" in caplog.text
    assert odd.lr_at(range(8)) == WarmupLR(None, 0.0, 0.1, 5, "log").lr_at(range(8))


# -- corrected -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["log", "linear"])
@pytest.mark.parametrize("updates", [1, 2, 5])
def test_corrected_a_warmup_starts_above_its_minimum_and_peaks_at_its_last_update(shape: str, updates: int) -> None:
    hold = WarmupLR(None, 0.0, 0.1, updates, shape, corrected=True).lr_at(range(updates + 3))
    fall = WarmupDecayLR(None, 9, 0.0, 0.1, updates, shape, corrected=True).lr_at(range(updates))
    cosine = WarmupCosineLR(make_optimizer(), 9, 0.0, updates, 0.01, shape, corrected=True).lr_at(range(updates))
    for values, peak in ((hold, 0.1), (fall, 0.1), (cosine, LR)):
        assert values[0] > 0
        assert values[:updates] == sorted(values[:updates])
        assert values[updates - 1] == pytest.approx(peak, rel=1e-12)
        assert all(value < peak for value in values[: updates - 1])
    assert hold[updates:] == pytest.approx([0.1] * 3, rel=1e-12)


@pytest.mark.parametrize("shape", ["log", "linear"])
def test_corrected_no_update_runs_at_zero_and_the_last_one_is_the_lowest(shape: str) -> None:
    fall = WarmupDecayLR(None, 10, 0.0, 0.1, 3, shape, corrected=True).lr_at(range(10))
    assert min(fall) > 0
    assert fall[2:] == sorted(fall[2:], reverse=True)
    cosine = WarmupCosineLR(make_optimizer(), 10, 0.0, 3, 0.2, shape, corrected=True).lr_at(range(12))
    assert min(cosine) > 0
    assert cosine[9:] == pytest.approx([0.2 * LR] * 3, rel=1e-12)
    assert cosine[8] > cosine[9]
    to_zero = WarmupCosineLR(make_optimizer(), 10, 0.0, 3, 0.0, shape, corrected=True).lr_at(range(10))
    assert min(to_zero[:-1]) > 0 and to_zero[-1] == 0.0


def test_corrected_a_decay_defaults_to_the_optimizers_rate() -> None:
    assert WarmupDecayLR(make_optimizer(), 10, warmup_num_steps=3, corrected=True).lr_at(2) == pytest.approx(LR)
    assert WarmupDecayLR(make_optimizer(), 10, 0.0, 0.001, 3, corrected=True).lr_at(2) == pytest.approx(0.001)
    assert WarmupDecayLR(make_optimizer(), 10, warmup_num_steps=3).lr_at(3) == pytest.approx(0.001)


def test_corrected_a_cycle_starts_with_its_highest_momentum_and_keeps_the_second_beta() -> None:
    optimizer = make_optimizer(betas=(0.7, 0.98))
    schedule = OneCycle(optimizer, 0.01, 0.1, cycle_first_step_size=2, corrected=True)
    betas = [optimizer.param_groups[0]["betas"]]
    for _ in range(5):
        schedule.step()
        betas.append(optimizer.param_groups[0]["betas"])
    assert [first for first, _ in betas] == pytest.approx([0.9, 0.85, 0.8, 0.85, 0.9, 0.9])
    assert {second for _, second in betas} == {0.98}
    of_sgd = OneCycle(make_optimizer("SGD", momentum=0.5), 0.01, 0.1, cycle_first_step_size=2, corrected=True)
    assert [mom for _, mom in trace(of_sgd, 6)] == pytest.approx([0.9, 0.85, 0.8, 0.85, 0.9, 0.9])


def test_as_deepspeed_a_cycle_leaves_the_momentum_of_sgd_alone_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="redline.schedulers"):
        schedule = OneCycle(make_optimizer("SGD", momentum=0.5), 0.01, 0.1, cycle_first_step_size=2)
    assert "SGD has no betas, so momentum is not cycled" in caplog.text
    assert {mom for _, mom in trace(schedule, 6)} == {0.5}


def test_corrected_momentum_decays_downwards_where_deepspeeds_grows() -> None:
    def after(corrected: bool) -> list[float]:
        cycle = OneCycle(None, 0.01, 0.1, cycle_first_step_size=2, decay_step_size=1, decay_mom_rate=0.1,
                         corrected=corrected)  # fmt: skip
        values = cycle.momentum_at(range(6, 12))
        assert values is not None
        return values

    assert after(True) == sorted(after(True), reverse=True)
    assert after(True)[0] < 0.9
    assert after(False) == sorted(after(False))
    assert max(after(False)) > 1.0


def test_corrected_a_decay_rate_alone_is_enough_to_decay() -> None:
    arguments = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 2, "decay_lr_rate": 1.0}
    assert OneCycle(None, **arguments).lr_at(20) == 0.01
    values = OneCycle(None, **arguments, corrected=True).lr_at(range(4, 8))
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.005


# -- quirks --------------------------------------------------------------------------------------------------


def test_each_schedule_tells_its_own_quirks_and_a_corrected_one_has_none() -> None:
    assert all(cls(make_optimizer(), **arguments, corrected=True).quirks == () for cls, arguments in EVERY)
    adam, sgd = make_optimizer(), make_optimizer("SGD", momentum=0.9)
    assert LRRangeTest(adam).quirks == ()
    assert OneCycle(adam, 0.01, 0.1).quirks == (
        "the first step has momentum 0.8, the minimum",
        "the second beta is set to 0.99",
    )
    assert OneCycle(sgd, 0.01, 0.1, cycle_min_mom=0.7).quirks == ("the first step has momentum 0.7, the minimum",)
    assert OneCycle(adam, 0.01, 0.1, cycle_momentum=False).quirks == ()
    assert WarmupLR(adam, 0.001).quirks == ("the first two steps have warmup_min_lr, 0.001",)
    assert WarmupCosineLR(adam, 2000, warmup_type="linear").quirks == (
        "the first two steps have learning rate 0",
        "the peak is never reached",
    )
    assert WarmupCosineLR(adam, 2000, warmup_min_ratio=0.1).quirks == ("the first step has learning rate 0",)
