"""What is printed: progress lines, memory, the config in force; when it comes, what is in it, on which rank."""

from __future__ import annotations

import io
import logging
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from redline import Engine, initialize, run_range_test
from redline.config import load_config
from redline.monitoring.progress import TrainingBar, log_config, memory_line
from tests.callbacks import find
from tests.distributed import run_ranks
from tests.terminal import on_terminal
from tests.tiny import X, Y, listen, make_engine, train


@pytest.fixture(autouse=True)
def _logs_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="redline")


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    """The progress lines so far, as names and values."""
    found = [message for message in caplog.messages if message.startswith("step=")]
    return [dict(part.split("=") for part in line.split(", ")) for line in found]


# -- progress lines ------------------------------------------------------------------------------------------


def test_a_line_is_printed_once_every_so_many_steps(caplog: pytest.LogCaptureFixture) -> None:
    train(make_engine(gradient_accumulation_steps=2, steps_per_print=3), 14)
    names = ["step", "skipped", "loss", "lr", "mom", "norm", "samples/s"]
    assert [list(line) for line in lines(caplog)] == [names] * 2
    assert [line["step"] for line in lines(caplog)] == ["3", "6"]


def test_it_has_the_loss_and_the_learning_rate_of_its_step(caplog: pytest.LogCaptureFixture) -> None:
    schedule = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    losses = train(make_engine(steps_per_print=1, scheduler=schedule), 3)
    assert [float(line["loss"]) for line in lines(caplog)] == pytest.approx(losses, rel=1e-5)
    assert [line["lr"] for line in lines(caplog)] == ["[0.001]", "[0.0005]", "[0.00025]"]


def test_the_loss_is_the_mean_over_the_micro_batches(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=1, gradient_accumulation_steps=4)
    with torch.no_grad():
        full = float(nn.functional.mse_loss(engine(X), Y))
    for rows in range(0, 16, 4):
        engine.backward(nn.functional.mse_loss(engine(X[rows : rows + 4]), Y[rows : rows + 4]))
        engine.step()
    assert float(lines(caplog)[0]["loss"]) == pytest.approx(full, rel=1e-5)


def test_tensors_and_what_is_not_a_number_are_printed_as_numbers(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.25))
    engine = initialize(model, {"train_batch_size": 4, "steps_per_print": 1}, optimizer=optimizer, device="cpu")
    engine.backward(nn.functional.mse_loss(engine(X), Y) * math.nan)
    engine.step()
    assert (lines(caplog)[0]["lr"], lines(caplog)[0]["loss"]) == ("[0.25]", "nan")


def test_none_is_printed_unless_asked_for_and_then_at_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine()
    for every, micro_steps in ((None, 20), (7, 2), (None, 20)):
        engine.steps_per_print = every
        train(engine, micro_steps)
    assert [line["step"] for line in lines(caplog)] == ["21"]


def test_a_range_test_prints_none_and_training_after_it_does(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=1, wall_clock_breakdown=True, memory_breakdown=True)
    before = len(caplog.messages)
    run_range_test(engine, (X, Y), nn.functional.mse_loss, steps=20, rates=[5.0], progress=False)
    assert caplog.messages[before:] == []
    train(engine, 2)
    assert [line["step"] for line in lines(caplog)] == ["1", "2"]


def test_a_loss_scale_is_printed_where_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    train(make_engine(steps_per_print=1, fp16={"enabled": True, "loss_scale": 1024.0}), 1)
    assert lines(caplog)[0]["loss_scale"] == "1024"


def lines_of_a_rank() -> tuple[list[str], float]:
    messages = listen()
    losses = train(make_engine(steps_per_print=2), 2)
    return [line for line in messages if line.startswith("step=")], losses[-1]


def test_two_ranks_print_one_line_with_the_mean_of_their_losses() -> None:
    (first, one), (second, other) = run_ranks(lines_of_a_rank, 2)
    assert (len(first), second) == (1, [])
    assert one != other
    assert float(first[0].split("loss=")[1].split(",")[0]) == pytest.approx((one + other) / 2, rel=1e-5)


