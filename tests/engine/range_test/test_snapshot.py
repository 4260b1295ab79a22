"""A range test leaves no trace: training after it equals training without it, bit for bit."""

from __future__ import annotations

import atexit
import copy
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from engine import Engine, RangeTestError, initialize, run_range_test
from engine.range_test.snapshot import Snapshot
from tests.distributed import run_ranks
from tests.traces import Noisy, same

SCHEDULES: dict[str, dict[str, Any] | None] = {
    "fixed": None,
    "OneCycle": {
        "type": "OneCycle",
        "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 4},
    },
    "WarmupLR": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    "LRRangeTest": {"type": "LRRangeTest", "params": {"lr_range_test_step_size": 2}},
    "OneCycleLR": {"type": "OneCycleLR", "params": {"max_lr": 0.01, "total_steps": 100}},
    "CosineAnnealingLR": {"type": "CosineAnnealingLR", "params": {"T_max": 10}},
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
    x, y, _ = batch
    return nn.functional.mse_loss(model(x), y) + 0.01 * random.random() + 0.01 * float(numpy.random.rand())


class Failing:
    """A loss that ends the test from within, at its so-manieth call."""

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.left = error, at

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.left -= 1
        value = loss(model, batch)
        if self.left <= 0:
            raise self.error
        return value


Test = Callable[[Engine, Any], None]


class Story:
    """A training, with or without a test in it; `fingerprint` is all that it left."""

    def __init__(
        self, schedule: str, tmp: str, *, optimizer: str = "Adam", tensor: bool = False, corrected: bool = False
    ):
        random.seed(1)
        numpy.random.seed(2)
        torch.manual_seed(3)
        model = Net()
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "redline": {"range_test": {"output_dir": tmp}, "schedules": "corrected" if corrected else "deepspeed"},
        }
        if SCHEDULES[schedule]:
            config["scheduler"] = SCHEDULES[schedule]
        own = None
        if tensor:
            own = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.005))
        else:
            params = {"lr": 0.005, "momentum": 0.9} if optimizer == "SGD" else {"lr": 0.005}
            config["optimizer"] = {"type": optimizer, "params": params}
        self.engine = initialize(model, config, optimizer=own, training_data=Noisy(40), device="cpu")
        if self.engine.recorder is not None:
            atexit.unregister(self.engine.recorder.close)  # nobody reads this one's report
        self.own_loader = DataLoader(Noisy(24), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7))
        self.batches = self._forever()
        self.record: list[Any] = []

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self.engine.training_dataloader
            yield from self.own_loader

    def train(self, updates: int) -> None:
        engine = self.engine
        for _ in range(2 * updates):
            batch = next(self.batches)
            rates = [float(lr) for lr in engine.get_lr()]
            value = engine.backward(loss(engine, batch))
            engine.step()
            self.record.append(
                (batch[2].tolist(), rates, engine.get_mom(), value.item(), engine.get_global_grad_norm())
            )

    def data(self, kind: str) -> Any:
        return {
            "dataset": Noisy(16),
            "engine's loader": self.engine.training_dataloader,
            "own loader": self.own_loader,
        }[kind]

    def fingerprint(self) -> dict[str, Any]:
        engine = self.engine
        optimizer = engine.optimizer
        return {
            "record": self.record,
            "parameters": [parameter.detach().clone() for parameter in engine.parameters()],
            "buffers": [buffer.clone() for buffer in engine.buffers()],
            "optimizer": copy.deepcopy([optimizer.state[parameter] for parameter in optimizer.state]),
            "groups": copy.deepcopy([{**group, "params": None} for group in optimizer.param_groups]),
            "schedule": None if engine.lr_scheduler is None else copy.deepcopy(engine.lr_scheduler.state_dict()),
            "counters": (engine.global_steps, engine.micro_steps, engine.skipped_steps, engine.steps_per_print),
            "loss": engine.loss,
            "training": [module.training for module in engine.modules()],
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            "generator": self.own_loader.generator.get_state(),
            "epoch": engine.training_dataloader.epoch,
        }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [key for key in ours if not same(ours[key], theirs[key])]


def short_test(engine: Engine, data: Any, loss_fn: Any = loss, validation: Any = None) -> None:
    run_range_test(engine, data, loss_fn, validation=validation, rates=[5, 500], steps=6, validations=2, progress=False)


