"""Fused steps against torch's unfused ones: any memory layout, late gradients, state of another dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from redline import initialize
from redline.errors import EngineError
from redline.optimizers import build_optimizer, guard_steps
from redline.optimizers.fused import is_fusable
from tests.distributed import run_ranks

BASE = torch.linspace(-1, 1, 24).reshape(4, 6)
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: BASE.clone(),
    "slice of columns": lambda: BASE.clone()[:, ::2],
    "transposed": lambda: BASE.clone().t(),
    "one column": lambda: BASE.clone()[:, :1],
    "channels_last": lambda: torch.linspace(-1, 1, 48).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
    "no rows": lambda: torch.zeros(0, 4),
    "no columns": lambda: torch.zeros(4, 0),
    "scalar": lambda: torch.tensor(2.0),
    "one element": lambda: torch.ones(1, 1),
    "complex": lambda: torch.complex(BASE.clone(), BASE.flip(0)),
}
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"weight_decay": 0.1}),
    ("Adam", {"adam_w_mode": False, "amsgrad": True}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adagrad", {"lr_decay": 0.1}),
]
OWNERS = ("the config's", "the script's own", "the config's, observed by a hook")
by_optimizer = pytest.mark.parametrize(("name", "given"), OPTIMIZERS, ids=lambda value: str(value))
by_owner = pytest.mark.parametrize("owner", OWNERS)


def unfused(name: str, given: dict[str, Any], params: list[nn.Parameter]) -> Optimizer:
    options = {key: value for key, value in given.items() if key != "adam_w_mode"}
    optimizer: Optimizer = getattr(torch.optim, name)(params, lr=0.1, foreach=False, **options)
    return optimizer


def fused(owner: str, name: str, given: dict[str, Any], params: list[nn.Parameter]) -> Optimizer:
    if owner == "the script's own":
        options = {key: value for key, value in given.items() if key != "adam_w_mode"}
        return guard_steps(getattr(torch.optim, name)(params, lr=0.1, fused=True, **options))
    optimizer = build_optimizer(name, {"lr": 0.1, **given}, params)
    if "hook" in owner:
        optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def gradient(param: Tensor, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(param.shape, dtype=param.dtype, generator=draw)


def in_reverse(tensor: Tensor) -> Tensor:
    """The same values, the first dimension innermost in memory."""
    order = list(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def in_gaps(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous, "in reverse": in_reverse, "in gaps": in_gaps,
    "expanded": lambda tensor: tensor.sum().expand(tensor.shape),
}  # fmt: skip


@by_owner
@by_optimizer
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_parameters_and_gradients_changes_no_number(
    layout: str, name: str, given: dict[str, Any], owner: str
) -> None:
    if layout == "complex" and owner == "the script's own":
        pytest.skip("torch refuses fused=True for complex parameters")
    for memory in MEMORY.values():
        ours, theirs = nn.Parameter(LAYOUTS[layout]()), nn.Parameter(LAYOUTS[layout]())
        mine, plain = fused(owner, name, given, [ours]), unfused(name, given, [theirs])
        for step in range(3):
            ours.grad, theirs.grad = (memory(gradient(theirs, step)) for _ in range(2))
            mine.step()
            plain.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@by_owner
@by_optimizer
def test_a_parameter_may_change_its_layout_between_steps(name: str, given: dict[str, Any], owner: str) -> None:
    ours, theirs = (nn.Parameter(LAYOUTS["channels_last"]()) for _ in range(2))
    mine, plain = fused(owner, name, given, [ours]), unfused(name, given, [theirs])
    for step in range(4):
        if step == 2:
            ours.data = ours.data.contiguous()
        ours.grad = gradient(theirs, step).to(memory_format=torch.channels_last)
        theirs.grad = gradient(theirs, step)
        mine.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_neighbours_in_memory_of_a_slice_stay_as_they_are() -> None:
    whole = BASE.clone()
    param = nn.Parameter(whole[:, ::2])
    optimizer = build_optimizer("AdamW", {"lr": 0.1}, [param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(whole[:, 1::2], BASE[:, 1::2])
    assert not torch.equal(whole[:, ::2], BASE[:, ::2])


def test_loaded_state_of_another_layout_is_taken_element_by_element() -> None:
    last, first = (nn.Parameter(LAYOUTS["channels_last"]().contiguous(memory_format=each)) for each in (
        torch.channels_last, torch.contiguous_format))  # fmt: skip
    optimizers = [build_optimizer("AdamW", {"lr": 0.1}, [param]) for param in (last, first)]
    last.grad = gradient(last, 0)
    optimizers[0].step()
    first.data.copy_(last.data)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for param, optimizer in zip((last, first), optimizers):
        param.grad = gradient(param, 1)
        optimizer.step()
    torch.testing.assert_close(last, first)


def test_only_dense_floating_point_parameters_are_fusable() -> None:
    assert [name for name, make in LAYOUTS.items() if not is_fusable(make())] == [
        "slice of columns", "one column", "complex",
    ]  # fmt: skip


def test_a_group_that_no_kernel_can_take_is_unfused_when_it_is_added_later() -> None:
    optimizer = build_optimizer("AdamW", {"lr": 0.1}, [nn.Parameter(torch.ones(2))])
    late = nn.Parameter(LAYOUTS["slice of columns"]())
    optimizer.add_param_group({"params": [late]})
    assert [bool(group["fused"]) for group in optimizer.param_groups] == [True, False]


def test_an_expanded_parameter_is_refused_by_name_where_it_would_train() -> None:
    model = nn.Linear(4, 4)
    model.bias = nn.Parameter(torch.ones(1).expand(4))
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    with pytest.raises(EngineError, match=r"parameter bias of shape \(4,\) is an expanded tensor"):
        initialize(model, config, device="cpu")
    model.bias.requires_grad_(False)
    initialize(model, config, device="cpu")


# -- gradients that come late, or not at all -----------------------------------------------------------------------


@by_owner
@by_optimizer
def test_a_late_first_gradient_trains_as_unfused_and_resets_nothing(
    name: str, given: dict[str, Any], owner: str
) -> None:
    sets = [[nn.Parameter(torch.ones(3)), nn.Parameter(BASE.clone()), nn.Parameter(torch.ones(2))] for _ in range(2)]
    both = fused(owner, name, given, sets[0]), unfused(name, given, sets[1])
    for step, missing in enumerate([{0, 2}, {0, 2}, {2}, {1, 2}, set()]):
        for params, optimizer in zip(sets, both):
            for index, param in enumerate(params):
                param.grad = None if index in missing else gradient(param, 10 * step + index)
            optimizer.step()
        torch.testing.assert_close(sets[0], sets[1], rtol=1e-5, atol=1e-6)


@by_owner
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_a_first_step_that_is_skipped_leaves_sgd_as_if_it_had_not_been(dampening: float, owner: str) -> None:
    given = {"momentum": 0.9, "dampening": dampening}
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    mine, plain = fused(owner, "SGD", given, [ours]), unfused("SGD", given, [theirs])
    mine.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    ours.grad = torch.full((3,), torch.inf)
    mine.step()
    assert torch.equal(ours, torch.ones(3))
    for step in range(3):
        mine.found_inf, mine.grad_scale = torch.tensor(0.0), torch.tensor(4.0)  # type: ignore[attr-defined]
        ours.grad, theirs.grad = 4 * gradient(ours, step), gradient(theirs, step)
        mine.step()
        plain.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "given"), [("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {})], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, of its Adagrad
def test_a_sparse_gradient_takes_the_unfused_step(name: str, given: dict[str, Any]) -> None:
    ours, theirs = nn.Parameter(BASE.clone()), nn.Parameter(BASE.clone())
    mine, plain = build_optimizer(name, {"lr": 0.1, **given}, [ours]), unfused(name, given, [theirs])
    for step in range(3):
        for param, optimizer in ((ours, mine), (theirs, plain)):
            param.grad = (torch.eye(4, 6) * (step + 1)).to_sparse(1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert mine.param_groups[0]["fused"]


def test_frozen_parameters_of_another_dtype_do_not_stop_a_fused_group() -> None:
    frozen, param, alone = nn.Parameter(torch.ones(2).bfloat16()), *(nn.Parameter(torch.ones(2)) for _ in range(2))
    mine, plain = build_optimizer("AdamW", {"lr": 0.1}, [frozen.requires_grad_(False), param]), None
    plain = unfused("AdamW", {"weight_decay": 0.0}, [alone])
    for step in range(2):
        param.grad, alone.grad = gradient(param, step), gradient(param, step)
        mine.step()
        plain.step()
    torch.testing.assert_close(param, alone)
    assert torch.equal(frozen, torch.ones(2).bfloat16()) and frozen not in mine.state


def thaw(stage: int) -> tuple[list[float], list[float]]:
    """The first elements of two momentum buffers, over the first gradient, of a rate of 0 and the same batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    sgd = {"type": "SGD", "params": {"lr": 0.0, "momentum": 0.9, "dampening": 0.5}}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": sgd,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
    }
    engine = initialize(model, config, device="cpu", model_parameters=list(model.parameters()))
    assert engine.optimizer is not None
    seen: tuple[list[float], list[float]] = [], []
    for step in range(4):
        if step == 2:
            model[0].requires_grad_(True)
        engine.backward(engine(torch.ones(4, 4)).square().mean())
        engine.step()
        for layer, found in zip((model[0], model[1]), seen):
            layer.weight.grad = layer.bias.grad = None
            buffer: Any = engine.optimizer.state.get(cast(Tensor, layer.weight), {}).get("momentum_buffer")
            if buffer is not None:
                found.append(float((buffer.full_tensor() if hasattr(buffer, "full_tensor") else buffer).flatten()[0]))
    return seen