# -- samples per second --------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the lines see, in its only element."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def train_in(clock: list[float], seconds: list[float], engine: Engine) -> None:
    for each in seconds:
        clock[0] += each
        train(engine, 1)


def test_the_speed_is_that_since_the_last_line(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=4)
    train_in(clock, [1, 1, 1, 1, 2, 2, 2, 2], engine)
    engine._counters.global_steps = 1000  # as at the load of a checkpoint
    train_in(clock, [1, 1, 1, 1], engine)
    assert [line["samples/s"] for line in lines(caplog)] == ["4", "2", "4"]


def test_the_first_step_does_not_count(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    train_in(clock, [100, 2], make_engine(steps_per_print=1))
    assert [line.get("samples/s") for line in lines(caplog)] == [None, "2"]


def test_the_speed_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    train(make_engine(steps_per_print=1, timers={"throughput": {"enabled": False}}), 3)
    assert "samples/s" not in lines(caplog)[-1]


# -- memory and the config -----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_the_memory_of_the_process_grows_with_what_it_holds() -> None:
    def resident() -> float:
        found = re.fullmatch(r"memory \(GiB\): resident=([\d.]+), peak=([\d.]+)", memory_line(torch.device("cpu")))
        assert found is not None and float(found[2]) >= float(found[1]) - 0.01
        return float(found[1])

    before = resident()
    held = torch.ones(2**25)  # an eighth of a GiB
    assert resident() - before == pytest.approx(held.nbytes / 2**30, abs=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_it_is_the_allocators() -> None:
    held = torch.ones(2**28, device="cuda")  # one GiB
    found = re.findall(r"(\w+)=([\d.]+)", memory_line(held.device))
    assert [name for name, _ in found] == ["allocated", "peak", "reserved"]
    assert all(float(value) >= 1 for _, value in found)


def test_memory_is_printed_with_the_model_built_and_below_each_line(caplog: pytest.LogCaptureFixture) -> None:
    train(make_engine(memory_breakdown=True, steps_per_print=1), 1)
    found = [message.partition("memory (GiB): ")[0] for message in caplog.messages if "memory (GiB): " in message]
    assert found == ["the model is built; ", "  "]
    assert caplog.messages[-2].startswith("step=1")


def test_every_value_of_the_config_is_printed_with_its_origin_but_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    log_config(load_config({"train_batch_size": 8, "dump_state": True, "comet": {"api_key": "hush"}}))
    (text,) = caplog.messages
    rows = [line.split(maxsplit=1) for line in text.splitlines()]
    assert text.startswith("config in force: config\n")
    assert ["train_batch_size", "8 (given)"] in rows
    assert ["gradient_accumulation_steps", "1 (derived)"] in rows
    assert ["gradient_clipping", "1.0 (default)"] in rows
    assert ["comet.api_key", "*** (given)"] in rows
    assert "hush" not in text


# -- the bar over the loader -----------------------------------------------------------------------------

DATA = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))


def engine_with(data: Dataset[Any] | None = DATA, **config: Any) -> Engine:
    return make_engine(data=data, **config)


def pass_over(engine: Engine, epochs: int = 1) -> None:
    assert engine.training_dataloader is not None
    for _ in range(epochs):
        for x, y in engine.training_dataloader:
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step()


def test_each_epoch_has_a_bar_with_learning_rate_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    pass_over(engine_with(), epochs=2)
    bars = [line for line in terminal.screen() if line.startswith("epoch")]
    assert [bar.split(" ")[1] for bar in bars] == ["1", "2"]
    assert all(" 8/8 batch " in bar and "lr 0.001, loss " in bar for bar in bars)


