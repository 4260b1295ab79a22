"""Memory in the lines, and once when the model is built."""

from __future__ import annotations

import logging
import re
import sys

import pytest
import torch
from torch import nn

from engine import initialize
from engine.watch.memory import Memory


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_the_memory_of_the_process_grows_with_what_it_holds() -> None:
    def resident() -> float:
        found = re.fullmatch(r"memory \(GiB\): resident=([\d.]+), peak=([\d.]+)", Memory(torch.device("cpu")).line())
        assert found is not None and float(found[2]) >= float(found[1]) - 0.01
        return float(found[1])

    before = resident()
    held = torch.ones(2**25)  # an eighth of a GiB
    assert resident() - before == pytest.approx(held.nbytes / 2**30, abs=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_it_is_the_allocators() -> None:
    held = torch.ones(2**28, device="cuda")  # one GiB
    found = re.findall(r"(\w+)=([\d.]+)", Memory(held.device).line())
    assert [name for name, _ in found] == ["allocated", "peak", "reserved"]
    assert all(float(value) >= 1 for _, value in found)


def test_memory_is_told_with_the_model_built_and_with_each_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="engine")
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD"}, "memory_breakdown": True, "steps_per_print": 1}
    engine = initialize(nn.Linear(4, 1), config, device="cpu")
    engine.backward(engine(torch.randn(4, 4)).mean())
    engine.step()
    said = [message.partition("memory (GiB): ")[0] for message in caplog.messages if "memory (GiB): " in message]
    assert said == ["the model is built; ", "  "]