def test_a_shard_that_thaws_has_no_dampening_at_first_and_leaves_other_momenta_alone() -> None:
    for late, early in run_ranks(thaw, 2, 3):
        # m <- 0.9 m + 0.5 g, from g on
        assert [each / early[0] for each in early] == pytest.approx([1, 1.4, 1.76, 2.084], rel=1e-4)
        assert [each / late[-2] for each in late[-2:]] == pytest.approx([1, 1.4], rel=1e-4)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "RMSprop"])
@pytest.mark.parametrize("owner", ["the config's", "the script's own, trained", "the script's own, fused and trained"])
def test_a_model_that_is_bf16_before_trains_with_fp32_state(name: str, owner: str) -> None:
    if "fused" in owner and name == "RMSprop":
        pytest.skip("torch has no fused RMSprop")
    torch.manual_seed(0)
    model = nn.Linear(4, 4).bfloat16()
    params = {"lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}
    config: dict[str, Any] = {"train_batch_size": 2, "bf16": {"enabled": True}}
    optimizer = None
    if owner == "the config's":
        config["optimizer"] = {"type": name, "params": params}
    else:
        choice = {"fused": True} if "fused" in owner else {}
        optimizer = getattr(torch.optim, name)(model.parameters(), **params, **choice)
        model(torch.ones(2, 4).bfloat16()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    engine = initialize(model, config, optimizer=optimizer, device="cpu")
    losses = []
    for _ in range(3):
        losses.append(engine(torch.ones(2, 4)).float().square().mean())
        engine.backward(losses[-1])
        engine.step()
    assert engine.optimizer is not None and losses[-1] < losses[0]
    kept = [value for each in engine.optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    assert {value.dtype for value in kept if value.ndim} == {torch.float32}


# -- sparse embeddings ---------------------------------------------------------------------------------------------


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2, sparse=True)

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.used(rows)
        return found


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=str)
def test_sparse_adam_trains_what_is_used_and_leaves_other_rows_and_tables(own: bool, precision: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = TwoTables()
    before = [table.weight.detach().clone() for table in (model.used, model.unused)]
    config: dict[str, Any] = {"train_batch_size": 2, **precision}
    if not own:
        config["optimizer"] = {"type": "SparseAdam", "params": {"lr": 0.1}}
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=0.1) if own else None
    engine = initialize(model, config, optimizer=optimizer, device="cpu")
    for _ in range(2):
        engine.backward(engine(torch.tensor([1, 2])).float().square().mean())
        engine.step()
    moved = [(table.weight - old).abs().sum(1) > 0.05 for table, old in zip((model.used, model.unused), before)]
    assert moved[0].tolist() == [False, True, True, False, False]
    assert not moved[1].any()


def sparse_adam_at_every_stage() -> list[str | list[Tensor]]:
    """By stage, the two tables after two steps, or the error."""
    found: list[str | list[Tensor]] = []
    torch.sparse.check_sparse_tensor_invariants.disable()  # torch warns where nothing was chosen
    for stage in range(4):
        torch.manual_seed(0)
        config = {
            "train_batch_size": 2,
            "optimizer": {"type": "SparseAdam", "params": {"lr": 0.1}},
            "zero_optimization": {"stage": stage},
        }
        try:
            engine = initialize(TwoTables(), config, device="cpu")
            for _ in range(2):
                rows = torch.tensor([1, 2]) if engine.world_size == 1 else torch.tensor([1 + engine.global_rank])
                engine.backward(engine(rows).square().mean())
                engine.step()
        except EngineError as error:
            found.append(str(error))
        else:
            found.append([table.weight.detach().clone() for table in (engine.module.used, engine.module.unused)])
    return found


def test_sparse_adam_trains_on_two_ranks_as_on_one_but_for_stages_1_and_2_which_refuse_it() -> None:
    ((alone, *_),) = run_ranks(sparse_adam_at_every_stage, 1)
    for found in run_ranks(sparse_adam_at_every_stage, 2):
        for stage in (0, 3):
            torch.testing.assert_close(found[stage], alone)
        for stage in (1, 2):
            assert "SparseAdam" in found[stage]
            assert "stage 0 or 3" in found[stage]