def test_log_lines_stay_above_the_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = on_terminal(monkeypatch)
    handler = logging.StreamHandler(terminal)
    handler.setFormatter(logging.Formatter("engine: %(message)s"))
    monkeypatch.setattr(logging.getLogger("redline"), "handlers", [handler])
    caplog.set_level(logging.INFO, logger="redline")
    pass_over(engine_with(steps_per_print=3))
    lines = [line for line in terminal.screen() if "step=" in line]
    assert [line.partition(",")[0] for line in lines] == ["engine: step=3", "engine: step=6"]
    assert handler.stream is terminal


def test_there_is_none_without_a_terminal_or_where_the_config_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert find(engine_with(), TrainingBar) is None
    on_terminal(monkeypatch)
    assert find(engine_with(), TrainingBar) is not None
    assert find(engine_with(redline={"progress": False}), TrainingBar) is None


def test_a_prepared_loader_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    engine = engine_with(None)
    for _ in engine.prepare(DataLoader(DATA, batch_size=4)):
        pass
    assert any(" 8/8 batch " in line for line in terminal.screen())


def test_the_config_can_ask_for_one_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    pass_over(engine_with(redline={"progress": True}))
    assert "8/8" in pipe.getvalue()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.randn(4), torch.randn(1)) for _ in range(8)])


def test_an_optimizer_that_finds_its_own_learning_rate_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    engine = engine_with()
    assert engine.optimizer is not None
    engine.optimizer.param_groups[0]["lr"] = None

    def step(closure: Any = None) -> None: ...

    engine.optimizer.step = step  # type: ignore[method-assign]
    pass_over(engine)
    assert any(" 8/8 batch " in line and "loss " in line for line in terminal.screen())


def test_data_of_unknown_length_has_a_bar_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    pass_over(engine_with(Stream()))
    assert any(line.startswith("epoch 1 ") and " 2/? batch " in line for line in terminal.screen())


def test_a_pass_that_is_left_early_closes_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    engine = engine_with()
    assert engine.training_dataloader is not None
    for _ in engine.training_dataloader:
        break
    assert sys.stderr is terminal
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_range_test_over_the_engines_loader_has_no_second_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    engine = engine_with()
    loss = nn.functional.mse_loss
    run_range_test(engine, engine.training_dataloader, loss, steps=20, rates=[5.0], progress=False)
    assert "epoch" not in terminal.getvalue()


def own_loop(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(4, 4)).mean())
        engine.step()


@pytest.fixture
def refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar is drawn anew whenever it moves."""
    monkeypatch.setattr("redline.console.REFRESH_EVERY", 0)


@pytest.mark.usefixtures("refreshed")
def test_a_loop_of_ones_own_has_a_bar_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    engine = engine_with(None)
    own_loop(engine, 5)
    find(engine, TrainingBar)._steps.close()
    (line,) = [line for line in terminal.screen() if line.startswith("training")]
    assert " 5/? step " in line and "lr 0.001, loss " in line and " samples/s" in line
    assert sys.stderr is terminal


@pytest.mark.usefixtures("refreshed")
def test_a_pass_over_the_loader_closes_the_bar_of_steps_and_later_steps_go_on_counting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)
    engine = engine_with()
    own_loop(engine, 2)
    pass_over(engine)
    own_loop(engine, 1)
    find(engine, TrainingBar)._steps.close()
    shown = [line.split(" ")[0] for line in terminal.screen() if line.startswith(("training", "epoch"))]
    assert shown == ["training", "epoch", "training"]
    assert " 3/? step " in [line for line in terminal.screen() if line.startswith("training")][-1]


def test_a_script_with_a_bar_of_its_own_gets_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    terminal = on_terminal(monkeypatch)
    engine = engine_with(None)
    for _ in tqdm.tqdm(range(3), file=io.StringIO()):
        own_loop(engine, 1)
    assert "training" not in terminal.getvalue()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_a_loss_is_shown_when_it_has_arrived() -> None:
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"}, "redline": {"progress": True}}
    engine = initialize(nn.Linear(4, 1), config, training_data=DATA)
    pass_over(engine)
    bar = find(engine, TrainingBar)
    bar._describe()
    torch.cuda.synchronize()
    assert "loss" in bar._describe()
