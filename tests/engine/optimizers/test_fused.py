"""Our fused optimizers against torch's own fused ones: equal to the last bit, whatever happens to them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from redline.optimizers import fused as module
from redline.optimizers.fused import fused_class

Pair = tuple[Optimizer, Optimizer]
SHAPES = ((3, 2), (4,), (), (2, 2, 2))
FUSED = {"Adam": {}, "AdamW": {}, "SGD": {"momentum": 0.9}, "Adagrad": {}}
by_name = pytest.mark.parametrize("name", FUSED)


def make(cls: type[Optimizer], groups: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Optimizer:
    draw = torch.Generator().manual_seed(1)
    shapes = [SHAPES[each % len(SHAPES)] for each in range(2 * groups)]
    parameters = [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]
    return cls([{"params": parameters[each::groups]} for each in range(groups)], lr=0.1, fused=True, **options)


def pair(name: str, groups: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Pair:
    torchs = getattr(torch.optim, name)
    return make(torchs, groups, dtype, **options), make(fused_class(torchs), groups, dtype, **options)


def parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def feed(optimizer: Optimizer, step: int, without: tuple[int, ...] = ()) -> None:
    """Gradients of a step, the same for every optimizer; none for the parameters `without`."""
    draw = torch.Generator().manual_seed(100 + step)
    for index, parameter in enumerate(parameters(optimizer)):
        grad = torch.randn(parameter.shape, generator=draw)
        parameter.grad = None if index in without else grad.to(parameter.dtype)


def train(both: Pair, steps: int = 3, *, start: int = 0, without: tuple[int, ...] = ()) -> None:
    for step in range(start, start + steps):
        for optimizer in both:
            feed(optimizer, step, without)
            optimizer.step()


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def assert_same(both: Pair) -> None:
    torchs, ours = both
    assert same([*parameters(torchs)], [*parameters(ours)])
    assert same(torchs.state_dict(), ours.state_dict())


@pytest.fixture
def torch_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that one of ours left to torch."""
    taken: list[str] = []
    plain = module._DirectStep._torchs_step

    def noted(self: Any) -> None:
        taken.append(type(self).__name__)
        plain(self)

    monkeypatch.setattr(module._DirectStep, "_torchs_step", noted)
    return taken


# -- what they are ---------------------------------------------------------------------------------------------


@by_name
def test_it_is_torchs_optimizer_under_torchs_name(name: str) -> None:
    torchs, ours = pair(name, **FUSED[name])
    assert isinstance(ours, type(torchs)) and type(ours).__name__ == name
    assert type(ours) is not type(torchs)
    assert same(torchs.state_dict(), ours.state_dict())


def test_there_is_no_lean_class_where_torch_has_no_kernel() -> None:
    assert fused_class(torch.optim.RMSprop) is torch.optim.RMSprop


@by_name
def test_no_step_is_torchs(name: str, torch_steps: list[str]) -> None:
    ours = pair(name, **FUSED[name])[1]
    for step in range(3):
        feed(ours, step)
        ours.step()
    assert torch_steps == []


# -- equal to the last bit -------------------------------------------------------------------------------------

DECAY, MAXIMIZE = st.sampled_from([0.0, 0.01, 0.5]), st.booleans()
ADAM = st.fixed_dictionaries(
    {
        "weight_decay": DECAY,
        "maximize": MAXIMIZE,
        "amsgrad": st.booleans(),
        "eps": st.sampled_from([1e-8, 0.1]),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
    }
)
MOMENTA = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.5, "nesterov": True},
]
OPTIONS = {
    "Adam": ADAM,
    "AdamW": ADAM,
    "SGD": st.builds(
        lambda decay, maximize, momentum: {"weight_decay": decay, "maximize": maximize, **momentum},
        *(DECAY, MAXIMIZE, st.sampled_from(MOMENTA)),
    ),
    "Adagrad": st.fixed_dictionaries(
        {
            "weight_decay": DECAY,
            "maximize": MAXIMIZE,
            "lr_decay": st.sampled_from([0.0, 0.1]),
            "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
        }
    ),
}


