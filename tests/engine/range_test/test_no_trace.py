"""A range test of every kind leaves no trace: in every precision, on one process and two, however it ends.

Trained is with dropout and shuffling, with weights, optimizer, loss scale, random numbers and data in the middle of
things. What one process restores of every kind of schedule, optimizer and loader is in test_snapshot.
"""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine import initialize, run_range_test
from engine.randomness import random_state
from engine.range_test import rig
from engine.range_test.snapshot import Snapshot
from tests.distributed import run_ranks
from tests.traces import Noisy, same

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # A window of three: the scale moves within every run.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 3, "hysteresis": 1}},
}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]).float(), batch[1]) * (1 + 0.1 * random.random())


class Story:
    """A training with everything in it that a test could move."""

    def __init__(self, precision: str, stage: int = 0) -> None:
        rank = int(os.environ.get("RANK", "0"))
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        groups = [
            {"params": [model[0].weight, model[4].weight], "weight_decay": 0.01},
            {"params": [model[0].bias, model[4].bias, *model[1].parameters()], "lr": 0.001, "weight_decay": 0.0},
        ]
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [0.01, 0.001], "warmup_num_steps": 8}},
            "zero_optimization": {"stage": stage},
            **PRECISIONS[precision],
        }
        self.engine = initialize(model, config, training_data=Noisy(40), model_parameters=groups, device="cpu")
        generator = torch.Generator().manual_seed(7)
        self.own_loader = DataLoader(Noisy(40), batch_size=2, shuffle=True, generator=generator)
        random.seed(1 + rank)
        numpy.random.seed(2 + rank)
        torch.manual_seed(4 + rank)  # processes drop out each its own
        self.record: list[Any] = []
        self._batches = self._forever()

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self.engine.training_dataloader
            yield from self.own_loader

    def train(self, updates: int) -> None:
        engine = self.engine
        for _ in range(updates * engine.gradient_accumulation_steps()):
            batch = next(self._batches)
            value = engine.backward(loss(engine, batch))
            engine.step()
            scale = engine.loss_scale
            self.record.append((batch[2].tolist(), value.item(), engine.get_lr(), scale, engine.get_global_grad_norm()))

    def fingerprint(self) -> dict[str, Any]:
        engine, loader = self.engine, self.engine.training_dataloader
        optimizer, schedule = engine.optimizer, engine.lr_scheduler
        assert optimizer is not None and schedule is not None and loader is not None
        return {
            "record": self.record,
            "parameters": [own(parameter) for parameter in engine.parameters()],
            "weights": [own(weight) for group in optimizer.param_groups for weight in group["params"]],
            "optimizer": [{k: own(v) for k, v in state.items()} for state in optimizer.state.values()],
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in copied(optimizer.param_groups)],
            "schedule": schedule.state_dict(),
            "scale": None if engine.scaler is None else engine.scaler.state_dict(),
            "counters": (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps),
            "batch size": (engine.train_batch_size(), engine.gradient_accumulation_steps()),
            "training": [module.training for module in engine.modules()],
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            "generator": self.own_loader.generator.get_state(),
            "position": (loader.position, loader.state_dict()),
            "watchers": (engine.recorder, len(engine.observers), engine.after_update, engine._finite is None),
        }


def own(value: Any) -> Any:
    """A tensor as it is now; of one that is shared out, this process's share."""
    value = getattr(value, "_local_tensor", value)
    return value.detach().clone() if isinstance(value, Tensor) else value


def copied(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: None if k == "params" else copy.deepcopy(v) for k, v in group.items()} for group in groups]


# -- tests that end in every way -----------------------------------------------------------------------------


def test_of(story: Story, loss_fn: Any = loss, **arguments: Any) -> None:
    arguments = {"rates": [500], "steps": 5, "validation": Noisy(40), "validations": 1, "progress": False, **arguments}
    run_range_test(story.engine, story.engine.training_dataloader, loss_fn, **arguments)


def full(story: Story) -> None:
    test_of(story, rates=[5, 500])
    test_of(story, baseline=False, growth="exponential", rates=None)


def varied(story: Story, loss_fn: Any = loss) -> None:
    """With everything that a run can have of its own; the last run has it all but the seed."""
    engine = story.engine
    sizes = [2 * engine.train_batch_size()]
    test_of(story, loss_fn, baseline=False, steps=3, seeds=2, batch_sizes=sizes, sweep={"weight_decay": [0.5]})
    sweep = {"weight_decay": [0.5], "momentum": [0.5]}
    run_range_test(engine, story.own_loader, loss_fn, rates=[5], steps=3, seeds=2, sweep=sweep, progress=False)


class At:
    """A loss that does something at its so-manieth call."""

    def __init__(self, call: int, act: Callable[[], None]) -> None:
        self.left, self.act = call, act

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.left -= 1
        value = loss(model, batch)
        if self.left == 0:
            self.act()
        return value


