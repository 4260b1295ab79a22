"""A range test of every kind leaves no trace: training after it equals training without it, bit for bit.

Trained is with dropout, batch statistics and shuffling, with weights, optimizer, schedule, loss scale, random numbers
and data in the middle of things, in every precision, on one rank and several, however the test ends.
"""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from redline import RangeTestError, initialize, run_range_test
from redline.range_test.recorder import PassiveRecorder
from redline.range_test.task import parts_of
from redline.run_state import RunState
from tests.callbacks import drop_recorder, find
from tests.distributed import run_ranks
from tests.traces import Noisy, same

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # A window of three: the scale moves within every run.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 3, "hysteresis": 1}},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "OneCycle": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 4},
    "WarmupLR": {"warmup_max_lr": [0.01, 0.001], "warmup_num_steps": 5},
    "LRRangeTest": {"lr_range_test_step_size": 2},
    "OneCycleLR": {"max_lr": 0.01, "total_steps": 100},
    "CosineAnnealingLR": {"T_max": 10},
}


class Net(nn.Module):
    """Everything with a state of its own: batch statistics, dropout, a buffer outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 1)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.head(self.frozen(self.body(x)))


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Noisy, too, so that a test that moved a generator would be found out."""
    noise = random.random() + float(numpy.random.rand())
    return nn.functional.mse_loss(model(batch[0]).float(), batch[1]) * (1 + 0.1 * noise)


class Story:
    """A training with everything in it that a test could move; `fingerprint` is all that it left."""

    def __init__(
        self,
        precision: str = "fp32",
        stage: int = 0,
        *,
        schedule: str = "WarmupLR",
        optimizer: str = "AdamW",
        tensor_lr: bool = False,
        corrected: bool = False,
    ) -> None:
        rank = int(os.environ.get("RANK", "0"))
        torch.manual_seed(3)
        sharded = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        model = sharded if stage == 3 else Net()
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            "redline": {"schedules": "corrected" if corrected else "deepspeed"},
            **PRECISIONS[precision],
        }
        if SCHEDULES[schedule]:
            config["scheduler"] = {"type": schedule, "params": SCHEDULES[schedule]}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups: Any = [
            {"params": [each for each in trained if each.ndim > 1], "weight_decay": 0.01},
            {"params": [each for each in trained if each.ndim == 1], "lr": 0.001, "weight_decay": 0.0},
        ]
        own = torch.optim.AdamW(groups, lr=torch.tensor(0.005)) if tensor_lr else None
        if own is None:
            momentum = {"momentum": 0.9} if optimizer == "SGD" else {}
            config["optimizer"] = {"type": optimizer, "params": {"lr": 0.01, **momentum}}
        given = {"optimizer": own} if own else {"model_parameters": groups}
        self.engine = initialize(model, config, training_data=Noisy(40), device="cpu", **given)
        drop_recorder(self.engine)
        generator = torch.Generator().manual_seed(7)
        self.own_loader = DataLoader(Noisy(40), batch_size=2, shuffle=True, generator=generator)
        random.seed(1 + rank)
        numpy.random.seed(2 + rank)
        torch.manual_seed(4 + rank)  # each rank has dropout of its own
        self.record: list[Any] = []
        self.batches = self._forever()

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self.engine.training_dataloader
            yield from self.own_loader

    def train(self, steps: int) -> None:
        engine = self.engine
        for _ in range(steps * engine.gradient_accumulation_steps()):
            batch, lrs = next(self.batches), [float(lr) for lr in engine.get_lr()]
            value = engine.backward(loss(engine, batch))
            engine.step()
            norm = engine.get_global_grad_norm()
            self.record.append((batch[2].tolist(), value.item(), lrs, engine.get_mom(), engine.loss_scale, norm))

    def fingerprint(self) -> dict[str, Any]:
        engine, loader = self.engine, self.engine.training_dataloader
        optimizer, schedule = engine.optimizer, engine.lr_scheduler
        assert optimizer is not None and loader is not None
        return {
            "record": self.record,
            "parameters": [own(parameter) for parameter in engine.parameters()],
            "buffers": [own(buffer) for buffer in engine.buffers()],
            "weights": [own(weight) for group in optimizer.param_groups for weight in group["params"]],
            "optimizer": [{k: own(v) for k, v in state.items()} for state in optimizer.state.values()],
            "groups": copy.deepcopy([{**group, "params": None} for group in optimizer.param_groups]),
            "schedule": None if schedule is None else copy.deepcopy(schedule.state_dict()),
            "scale": None if engine.scaler is None else engine.scaler.state_dict(),
            "counters": (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps),
            "batch size": (engine.train_batch_size(), engine.gradient_accumulation_steps()),
            "loss": own(engine.loss),
            "training": [module.training for module in engine.modules()],
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            "generator": self.own_loader.generator.get_state(),
            "position": (loader.epoch, loader.position, loader.state_dict()),
            "callbacks": ([type(each) for each in engine.callbacks], engine._finite_check.enabled),
        }