def trained(
    story: Story, test: Test | None, *, kind: str = "dataset", before: int = 0, after: int = 5
) -> dict[str, Any]:
    story.train(before)
    if test is not None:
        test(story.engine, story.data(kind))
    story.train(after)
    return story.fingerprint()


def changed_by(
    test: Test, tmp: Any, *, schedule: str = "OneCycle", kind: str = "dataset", before: int = 0, **of: Any
) -> Any:
    """What a test in the middle of a training changes of it: nothing, one hopes."""
    with_test = trained(Story(schedule, str(tmp), **of), test, kind=kind, before=before)
    without = trained(Story(schedule, str(tmp), **of), None, before=before)
    return differences(with_test, without)


# -- one process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 3], ids=["before training", "in the middle of an epoch"])
@pytest.mark.parametrize("kind", ["dataset", "engine's loader", "own loader"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_after_a_range_test_equals_training_without_it(
    schedule: str, kind: str, before: int, tmp_path: Any
) -> None:
    assert changed_by(short_test, tmp_path, schedule=schedule, kind=kind, before=before) == []


@pytest.mark.parametrize("schedule", ["OneCycle", "WarmupLR"])
@pytest.mark.parametrize("before", [0, 3])
def test_corrected_schedules_are_put_back_alike(schedule: str, before: int, tmp_path: Any) -> None:
    assert changed_by(short_test, tmp_path, schedule=schedule, before=before, corrected=True) == []


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adagrad", "NAdam"])
def test_every_optimizers_state_is_put_back(optimizer: str, tmp_path: Any) -> None:
    assert changed_by(short_test, tmp_path, schedule="WarmupLR", before=2, optimizer=optimizer) == []


@pytest.mark.parametrize("schedule", ["fixed", "OneCycle", "WarmupLR"])
def test_a_tensor_rate_is_put_back_in_place(schedule: str, tmp_path: Any) -> None:
    story = Story(schedule, str(tmp_path), tensor=True)
    tensor = story.engine.optimizer.param_groups[0]["lr"]
    value = tensor.clone()
    short_test(story.engine, Noisy(16))
    assert story.engine.optimizer.param_groups[0]["lr"] is tensor
    assert torch.equal(tensor, value)
    assert changed_by(short_test, tmp_path, schedule=schedule, before=2, tensor=True) == []


def test_a_validation_along_the_way_leaves_no_trace_either(tmp_path: Any) -> None:
    shuffled = DataLoader(Noisy(12), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(9))
    state = shuffled.generator.get_state()
    for held_out in (Noisy(12), shuffled):
        test = lambda engine, data, held_out=held_out: short_test(engine, data, validation=held_out)  # noqa: E731
        assert changed_by(test, tmp_path, before=2) == []
    assert torch.equal(shuffled.generator.get_state(), state)


@pytest.mark.parametrize("error", [ZeroDivisionError("in the loss"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
@pytest.mark.parametrize("at", [1, 2, 17])
def test_a_test_that_is_broken_off_leaves_no_trace(error: BaseException, at: int, tmp_path: Any) -> None:
    def broken(engine: Engine, data: Any) -> None:
        with pytest.raises(type(error)):
            short_test(engine, data, Failing(error, at))

    assert changed_by(broken, tmp_path, kind="engine's loader", before=2) == []


def test_a_test_that_is_refused_halfway_leaves_no_trace(tmp_path: Any) -> None:
    def refused(engine: Engine, data: Any) -> None:
        with pytest.raises(RangeTestError, match="it yields no batch"):
            short_test(engine, [])

    assert changed_by(refused, tmp_path, before=2) == []


def test_two_tests_one_after_the_other_see_the_same_and_leave_no_trace(tmp_path: Any) -> None:
    results: list[Any] = []

    def twice(engine: Engine, data: Any) -> None:
        for _ in range(2):
            results.append(run_range_test(engine, data, loss, rates=[5], steps=4, progress=False))

    assert changed_by(twice, tmp_path, kind="engine's loader", before=2) == []
    assert results[0] == results[1]


def test_flags_of_modules_in_evaluation_are_put_back(tmp_path: Any) -> None:
    story = Story("fixed", str(tmp_path))
    story.engine.module.body[1].eval()
    flags = [module.training for module in story.engine.modules()]
    short_test(story.engine, Noisy(16), validation=Noisy(8))
    assert [module.training for module in story.engine.modules()] == flags


def test_the_engine_has_its_schedule_and_its_recorder_back(tmp_path: Any) -> None:
    engine = Story("LRRangeTest", str(tmp_path)).engine
    schedule, recorder = engine.lr_scheduler, engine.recorder
    short_test(engine, Noisy(16))
    assert engine.lr_scheduler is schedule
    assert engine.recorder is recorder
    assert len(recorder) == 0


def test_gradients_are_gone_after_a_test(tmp_path: Any) -> None:
    story = Story("fixed", str(tmp_path))
    short_test(story.engine, Noisy(16))
    assert all(parameter.grad is None for parameter in story.engine.parameters())


# -- the snapshot itself -------------------------------------------------------------------------------------


def test_a_snapshot_can_be_restored_any_number_of_times(tmp_path: Any) -> None:
    story = Story("OneCycle", str(tmp_path))
    story.train(2)
    expected = story.fingerprint() | {"record": None}
    snapshot = Snapshot(story.engine, story.engine.training_dataloader, story.own_loader)
    for _ in range(3):
        story.train(3)
        assert differences(story.fingerprint() | {"record": None}, expected)
        snapshot.restore()
        # The iterator under way has moved on; the loaders, which the test iterates anew, have not.
        assert differences(story.fingerprint() | {"record": None}, expected) == []


def test_a_pass_that_was_broken_off_before_a_test_is_over_after_it(tmp_path: Any) -> None:
    following = []
    for test in (short_test, lambda engine, data: None):
        engine = Story("fixed", str(tmp_path)).engine
        next(iter(engine.training_dataloader))
        test(engine, engine.training_dataloader)
        following.append([batch[2].tolist() for batch in engine.training_dataloader])
    assert following[0] == following[1]


def test_the_generator_of_a_loader_under_another_is_found(tmp_path: Any) -> None:
    story = Story("fixed", str(tmp_path))
    snapshot = Snapshot(story.engine, SimpleNamespace(dataloader=story.own_loader))
    state = story.own_loader.generator.get_state()
    list(story.own_loader)
    snapshot.restore()
    assert torch.equal(story.own_loader.generator.get_state(), state)


def test_an_optimizer_gets_its_very_values_back_and_no_more(tmp_path: Any) -> None:
    engine = Story("fixed", str(tmp_path)).engine
    snapshot = Snapshot(engine)
    engine.optimizer.param_groups[0]["novelty"] = 1
    engine.optimizer.param_groups[0]["betas"] = (0.1, 0.2)
    engine.optimizer.state[next(engine.parameters())]["novelty"] = torch.ones(1)
    snapshot.restore()
    assert "novelty" not in engine.optimizer.param_groups[0]
    assert engine.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert len(engine.optimizer.state) == 0


# -- several processes -------------------------------------------------------------------------------------------


def in_several_processes(tmp: str) -> dict[str, list[str]]:
    """On each rank: what tests of several kinds change of a training."""

    def broken(engine: Engine, data: Any) -> None:
        with pytest.raises(ZeroDivisionError):
            short_test(engine, data, Failing(ZeroDivisionError(), 7))

    def validated(engine: Engine, data: Any) -> None:
        short_test(engine, data, validation=Noisy(9))

    return {
        "before training": changed_by(short_test, tmp, kind="engine's loader"),
        "in the middle": changed_by(validated, tmp, kind="engine's loader", before=3),
        "own loader": changed_by(short_test, tmp, schedule="WarmupLR", kind="own loader", before=3, corrected=True),
        "passive": changed_by(short_test, tmp, schedule="LRRangeTest", before=2),
        "broken off": changed_by(broken, tmp, kind="engine's loader", before=2),
    }


@pytest.mark.parametrize("world_size", [2, 3])  # from three on the order of a sum shows in its last bit
def test_several_processes_train_after_a_test_as_without_it(world_size: int, tmp_path: Any) -> None:
    for answers in run_ranks(in_several_processes, world_size, str(tmp_path)):
        assert {kind: changes for kind, changes in answers.items() if changes} == {}


def test_the_comparison_sees_a_test_that_leaves_a_trace(tmp_path: Any) -> None:
    def careless(engine: Engine, data: Any) -> None:
        torch.rand(1)

    found = changed_by(careless, tmp_path, before=2)
    assert {"record", "parameters", "torch"} <= set(found)
    assert same(TensorDataset(torch.ones(1)).tensors, (torch.ones(1),))
