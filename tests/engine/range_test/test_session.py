"""What runs of one session differ in: seed, batch size, settings of the optimizer."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from redline import Engine, RangeTestError, initialize
from redline.data import Loader, build_loader
from redline.distributed.process_group import World
from redline.range_test.session import _reseed, _set_settings, check_run, setting_of
from redline.range_test.task import parts_of
from redline.run_state import RunState

DATA = TensorDataset(torch.arange(24).float())


def make_engine(optimizer: str = "SGD", groups: list[dict[str, Any]] | None = None, **params: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    given = None
    if groups is not None:
        given = [{"params": part.parameters(), **group} for part, group in zip(model, groups)]
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": optimizer, "params": {"lr": 0.01, **params}}}
    return initialize(model, config, model_parameters=given, device="cpu")


def values(engine: Engine, key: str) -> list[Any]:
    assert engine.optimizer is not None
    return [group.get(key) for group in engine.optimizer.param_groups]


# -- seeds ---------------------------------------------------------------------------------------------------


def own_loader() -> Loader:
    return build_loader(DATA, World(0, 0, 1, torch.device("cpu")), micro_batch=4)


def with_generator() -> Any:
    return DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))


def with_sampler() -> Any:
    return DataLoader(DATA, batch_size=4, sampler=DistributedSampler(DATA, num_replicas=2, rank=0))


def without() -> Any:
    return DataLoader(DATA, batch_size=4, shuffle=True)  # from the global generator


def order(loader: Any) -> list[float]:
    return [value for (batch,) in loader for value in batch.tolist()]


@pytest.mark.parametrize("make", [own_loader, with_generator, with_sampler, without])
def test_another_seed_is_another_order_each_and_seed_0_is_the_engines(make: Any) -> None:
    torch.manual_seed(1)
    found = {}
    loader = make()
    snapshot = RunState(make_engine(), data=[loader], parts=parts_of(loader))
    for seed in (0, 1, 2, 1, 0):
        _reseed(seed, loader)
        found.setdefault(seed, []).append(order(loader))
        snapshot.restore()
    assert found[0][0] == found[0][1]
    assert found[1][0] == found[1][1]
    assert len({tuple(orders[0]) for orders in found.values()}) == 3
    if make is own_loader:  # nor is it the order of a later epoch
        epochs = [order(loader) for _ in range(5)]
        assert found[1][0] not in epochs and found[2][0] not in epochs
    assert {len(orders[0]) for orders in found.values()} == {12 if make is with_sampler else 24}


def test_another_seed_is_other_random_numbers_of_every_kind_and_the_same_each_time() -> None:
    snapshot = RunState(make_engine())
    draws = []
    for seed in (0, 1, 1, 2):
        _reseed(seed, None)
        draws.append((random.random(), float(numpy.random.rand()), torch.rand(()).item()))
        snapshot.restore()
    assert draws[1] == draws[2]
    assert all(len(set(each)) == 3 for each in zip(*draws))


def test_processes_that_shuffle_alike_still_do_with_another_seed() -> None:
    loaders = [
        DataLoader(DATA, batch_size=4, sampler=DistributedSampler(DATA, num_replicas=2, rank=rank)) for rank in (0, 1)
    ]
    for loader in loaders:
        torch.rand(len(loaders))  # their own random numbers differ
        _reseed(3, loader)
    assert sorted(order(loaders[0]) + order(loaders[1])) == list(range(24))


# -- settings ------------------------------------------------------------------------------------------------


def test_settings_are_set_in_every_group_that_has_them() -> None:
    engine = make_engine("SGD", groups=[{}, {"momentum": 0.5}], momentum=0.9)
    _set_settings(engine.optimizer, {"weight_decay": 0.1, "momentum": 0.7})
    assert (values(engine, "weight_decay"), values(engine, "momentum")) == ([0.1, 0.1], [0.7, 0.7])
    # Momentum is the first beta where there are betas; groups that are exempt from weight decay stay so.
    engine = make_engine("AdamW", groups=[{"weight_decay": 0.1}, {"weight_decay": 0.0}], betas=[0.9, 0.95])
    _set_settings(engine.optimizer, {"weight_decay": 0.3, "momentum": 0.7})
    assert values(engine, "weight_decay") == [0.3, 0.0]
    assert (values(engine, "betas"), values(engine, "momentum")) == ([(0.7, 0.95)] * 2, [None] * 2)


def test_the_engines_own_value_is_the_one_that_its_groups_share() -> None:
    spared = make_engine("AdamW", groups=[{"weight_decay": 0.1}, {"weight_decay": 0.0}], betas=[0.8, 0.9])
    assert (setting_of(spared, "weight_decay"), setting_of(spared, "momentum")) == (0.1, 0.8)
    several = make_engine("SGD", groups=[{"momentum": 0.1}, {"momentum": 0.2}])
    assert (setting_of(several, "momentum"), setting_of(several, "weight_decay")) == (None, 0.0)


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        ("SGD", {"lr": 0.1}, 'settings: got "lr"; expected weight_decay or momentum'),
        ("Adagrad", {"momentum": 0.1}, "settings: momentum: the optimizer, Adagrad, has none"),
        ("SGD", {"momentum": 1.0}, "settings: momentum: got 1.0; expected a number from 0 to below 1"),
        ("SGD", {"weight_decay": -1.0}, "settings: weight_decay: got -1.0; expected a number >= 0"),
        ("SGD", {"weight_decay": float("nan")}, "settings: weight_decay: got nan"),
    ],
)
def test_settings_that_the_optimizer_cannot_have_are_refused(
    optimizer: str, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(RangeTestError, match=message):
        check_run(make_engine(optimizer), None, settings)


def test_a_batch_size_that_cannot_be_reached_is_refused_and_changes_nothing() -> None:
    engine = make_engine()
    check_run(engine, 12, {})
    with pytest.raises(RangeTestError, match=r"range test: set_train_batch_size: got 10; .* nearest: 8 and 12"):
        check_run(engine, 10, {})
    assert engine.train_batch_size() == 4
