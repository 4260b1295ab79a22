"""Full parameters with sharded master params: what a script sees of them, and what becomes of its writes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from redline import EngineError
from tests.by_hand import GRIDS, Case, Kinds, differences, exact, failures_of_kinds
from tests.distributed import run_ranks
from tests.engine.test_master_params import pair, step
from tests.plain_loop import Net


def written(case: Case, rank: int, write: Callable[[nn.Module], None]) -> str | None:
    """Two steps, a write into both models, two steps."""
    engine, hand = pair(case)
    step(case, engine, hand, 0)
    write(engine.module)
    shown = {name: param.detach().clone() for name, param in hand.model.named_parameters()}
    write(hand.model)
    with torch.no_grad():
        for name, param in hand.model.named_parameters():
            changed = param != shown[name]  # the other elements keep their precision
            hand.masters[name].copy_(torch.where(changed, param.detach().float(), hand.masters[name]))
    engine.train()  # finds the writes that leave no trace in a tensor's version
    step(case, engine, hand, 10)
    step(case, engine, hand, 20)
    return differences(case, engine, hand)


@torch.no_grad()
def copy_(model: Any) -> None:
    model.trunk.weight.copy_(torch.linspace(-0.5, 0.5, 24).view(6, 4))


@torch.no_grad()
def clamp_(model: Any) -> None:
    for param in model.parameters():
        param.clamp_(-0.125, 0.125)


def load(model: Any) -> None:
    model.load_state_dict(Net(seed=3).state_dict())


def vector_to_parameters(model: Any) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 0.5, model.parameters())


def through_data(model: Any) -> None:
    model.a.weight.data.mul_(2)


def of_writes(case: Case, rank: int) -> str | None:
    for write in (copy_, clamp_, load, vector_to_parameters, through_data):
        if fault := written(case, rank, write):
            return f"{write.__name__}: {fault}"
    return None


def swapped(case: Case, rank: int) -> str | None:
    """An average is swapped in for an evaluation, and the weights back."""
    engine, hand = pair(case)
    step(case, engine, hand, 0)
    before = exact(engine)
    backup = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    for how in ("data", "copy_"):
        for values in ({name: value * 0.5 for name, value in backup.items()}, backup):
            for name, param in engine.module.named_parameters():
                if how == "data":
                    param.data.copy_(values[name])
                else:
                    with torch.no_grad():
                        param.copy_(values[name])
    engine.train()
    step(case, engine, hand, 10)
    found = differences(case, engine, hand)
    again, _ = pair(case)
    step(case, again, _, 0)
    step(case, again, _, 10)
    exactly = all(torch.equal(mine, other) for mine, other in zip(exact(engine).values(), exact(again).values()))
    return found or (None if exactly and before else "the master params lost precision")


def shown_in_full(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    step(case, engine, hand, 0)
    for name, param in engine.module.named_parameters():
        if hasattr(param, "full_tensor") or param.dtype != case.dtype or param.shape != hand.masters[name].shape:
            return f"{name}: {type(param).__name__}, {param.dtype}, {tuple(param.shape)}"
    if rank == 0:  # on one rank alone
        state = engine.module.state_dict()
        copied = copy.deepcopy(engine.module)
        for name, value in copied.state_dict().items():
            if not torch.equal(value, state[name]):
                return f"{name}: the copy differs"
    return None


def replaced(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    step(case, engine, hand, 0)
    state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.module.load_state_dict(state, assign=True)
    try:
        step(case, engine, hand, 10)
    except EngineError as error:
        return None if "trunk.weight" in str(error) and "assign" in str(error) else f"it names nothing: {error}"
    return "it went on"


KINDS: Kinds = {
    "writes into the model": (of_writes, {"accumulations": (1,)}),
    "weights swapped for an average and back": (swapped, {"accumulations": (1,)}),
    "full parameters in the dtype of the computation": (shown_in_full, {"accumulations": (1,)}),
    "replaced parameter objects": (replaced, {"accumulations": (1,)}),
}


def on_all(ranks: int, every: int) -> dict[str, list[str]]:
    few = {"precisions": ("fp32", "bf16")} if ranks > 2 else {}
    return failures_of_kinds(KINDS, ranks, every, stages=(0, 1, 2), **few)


@GRIDS
def test_what_is_written_into_the_model_stays(ranks: int, every: int) -> None:
    found = run_ranks(on_all, ranks, ranks, every)  # one start for all kinds
    assert found == [{kind: [] for kind in KINDS}] * ranks
