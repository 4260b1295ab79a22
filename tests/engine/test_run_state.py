"""State that no state dict has, put back in place: of modules, and generators of datasets."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from redline import initialize, run_range_test
from redline.run_state import capture_generators, capture_module


class Busy(nn.Module):
    """Moves state of every form in a forward, and lets it show in what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.rnn = nn.GRU(1, 1)  # lists its parameters
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("later", None)
        self.calls, self.hidden = 0, None
        self.history: list[float] = []
        self.last: deque[Tensor] = deque([torch.zeros(())], maxlen=1)
        self.seen: dict[str, Any] = OrderedDict(sizes={4})
        self.python, self.numpy = random.Random(1), numpy.random.default_rng(2)
        self.old, self.torch = numpy.random.RandomState(3), torch.Generator().manual_seed(4)
        self.extra = object()  # in no plain form: get_extra_state has it
        self.offset = [0.0, (1, 2.0)]

    def get_extra_state(self) -> Any:
        return {"level": getattr(self.extra, "level", 0)}

    def set_extra_state(self, state: Any) -> None:
        self.extra = type("Extra", (), state)()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + self.average + self.last[0] + 0.01 * self.calls + sum(self.history[-2:])
        if self.hidden is not None:
            y = y + self.hidden.detach().mean()
        self.average = 0.9 * self.average + 0.1 * y.detach().mean()  # another tensor, not the same one
        self.later = self.average if self.later is None else self.later + 1
        self.calls, self.hidden = self.calls + 1, y
        self.history.append(0.01 * len(self.history))
        self.last.append(y.detach().mean())
        self.seen["sizes"].add(self.calls)
        self.offset[0] += 1
        self.cache = self.offset[0]
        self.extra = type("Extra", (), {"level": self.calls})()
        noise = self.python.random() + self.numpy.random() + self.old.rand() + torch.rand((), generator=self.torch)
        return y + 0.01 * noise + 0.01 * self.extra.level


def shown(module: Busy) -> str:
    extra = module.get_extra_state()
    generators = (module.python.getstate(), module.numpy.bit_generator.state, module.old.get_state()[1].tolist())
    names = ("average", "later", "calls", "history", "last", "seen", "offset")
    values = {name: getattr(module, name) for name in names} | {"cache": getattr(module, "cache", None)}
    return str((values, extra, generators, module.torch.get_state().tolist()))


@pytest.mark.parametrize("before", [0, 2])
def test_a_module_is_what_it_was_however_it_keeps_its_state(before: int) -> None:
    module = Busy()
    x = torch.ones(2, 4)
    for _ in range(before):
        module(x)
    state, objects = shown(module), (module.average, module.history, module.last, module.seen)
    put_back = capture_module(module)
    for _ in range(3):
        module(x)
        module(x).sum().backward()
        assert shown(module) != state
        put_back()
        assert shown(module) == state
        assert all(
            now is then for now, then in zip((module.average, module.history, module.last, module.seen), objects)
        )
    assert hasattr(module, "cache") is (before > 0)


def test_training_such_a_module_after_a_test_is_training_it_without() -> None:
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    found = []
    for tested in (False, True):
        torch.manual_seed(0)
        engine = initialize(Busy(), config, device="cpu")
        losses = []
        for update in range(6):
            if tested and update == 3:
                run_range_test(engine, [torch.ones(4, 4)], lambda model, batch: model(batch).square().mean(),
                               rates=[5], steps=4, progress=False)  # fmt: skip
            losses.append(engine.backward(engine(torch.ones(4, 4)).square().mean()).item())
            engine.step()
        found.append(losses)
    assert found[0] == found[1]


class Noisy(Dataset[Any]):
    def __init__(self) -> None:
        self.random, self.numpy, self.torch = random.Random(1), numpy.random.default_rng(2), torch.Generator()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        noise = self.random.random() + self.numpy.random() + torch.rand((), generator=self.torch)
        return torch.full((4,), float(index)) + noise


def test_a_dataset_draws_from_its_own_generators_what_it_would_have() -> None:
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    engine = initialize(nn.Linear(4, 1), config, device="cpu")
    data = Noisy()
    for source in (data, DataLoader(ConcatDataset([Subset(data, range(8))]), batch_size=4)):
        put_back = capture_generators(data)
        expected = [data[index].tolist() for index in range(3)]
        put_back()
        run_range_test(engine, source, lambda model, batch: model(batch).square().mean(),
                       rates=[5], steps=4, progress=False)  # fmt: skip
        assert [data[index].tolist() for index in range(3)] == expected


class Scaled(nn.Module):
    """A loss with a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.scale = self.scale * 1.1
        return self.scale * (output - target).square().mean()


def test_a_loss_that_is_a_module_is_what_it_was() -> None:
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    engine, loss = initialize(nn.Linear(4, 1), config, device="cpu"), Scaled()
    run_range_test(engine, (torch.ones(8, 4), torch.ones(8, 1)), loss, rates=[5], steps=4, progress=False)
    assert loss.scale == 1.0