@by_name
@settings(max_examples=40)
@given(data=st.data(), groups=st.integers(1, 3), rates=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_it_equals_torchs(name: str, data: st.DataObject, groups: int, rates: list[float]) -> None:
    follow(pair(name, groups, **data.draw(OPTIONS[name])), rates)


def follow(both: Pair, rates: list[float]) -> None:
    for step, rate in enumerate(rates):
        for optimizer in both:
            for index, group in enumerate(optimizer.param_groups):
                group["lr"] = rate / (1 + index)
        train(both, 1, start=step)
    assert_same(both)


@by_name
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_equal_torchs_too(name: str, dtype: torch.dtype, torch_steps: list[str]) -> None:
    both = pair(name, dtype=dtype, **FUSED[name])
    train(both)
    assert_same(both)
    assert torch_steps == []


# -- what goes to torch's own step, and stays right after it ------------------------------------------------------


@by_name
def test_a_parameter_whose_gradient_is_missing_at_times_keeps_its_own_count(name: str) -> None:
    both = pair(name, 2, weight_decay=0.1)
    for step, without in enumerate([(0,), (), (1, 3), (), (), (0, 1, 2, 3), ()]):
        train(both, 1, start=step, without=without)
        assert_same(both)


def test_no_state_is_made_for_a_parameter_that_never_had_a_gradient() -> None:
    both = pair("AdamW", 2)
    train(both, without=(1,))
    assert len(both[1].state) == 3
    assert_same(both)


def closure_of(optimizer: Optimizer) -> Callable[[], float]:
    def closure() -> float:
        assert torch.is_grad_enabled()
        feed(optimizer, 7)
        return 5.0

    return closure


@by_name
def test_a_closure_is_called_and_its_loss_returned(name: str) -> None:
    both = pair(name, **FUSED[name])
    train(both)
    assert [optimizer.step(closure_of(optimizer)) for optimizer in both] == [5.0, 5.0]
    assert_same(both)


@by_name
@pytest.mark.parametrize("made_before", [False, True], ids=["torch's never made", "torch's made before"])
def test_hooks_of_the_instance_and_of_all_optimizers_are_called_once(name: str, made_before: bool) -> None:
    ours = make(fused_class(getattr(torch.optim, name)), **FUSED[name])
    if made_before:
        make(getattr(torch.optim, name))
    seen: list[str] = []
    handles = [
        ours.register_step_pre_hook(lambda *_: seen.append("before")),
        ours.register_step_post_hook(lambda *_: seen.append("after")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all")),
    ]
    for step in range(2):
        feed(ours, step)
        ours.step()
    for handle in handles:
        handle.remove()
    ours.step()
    assert seen == ["before", "after", "all"] * 2


def test_the_profiler_sees_torchs_name_of_the_step() -> None:
    ours = pair("AdamW")[1]
    feed(ours, 0)
    ours.step()
    with torch.autograd.profiler.profile() as profile:
        ours.step()
    assert any(event.name == "Optimizer.step#AdamW.step" for event in profile.function_events or [])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("AdamW", {"lr": torch.tensor(0.05)}),
        ("Adam", {"fused": False}),
        ("Adam", {"fused": None, "foreach": True}),
        ("SGD", {"fused": False}),
        ("SGD", {"momentum": 0.5}),
        ("Adam", {"betas": (0.5, 0.5), "maximize": True, "weight_decay": 0.3}),
        ("Adagrad", {"fused": None}),
    ],
    ids=str,
)
def test_an_option_changed_under_way_is_obeyed(name: str, change: dict[str, Any]) -> None:
    both = pair(name)
    train(both)
    for optimizer in both:
        optimizer.param_groups[0].update(copy.deepcopy(change))
    train(both, start=3)
    assert_same(both)


def test_groups_of_mixed_types_equal_torchs() -> None:
    both = [
        cls([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))], lr=0.1, fused=True)
        for cls in (torch.optim.AdamW, fused_class(torch.optim.AdamW))
    ]
    for _ in range(3):
        for optimizer in both:
            for parameter in parameters(optimizer):
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert_same((both[0], both[1]))


@pytest.mark.parametrize("name", ["Adam", "AdamW"])  # the others' unfused steps take them, see test_fused
def test_a_sparse_gradient_is_an_error_as_in_torch(name: str) -> None:
    for optimizer in pair(name):
        feed(optimizer, 0)
        optimizer.step()
        first = next(parameters(optimizer))
        first.grad = torch.ones_like(first).to_sparse()
        with pytest.raises(RuntimeError, match=r"(?i)sparse"):
            optimizer.step()


# -- state that comes and goes ---------------------------------------------------------------------------------


