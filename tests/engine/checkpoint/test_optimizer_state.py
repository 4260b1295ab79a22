"""Where a schedule stands after loading: where it was saved, or where a fresh run has it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from redline import EngineError, initialize
from tests.schedules import KINDS, Saw, skip_where_torch_fails, values_of

of_every_kind = pytest.mark.parametrize("kind", KINDS)
OVERRIDE = {"redline": {"progress": False, "checkpoint": {"override_schedule": True}}}


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def engine_of(
    kind: Any, *, groups: int = 1, tensor: bool = False, lr: float = 0.08, fused: bool | None = None, **config: Any
) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    parameters = [[model.weight, model.bias]] if groups == 1 else [[model.weight], [model.bias]]
    rates = [lr / (1 + index) for index in range(groups)]
    optimizer = torch.optim.AdamW(
        [{"params": own, "lr": torch.tensor(rate) if tensor else rate} for own, rate in zip(parameters, rates)],
        lr=torch.tensor(lr) if tensor else lr,
        weight_decay=0.5,
        fused=fused,
    )
    return initialize(
        model,
        {"train_batch_size": 4, "redline": {"progress": False}, **config},
        optimizer=optimizer,
        lr_scheduler=KINDS[kind] if isinstance(kind, str) else kind,
        device="cpu",
    )


def train(engine: Any, steps: int) -> list[Any]:
    """What each step runs with."""
    values = []
    for _ in range(steps):
        values.append(values_of(engine.optimizer))
        engine.backward(engine(torch.ones(4, 4)).pow(2).mean())
        engine.step()
    return values


@pytest.mark.parametrize(("groups", "tensor"), [(1, False), (2, True)])
@of_every_kind
def test_every_schedule_goes_on_or_begins_as_a_fresh_run(kind: str, groups: int, tensor: bool, tmp_path: Path) -> None:
    skip_where_torch_fails(kind, tensor=tensor)
    make = {"groups": groups, "tensor": tensor}
    whole = train(engine_of(kind, **make), 10)
    old = engine_of(kind, **make)
    train(old, 5)
    old.save_checkpoint(tmp_path)
    for wanted, expected in (
        ({}, whole[5:]),
        ({"load_lr_scheduler_states": False}, whole[:5]),
        ({"load_optimizer_states": False}, whole[5:]),
        ({"load_lr_scheduler_states": False, "load_optimizer_states": False}, whole[:5]),
    ):
        engine = engine_of(kind, **make)
        train(engine, 2)  # where the schedule was before loading does not matter
        engine.load_checkpoint(tmp_path, **wanted)
        assert train(engine, 5) == expected, wanted


@of_every_kind
def test_another_schedule_goes_on_where_a_fresh_run_has_it(kind: str, tmp_path: Path) -> None:
    other = "ExponentialLR" if kind == "OneCycleLR" else "OneCycleLR"  # which leaves the most behind
    old = engine_of(other)
    train(old, 5)
    old.save_checkpoint(tmp_path)
    whole = train(engine_of(kind), 10)
    engine = engine_of(kind, **OVERRIDE)
    engine.load_checkpoint(tmp_path)
    assert train(engine, 5) == whole[5:]
    again = engine_of(kind)
    again.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert train(again, 5) == whole[:5]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("own")])
def test_an_optimizer_without_its_old_state_goes_on_with_its_own_learning_rate(kind: str, tmp_path: Path) -> None:
    """Not so a script's own class: its state brings the old rates, and only it knows what they mean."""
    old = engine_of(kind, lr=0.4)
    train(old, 5)
    old.save_checkpoint(tmp_path)
    engine = engine_of(kind, groups=2, **OVERRIDE)
    engine.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert train(engine, 5) == train(engine_of(kind, groups=2), 10)[5:]


def test_the_learning_rate_that_a_schedule_left_is_no_fixed_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = engine_of("OneCycleLR")
    train(old, 5)
    old.save_checkpoint(tmp_path)
    fixed = values_of(engine_of(None).optimizer)
    engine = engine_of(None)
    engine.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert values_of(engine.optimizer) == fixed
    override = engine_of(None, **OVERRIDE)
    override.load_checkpoint(tmp_path)
    assert values_of(override.optimizer) == fixed
    assert "in force" not in caplog.text
    assert "initial_lr" not in override.optimizer.param_groups[0]