def own(value: Any) -> Any:
    """A tensor as it is now; of a sharded one, this rank's shard."""
    value = getattr(value, "_local_tensor", value)
    return value.detach().clone() if isinstance(value, Tensor) else value


# -- tests that end in every way -----------------------------------------------------------------------------

Test = Callable[[Story], None]


def short(story: Story, loss_fn: Any = loss, *, data: Any = None, **arguments: Any) -> None:
    arguments = {"rates": [500], "steps": 5, "validation": Noisy(40), "validations": 1, "progress": False, **arguments}
    run_range_test(story.engine, data or story.engine.training_dataloader, loss_fn, **arguments)


def full(story: Story) -> None:
    short(story, rates=[5, 500])
    short(story, baseline=False, growth="exponential", rates=None)


def varied(story: Story, loss_fn: Any = loss) -> None:
    """With everything that a run can have of its own; the last run has it all but the seed."""
    sizes = [2 * story.engine.train_batch_size()]
    short(story, loss_fn, baseline=False, steps=3, seeds=2, batch_sizes=sizes, sweep={"weight_decay": [0.5]})
    sweep = {"weight_decay": [0.5], "momentum": [0.5]}
    short(story, loss_fn, data=story.own_loader, validation=None, rates=[5], steps=3, seeds=2, sweep=sweep)


class At:
    """A loss that does something at a certain call."""

    def __init__(self, call: int, act: Callable[[], None]) -> None:
        self.left, self.act = call, act

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.left -= 1
        value = loss(model, batch)
        if self.left == 0:
            self.act()
        return value


def failing(story: Story) -> None:
    """The loss raises: in a validation, in the first step, and within a step of another batch size."""

    def fail() -> None:
        raise ZeroDivisionError

    def only_train(model: nn.Module, batch: Any) -> Tensor:
        if not model.training and story.engine.global_steps > 5:
            fail()
        return loss(model, batch)

    with pytest.raises(ZeroDivisionError):
        short(story, only_train)
    for run, call in ((short, 1), (short, 4), (varied, 28)):
        with pytest.raises(ZeroDivisionError):
            run(story, At(call, fail))
    with pytest.raises(RangeTestError, match="it yields no batch"):
        run_range_test(story.engine, [], loss, progress=False)


def interrupted(story: Story) -> None:
    """Ctrl-C, on one rank of several, too."""

    def interrupt() -> None:
        if story.engine.global_rank == story.engine.world_size - 1:
            os.kill(os.getpid(), signal.SIGINT)

    for run, call in ((short, 4), (varied, 28)):
        with pytest.raises(KeyboardInterrupt):
            run(story, At(call, interrupt))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def in_a_row(story: Story) -> None:
    for each in (full, failing, interrupted, varied):
        each(story)


TESTS: dict[str, Test] = {each.__name__: each for each in (full, varied, failing, interrupted, in_a_row)}


def left_by(test: Test | None, *of: Any, before: int = 5, **options: Any) -> dict[str, Any]:
    """A training with a test in the middle: what it left right after the test, and at its end."""
    story = Story(*of, **options)
    story.train(before)
    if test is not None:
        test(story)
    at_once = copy.deepcopy(story.fingerprint())
    story.train(4)
    return at_once | {f"{name}, later": value for name, value in story.fingerprint().items()}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [key for key in ours if not same(ours[key], theirs[key])]


def changed_by(test: Test, *of: Any, **options: Any) -> list[str]:
    return differences(left_by(test, *of, **options), left_by(None, *of, **options))


# -- one rank ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_after_any_test_is_training_without_it(precision: str) -> None:
    without = left_by(None, precision)
    assert without["counters"][0] == 5
    found = {name: differences(left_by(test, precision), without) for name, test in TESTS.items()}
    assert {name: changes for name, changes in found.items() if changes} == {}