@by_name
def test_loaded_state_is_the_state_that_is_used(name: str) -> None:
    both = pair(name, 2, **FUSED[name])
    train(both)
    saved, weights = both[0].state_dict(), [parameter.detach().clone() for parameter in parameters(both[0])]
    saved = copy.deepcopy(saved)
    train(both, 2, start=3)
    for optimizer in both:
        optimizer.load_state_dict(copy.deepcopy(saved))  # torch keeps what it is given
        for parameter, weight in zip(parameters(optimizer), weights):
            parameter.data.copy_(weight)
    train(both, 2, start=5)
    assert_same(both)


@by_name
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_by_itself(name: str, copied: Callable[[Optimizer], Optimizer]) -> None:
    both = pair(name, **FUSED[name])
    train(both)
    copies = (copied(both[0]), copied(both[1]))
    assert type(copies[1]) is type(both[1])
    train(copies, start=3)
    assert_same(copies)
    train(both, start=5)
    assert_same(both)


def test_state_replaced_by_hand_is_used() -> None:
    both = pair("AdamW")
    train(both)
    for optimizer in both:
        for state in optimizer.state.values():
            state["exp_avg"] = torch.ones_like(state["exp_avg"])
    train(both, start=3)
    assert_same(both)
    for optimizer in both:
        optimizer.state.clear()
    train(both, start=6)
    assert_same(both)


@by_name
def test_a_group_added_under_way_is_trained(name: str) -> None:
    both = pair(name, **FUSED[name])
    train(both)
    for optimizer in both:
        added = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer.add_param_group({"params": [added], "lr": 0.3})
        if name == "Adagrad" and optimizer is both[0]:  # torch 2.9's own makes state in its constructor alone
            optimizer.state[added] = {"step": torch.zeros(()), "sum": torch.zeros_like(added)}
        for parameter in parameters(optimizer):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.step()
    assert_same(both)


def test_state_dict_hooks_are_called() -> None:
    ours = pair("AdamW")[1]
    seen: list[str] = []
    ours.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    ours.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    ours.load_state_dict(ours.state_dict())
    assert seen == ["save", "load"]


# -- loss scales, schedules, compilation -----------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_a_loss_scale_is_divided_out_and_an_overflow_leaves_all_as_it_was(name: str, overflow: float) -> None:
    both = pair(name, 2, **FUSED[name])
    train(both)
    before = copy.deepcopy(both[1].state_dict()), [parameter.detach().clone() for parameter in parameters(both[1])]
    assert both[1]._step_supports_amp_scaling  # type: ignore[attr-defined]  # so does torch's, but Adagrad's of 2.9
    for optimizer in both:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(overflow)  # type: ignore[attr-defined]
    train(both, 1, start=3)
    assert_same(both)
    after = both[1].state_dict(), [*parameters(both[1])]
    assert same(before, after) is bool(overflow)
    for optimizer in both:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    train(both, start=4)
    assert_same(both)


def test_torchs_grad_scaler_drives_it() -> None:
    both = pair("AdamW")
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in both]
    for step in range(4):
        for optimizer, scaler in zip(both, scalers):
            feed(optimizer, step)
            if step == 2:
                grad = next(parameters(optimizer)).grad
                assert grad is not None
                grad.fill_(float("inf"))
            scaler.scale(torch.ones(1))
            scaler.step(optimizer)
            scaler.update()
    assert_same(both)
    assert [scaler.get_scale() for scaler in scalers] == [2.0, 2.0]


@by_name
def test_torchs_schedules_move_its_rate_and_know_that_it_stepped(name: str) -> None:
    both = pair(name, 2, **FUSED[name])
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in both]
    for step in range(5):  # torch warns, here an error, when a schedule's step comes before the optimizer's
        train(both, 1, start=step)
        for schedule in schedules:
            schedule.step()
    assert_same(both)


def test_gradients_may_be_on_or_off_around_a_step_and_stay_so() -> None:
    ours = pair("AdamW")[1]
    feed(ours, 0)
    ours.step()
    ours.step()
    assert torch.is_grad_enabled()
    with torch.no_grad():
        ours.step()
        assert not torch.is_grad_enabled()


def test_a_kernel_that_fails_leaves_gradients_on() -> None:
    ours = pair("AdamW")[1]
    feed(ours, 0)
    ours.step()
    next(iter(ours.state.values()))["exp_avg"] = "nonsense"
    with pytest.raises(TypeError):
        ours.step()
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
def test_a_compiled_step_is_torchs() -> None:
    both = pair("AdamW")
    for optimizer in both:
        compiled = torch.compile(optimizer.step, backend="eager")
        for step in range(3):
            feed(optimizer, step)
            compiled()
    assert_same(both)
