"""What trains: the optimizer's parameters that require gradients now; in every precision, at every stage."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from redline import Engine, EngineError
from tests.by_hand import GRIDS, ByHand, Case, Kinds, build, differences, exact, failures_of_kinds, loss_of
from tests.distributed import run_ranks
from tests.plain_loop import Net

BOTH = ("branch", "a", "b")


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def step(case: Case, engine: Engine, hand: ByHand, first: int, *routes: tuple[str, ...]) -> None:
    """One optimizer step of both."""
    routes = routes or (BOTH,)
    rank = engine.global_rank
    for number in range(first, first + case.accumulation):
        route = routes[rank % len(routes)]
        engine.backward(loss_of(engine, number, rank, *route, dtype=case.dtype))
        engine.step()
        hand.micro_batch(number, *routes)
    hand.step()


def pair(case: Case, frozen: tuple[str, ...] = (), **arguments: Any) -> tuple[Engine, ByHand]:
    """An engine and the loop, of equal models of which some modules are frozen."""
    models = Net(), Net()
    for model in models:
        for name in frozen:
            getattr(model, name).requires_grad_(False)
    hand = ByHand(case, world_size(), models[1])
    if case.stage < 3:  # what is frozen has no master param: of its value only the model's dtype is left
        for name, param in models[1].named_parameters():
            if not param.requires_grad:
                hand.masters[name].copy_(param.detach())
    return build(case, models[0], **arguments), hand


def set_flags(engine: Engine, hand: ByHand, flag: bool, *names: str) -> None:
    for model in (engine.module, hand.model):
        for name in names:
            getattr(model, name).requires_grad_(flag)


# -- kinds: each returns what is wrong ---------------------------------------------------------------------


def frozen_in_the_optimizer(case: Case, rank: int) -> str | None:
    engine, hand = pair(case, ("branch", "a"))
    before = exact(engine)
    for number in range(3):
        step(case, engine, hand, 10 * number)
    after = exact(engine)
    kept = [name for name in after if name.split(".")[0] in ("branch", "a")]
    moved = [name for name in kept if not torch.equal(before[name], after[name])]
    frozen = [p for name in ("branch", "a") for p in getattr(engine.module, name).parameters()]
    masters = {} if engine.master_params is None else engine.master_params.of
    optimizer = engine.optimizer
    assert optimizer is not None
    costs = [p.shape for p in frozen if p in masters or p in optimizer.state or p.grad is not None]
    return differences(case, engine, hand) or (f"moved: {moved}; cost memory: {costs}" if moved or costs else None)


def frozen_later(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    step(case, engine, hand, 0)
    before = exact(engine)
    set_flags(engine, hand, False, "branch", "b")
    for number in range(1, 3):
        step(case, engine, hand, 10 * number)
    after = exact(engine)
    kept = [name for name in after if name.split(".")[0] in ("branch", "b")]
    moved = [name for name in kept if not torch.equal(before[name], after[name])]
    return differences(case, engine, hand) or (f"moved: {moved}" if moved else None)


def thawed_later(case: Case, rank: int) -> str | None:
    engine, hand = pair(case, ("branch", "a"))
    step(case, engine, hand, 0)
    set_flags(engine, hand, True, "branch")
    step(case, engine, hand, 10)
    step(case, engine, hand, 20)
    set_flags(engine, hand, False, "trunk")
    set_flags(engine, hand, True, "a")
    step(case, engine, hand, 30)
    set_flags(engine, hand, True, "trunk")
    step(case, engine, hand, 40)
    return differences(case, engine, hand)


def written_while_frozen(case: Case, rank: int) -> str | None:
    engine, hand = pair(case, ("branch",))
    step(case, engine, hand, 0)
    set_flags(engine, hand, True, "branch")
    step(case, engine, hand, 10)
    set_flags(engine, hand, False, "branch")
    step(case, engine, hand, 20)
    value = torch.linspace(-1, 1, 36).view(6, 6).to(case.dtype).float()
    with torch.no_grad():
        param: Any = engine.module.branch.weight
        if hasattr(param, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            param.copy_(distribute_tensor(value, param.device_mesh, param.placements))
        else:
            param.copy_(value)
    hand.write("branch.weight", value)
    step(case, engine, hand, 30)
    set_flags(engine, hand, True, "branch")
    step(case, engine, hand, 40)
    return differences(case, engine, hand)


def given_later(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    step(case, engine, hand, 0, ("a", "late"))
    assert engine.optimizer is not None
    engine.optimizer.add_param_group({"params": list(engine.module.late.parameters()), "lr": 0.02})
    hand.add("late", lr=0.02)
    for number in range(1, 3):
        step(case, engine, hand, 10 * number, ("a", "late"))
    return differences(case, engine, hand)


def never_sharded(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    step(case, engine, hand, 0)
    torch.manual_seed(rank)
    engine.module.new = nn.Linear(6, 3).to(case.dtype)
    hand.model.new = nn.Linear(6, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hand.model.new.reset_parameters()
    hand.masters |= {f"new.{name}": p.detach().clone() for name, p in hand.model.new.named_parameters()}
    hand.model.new.to(case.dtype)
    for name, value in hand.model.new.named_parameters():
        hand.masters[f"new.{name}"].copy_(value.detach())
    assert engine.optimizer is not None
    engine.optimizer.add_param_group({"params": list(engine.module.new.parameters())})
    hand.add("new")
    try:
        step(case, engine, hand, 10, ("a", "new"))
    except EngineError as error:
        return None if case.stage == 3 and world_size() > 1 and "stage 3" in str(error) else f"refused: {error}"
    if case.stage == 3 and world_size() > 1:
        return "trained what is not sharded"
    return differences(case, engine, hand)


def clipped(case: Case, rank: int) -> str | None:
    """The optimizer lacks `late`, which has gradients, and has `branch`, which is frozen."""
    engine, hand = pair(case, ("branch",))
    for number in range(3):
        step(case, engine, hand, 10 * number, ("branch", "a", "late"))
    return differences(case, engine, hand)


def one_head_a_step(case: Case, rank: int) -> str | None:
    engine, hand = pair(case)
    for number, route in enumerate([("a",), ("b",), ("branch", "b"), ("a",)]):
        step(case, engine, hand, 10 * number, route)
    return differences(case, engine, hand)


def another_head_on_each_rank(case: Case, rank: int) -> str | None:
    if case.stage == 3:
        case = Case(case.precision, 3, case.accumulation, more={"redline": {"progress": False}})  # sharded as one block
    engine, hand = pair(case)
    for number in range(3):
        step(case, engine, hand, 10 * number, ("a",), ("branch", "b"), ("b",))
    return differences(case, engine, hand)


def seeded_per_rank(case: Case, rank: int) -> str | None:
    engine = build(case, Net(seed=rank))
    hand = ByHand(case, world_size(), Net(seed=0))
    start = exact(engine)
    wrong = [name for name, value in start.items() if name in hand.names and not torch.equal(value, hand.masters[name])]
    step(case, engine, hand, 0)
    return differences(case, engine, hand) or (f"not rank 0's: {wrong}" if wrong else None)


KINDS: Kinds = {
    "frozen parameters in the optimizer": (frozen_in_the_optimizer, {}),
    "parameters frozen later": (frozen_later, {}),
    "parameters thawed later": (thawed_later, {}),
    "parameters written while frozen": (written_while_frozen, {"accumulations": (1,)}),
    "parameters given to the optimizer later": (given_later, {}),
    "parameters new to the model": (never_sharded, {"accumulations": (1,)}),
    "clipping": (clipped, {"clipping": 0.3}),
    "one head a step": (one_head_a_step, {}),
    "another head on each rank": (another_head_on_each_rank, {}),
    "a seed on each rank": (seeded_per_rank, {"accumulations": (1,)}),
}


def on_all(ranks: int, every: int) -> dict[str, list[str]]:
    # Three ranks divide rows unevenly, in any precision.
    few = {"precisions": ("fp32", "bf16")} if ranks > 2 else {}
    return failures_of_kinds(KINDS, ranks, every, **few)


@GRIDS
def test_it_trains_as_the_loop_by_hand_does(ranks: int, every: int) -> None:
    found = run_ranks(on_all, ranks, ranks, every)  # one start for all kinds
    assert found == [{kind: [] for kind in KINDS}] * ranks