@pytest.mark.parametrize("before", [0, 3], ids=["before training", "in the middle of an epoch"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_restored(schedule: str, before: int) -> None:
    assert changed_by(short, before=before, schedule=schedule) == []
    if schedule in ("OneCycle", "WarmupLR"):
        assert changed_by(short, before=before, schedule=schedule, corrected=True) == []


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adagrad", "NAdam"])
def test_every_optimizers_state_is_restored(optimizer: str) -> None:
    assert changed_by(short, optimizer=optimizer) == []


@pytest.mark.parametrize("schedule", ["fixed", "OneCycle"])
def test_a_tensor_lr_is_restored_in_place(schedule: str) -> None:
    story = Story(schedule=schedule, tensor_lr=True)
    tensor = story.engine.optimizer.param_groups[0]["lr"]
    value = tensor.clone()
    short(story)
    assert story.engine.optimizer.param_groups[0]["lr"] is tensor
    assert torch.equal(tensor, value)
    assert changed_by(short, schedule=schedule, tensor_lr=True) == []


def test_data_of_every_kind_are_restored() -> None:
    shuffled = DataLoader(Noisy(12), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(9))
    state = shuffled.generator.get_state()
    assert changed_by(lambda story: short(story, data=Noisy(16), validation=shuffled)) == []
    assert changed_by(lambda story: short(story, data=story.own_loader, validation=None)) == []
    assert torch.equal(shuffled.generator.get_state(), state)


def test_a_pending_step_is_resolved_before_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr("redline.device._READ_AT_ONCE", ())  # as on CUDA
    for test in (None, full):
        story = Story("fp16")
        story.engine.scaler.value = 2.0**40  # too much: steps are skipped until it has come down
        story.train(3)
        for _ in range(2):  # and asks for nothing
            story.engine.backward(loss(story.engine, next(story.batches)))
            story.engine.step()
        assert story.engine._optimizer_step.pending is not None
        if test is not None:
            test(story)
        story.train(4)
        assert story.engine.skipped_steps >= 4
        found.append(story.fingerprint())
    assert differences(*found) == []


def test_the_engine_has_its_schedule_recorder_and_flags_back_and_no_gradients() -> None:
    story = Story(schedule="LRRangeTest")
    engine, recorder = story.engine, find(story.engine, PassiveRecorder)
    engine.module.body[1].eval()
    before = engine.lr_scheduler, engine.callbacks, [module.training for module in engine.modules()]
    results = [run_range_test(engine, Noisy(16), loss, rates=[5], steps=4, progress=False) for _ in range(2)]
    assert results[0] == results[1]
    assert before == (engine.lr_scheduler, engine.callbacks, [module.training for module in engine.modules()])
    assert find(engine, PassiveRecorder) is recorder and len(recorder) == 0
    assert all(parameter.grad is None for parameter in engine.parameters())


def test_a_pass_that_was_broken_off_before_a_test_is_over_after_it() -> None:
    following = []
    for test in (short, lambda story: None):
        story = Story()
        next(iter(story.engine.training_dataloader))
        test(story)
        following.append([batch[2].tolist() for batch in story.engine.training_dataloader])
    assert following[0] == following[1]


# -- the snapshot itself -------------------------------------------------------------------------------------


def test_a_snapshot_can_be_restored_any_number_of_times() -> None:
    story = Story(schedule="OneCycle")
    story.train(2)
    expected = story.fingerprint() | {"record": None}
    # The generator of a loader under another is found as well.
    data = (story.engine.training_dataloader, SimpleNamespace(dataloader=story.own_loader))
    snapshot = RunState(story.engine, data=data, parts=parts_of(*data))
    for _ in range(3):
        story.train(3)
        list(story.own_loader)
        story.engine.optimizer.param_groups[0]["novelty"] = 1
        story.engine.optimizer.state[next(story.engine.parameters())]["novelty"] = torch.ones(1)
        assert differences(story.fingerprint() | {"record": None}, expected)
        snapshot.restore()
        assert differences(story.fingerprint() | {"record": None}, expected) == []


# -- several ranks -------------------------------------------------------------------------------------------


def on_several_ranks(kinds: list[tuple[str, int]]) -> dict[str, list[str]]:
    """On each rank: what tests of every kind, one after the other, change of a training."""
    found = {f"{precision}, stage {stage}": changed_by(in_a_row, precision, stage) for precision, stage in kinds}
    return found | {"passive": changed_by(full, schedule="LRRangeTest")}


@pytest.mark.parametrize(
    ("world_size", "kinds"),
    [(2, [("bf16", 1), ("fp16", 3), ("fp32", 3)]), (3, [("fp32", 0)])],  # of three, the order of a sum shows
)
def test_several_ranks_train_after_any_test_as_without_it(world_size: int, kinds: list[tuple[str, int]]) -> None:
    for found in run_ranks(on_several_ranks, world_size, kinds):
        assert {name: changes for name, changes in found.items() if changes} == {}


def test_the_comparison_sees_a_test_that_leaves_a_trace() -> None:
    found = changed_by(lambda story: setattr(story, "drawn", torch.rand(1)))
    assert {"record, later", "parameters, later", "torch"} <= set(found)
    assert "record" not in found