def failing(story: Story) -> None:
    """The loss raises: in a validation, and within an update of the baseline and of another batch size."""

    def fail() -> None:
        raise ZeroDivisionError

    def only_train(model: nn.Module, batch: Any) -> Tensor:
        if not model.training and story.engine.global_steps > 5:
            fail()
        return loss(model, batch)

    with pytest.raises(ZeroDivisionError):
        test_of(story, only_train)
    for run, call in ((test_of, 4), (varied, 28)):
        with pytest.raises(ZeroDivisionError):
            run(story, At(call, fail))


def interrupted(story: Story) -> None:
    """Ctrl-C, on one process of several, too."""

    def interrupt() -> None:
        if story.engine.global_rank == story.engine.world_size - 1:
            os.kill(os.getpid(), signal.SIGINT)

    for run, call in ((test_of, 4), (varied, 28)):
        with pytest.raises(KeyboardInterrupt):
            run(story, At(call, interrupt))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def in_a_row(story: Story) -> None:
    for each in (full, failing, interrupted, varied):
        each(story)


TESTS = {each.__name__: each for each in (full, varied, failing, interrupted, in_a_row)}
test_of.__test__ = False  # type: ignore[attr-defined]


def left_by(test: Callable[[Story], None] | None, precision: str, stage: int = 0) -> dict[str, Any]:
    """A training with a test in the middle: what it left right after the test, and at its end."""
    story = Story(precision, stage)
    story.train(5)
    if test is not None:
        test(story)
    at_once = copy.deepcopy(story.fingerprint())
    story.train(4)
    return at_once | {f"{name}, later": value for name, value in story.fingerprint().items()}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [key for key in ours if not same(ours[key], theirs[key])]


# -- one process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_after_any_test_is_training_without_it(precision: str) -> None:
    without = left_by(None, precision)
    assert without["counters"][0] == 5
    found = {name: differences(left_by(test, precision), without) for name, test in TESTS.items()}
    assert {name: changes for name, changes in found.items() if changes} == {}


def test_an_update_of_which_nobody_knows_yet_whether_it_was_skipped_is_settled_before_a_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    monkeypatch.setattr("engine.transfer._READ_AT_ONCE", ())  # as on CUDA
    for test in (None, full):
        story = Story("fp16")
        story.engine.scaler.value = 2.0**40  # too much: updates are skipped until it has come down
        story.train(3)
        for _ in range(2):  # and asks for nothing
            story.engine.backward(loss(story.engine, next(story._batches)))
            story.engine.step()
        assert story.engine._doubt is not None
        if test is not None:
            test(story)
        story.train(4)
        assert story.engine.skipped_steps >= 4
        found.append(story.fingerprint())
    assert differences(*found) == []


FAULTS: dict[str, Callable[[Any], None]] = {
    "parameters": lambda snapshot: snapshot._tensors.clear(),
    "training": lambda snapshot: snapshot._training.clear(),
    "optimizer": lambda snapshot: setattr(snapshot._optimizer, "restore", snapshot._optimizer.restore_groups),
    "groups": lambda snapshot: setattr(snapshot._optimizer, "restore_groups", lambda: None),
    "schedule": lambda snapshot: setattr(snapshot, "_schedule_state", {"last_batch_iteration": 9}),
    "scale": lambda snapshot: setattr(snapshot, "_scale", None),
    "counters": lambda snapshot: snapshot._counters.clear(),
    "batch size": lambda snapshot: setattr(snapshot, "_batch_size", 8),
    "position": lambda snapshot: snapshot._positions.clear(),
    "generator": lambda snapshot: snapshot._randoms.clear(),
}


@pytest.mark.parametrize("name", [*FAULTS, "torch", "seed"])
def test_what_is_not_put_back_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(Snapshot):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            FAULTS.get(name, lambda snapshot: None)(self)

        def restore(self) -> None:
            if name == "torch":
                self._random = random_state()
            if name == "seed":
                self._numbers["seed"] = []
            super().restore()

    monkeypatch.setattr(rig, "Snapshot", Faulty)
    test = failing if name == "training" else varied
    caught = differences(left_by(test, "fp16"), left_by(None, "fp16"))
    assert ("position" if name == "seed" else name) in caught


# -- two processes -------------------------------------------------------------------------------------------

SHARED = [("fp32", 0), ("bf16", 1), ("fp16", 0), ("fp16", 3), ("fp32", 3)]


def in_two_processes() -> dict[str, list[str]]:
    """On each rank: what tests of every kind, one after the other, change of a training."""
    return {
        f"{precision}, stage {stage}": differences(left_by(in_a_row, precision, stage), left_by(None, precision, stage))
        for precision, stage in SHARED
    }


def test_several_processes_train_after_any_test_as_without_it() -> None:
    for found in run_ranks(in_two_processes, 2):
        assert {name: changes for name, changes in found.items() if changes} == {}