def test_a_fixed_learning_rate_is_the_checkpoints(tmp_path: Path) -> None:
    engine_of(None, lr=0.5).save_checkpoint(tmp_path)
    engine = engine_of(None)
    engine.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert engine.get_lr() == [0.5]


def test_a_schedule_that_ends_before_the_step_is_refused_and_all_stays(tmp_path: Path) -> None:
    old = engine_of("StepLR")
    train(old, 5)
    old.save_checkpoint(tmp_path)
    engine = engine_of(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, 3), **OVERRIDE)
    was = values_of(engine.optimizer)
    with pytest.raises(EngineError, match=r"OneCycleLR: it cannot be placed at step 5.*load_lr_scheduler_states=False"):
        engine.load_checkpoint(tmp_path)
    assert values_of(engine.optimizer) == was and engine.global_steps == 0


def test_steps_that_were_skipped_are_not_counted(tmp_path: Path) -> None:
    def make(**config: Any) -> Any:
        return engine_of("StepLR", bf16={"enabled": True}, **config)

    whole = train(make(), 6)
    old = make()
    train(old, 2)
    old.backward(old(torch.ones(4, 4)).float().pow(2).mean() * float("inf"))
    old.step()
    train(old, 1)
    assert old.skipped_steps == 1
    old.save_checkpoint(tmp_path)
    engine = make()
    engine.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert engine.global_steps == 4
    assert train(engine, 3) == whole[3:]


def test_a_schedule_that_the_script_put_in_place_later_goes_on_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = engine_of("StepLR")
    train(old, 3)
    old.save_checkpoint(tmp_path)
    engine = engine_of("StepLR")
    engine.lr_scheduler = KINDS["StepLR"](engine.optimizer)
    engine.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert "engine.lr_scheduler is not the one that initialize made or was given" in caplog.text


# -- what is a change ----------------------------------------------------------------------------------


def test_what_a_scripts_own_schedule_counts_in_public_is_no_change(tmp_path: Path) -> None:
    old = engine_of(Saw)
    train(old, 6)
    old.save_checkpoint(tmp_path)
    engine = engine_of(Saw)
    engine.load_checkpoint(tmp_path)
    assert (engine.lr_scheduler.cycle, engine.lr_scheduler.step_in_cycle) == (1, 2)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (lambda opt: lr_scheduler.StepLR(opt, 2, 0.5), lambda opt: lr_scheduler.StepLR(opt, 3, 0.5),
         "step_size was 2, is 3"),
        (Saw, "own, that moves the weight decay", "type was Saw, is Decay"),
    ],
    ids=["arguments of torch's", "the type of a script's own"],
)  # fmt: skip
def test_another_schedule_is_refused(old: Any, new: Any, said: str, tmp_path: Path) -> None:
    engine_of(old).save_checkpoint(tmp_path)
    with pytest.raises(EngineError, match=said):
        engine_of(new).load_checkpoint(tmp_path)


# -- skipped steps, in the engine ----------------------------------------------------------------------


@of_every_kind
def test_a_step_that_the_device_skips_moves_no_schedule(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    low = {"fused": True, "bf16": {"enabled": True}}
    whole = train(engine_of(kind, **low), 6)
    engine = engine_of(kind, **low)
    monkeypatch.setattr("redline.device._READ_AT_ONCE", ())  # as on CUDA, where nothing is read before the next step
    values = []
    for step in range(6):
        if step in (0, 3):
            engine.backward(engine(torch.ones(4, 4)).float().pow(2).mean() * float("inf"))
            engine.step()
            assert engine.skipped_steps == 1 + step // 3
        values += train(engine, 1)
    assert values == whole


def test_loading_says_where_the_new_schedule_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = engine_of("StepLR")
    train(old, 3)
    old.save_checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING, logger="redline"):
        engine_of("LinearLR", **OVERRIDE).load_checkpoint(tmp_path)
    assert "type was StepLR, is LinearLR; the new one continues at step 3" in caplog.text
