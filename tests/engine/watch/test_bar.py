"""The bar over the loader: on a terminal, above it what the log prints, and none where it is not wanted."""

from __future__ import annotations

import importlib.util
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from engine import Engine, EngineError, initialize, run_range_test
from engine.watch.bar import Bar, Glance

pytest.importorskip("tqdm", reason="the extra `progress` is not installed")

DATA = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Lines as they stand at the end."""
        return [line.rpartition("\r")[2] for line in self.getvalue().split("\n")]


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal from here on; no fixture, since pytest takes stderr back before the test begins."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def make_engine(data: Dataset[Any] | None = DATA, **config: Any) -> Engine:
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"}, **config}
    return initialize(nn.Linear(4, 1), config, training_data=data, device="cpu")


def train(engine: Engine, epochs: int = 1) -> None:
    assert engine.training_dataloader is not None
    for _ in range(epochs):
        for x, y in engine.training_dataloader:
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step()


def has_bar(engine: Engine) -> bool:
    return any(isinstance(observer, Bar) for observer in engine.observers)


def test_each_epoch_has_a_bar_with_rate_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    engine = make_engine()
    train(engine, epochs=2)
    bars = [line for line in terminal.screen() if line.startswith("epoch")]
    assert [bar.partition(":")[0] for bar in bars] == ["epoch 1", "epoch 2"]
    assert all("| 8/8 [" in bar and "lr 0.001, loss " in bar for bar in bars)


def test_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = on_terminal(monkeypatch)
    handler = logging.StreamHandler(terminal)
    handler.setFormatter(logging.Formatter("engine says %(message)s"))
    monkeypatch.setattr(logging.getLogger("engine"), "handlers", [handler])
    caplog.set_level(logging.INFO, logger="engine")
    train(make_engine(steps_per_print=3))
    lines = [line for line in terminal.screen() if "step=" in line]
    assert [line.partition(",")[0] for line in lines] == ["engine says step=3", "engine says step=6"]
    assert logging.getLogger("engine").handlers == [handler]


def test_there_is_none_without_a_terminal_or_a_loader_or_against_the_configs_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not has_bar(make_engine())
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert has_bar(make_engine())
    assert not has_bar(make_engine(None))
    assert not has_bar(make_engine(redline={"progress": False}))


def test_the_config_can_want_one_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    train(make_engine(redline={"progress": True}))
    assert "8/8" in pipe.getvalue()


def test_without_tqdm_there_is_none_and_wanting_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not has_bar(make_engine())
    with pytest.raises(EngineError, match=r"redline.progress: it needs tqdm; .*pip install 'redline\[progress\]'"):
        make_engine(redline={"progress": True})


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.randn(4), torch.randn(1)) for _ in range(8)])


def test_data_of_unknown_length_has_a_bar_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    train(make_engine(Stream()))
    assert any(line.startswith("epoch 1: 2batch [") for line in terminal.screen())


def test_a_pass_that_is_left_early_closes_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    engine = make_engine()
    assert engine.training_dataloader is not None
    handlers = logging.getLogger("engine").handlers
    for _ in engine.training_dataloader:
        break
    assert logging.getLogger("engine").handlers == handlers
    assert terminal.getvalue().endswith("\n")


def test_a_range_test_over_the_engines_loader_has_no_second_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    engine = make_engine()
    run_range_test(
        engine, engine.training_dataloader, nn.functional.mse_loss, steps=20, rates=[5.0], progress=False
    )  # fmt: skip
    assert "epoch" not in terminal.getvalue()


def test_on_the_cpu_a_number_is_read_at_once() -> None:
    assert Glance().at(torch.tensor(2.5)) == Glance().at(2.5) == 2.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_a_number_comes_when_it_is_there() -> None:
    glance, value = Glance(), torch.tensor(2.5, device="cuda")
    assert glance.at(value) is None
    torch.cuda.synchronize()
    assert glance.at(value) == 2.5
