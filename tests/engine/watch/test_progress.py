"""The line of progress: when it comes, what is in it, and who hears it."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Engine, initialize, run_range_test
from engine.watch.progress import Progress, shown
from tests.distributed import run_ranks

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 1, generator=torch.Generator().manual_seed(2))
SGD = {"type": "SGD", "params": {"lr": 0.1}}
mse = nn.functional.mse_loss


def make_engine(**config: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": SGD, "gradient_clipping": 0, **config}
    return initialize(model, config, device="cpu")


def train(engine: Engine, micro_steps: int) -> list[Tensor]:
    losses = []
    for index in range(micro_steps):
        rows = slice(index * 4 % 16, index * 4 % 16 + 4)
        losses.append(engine.backward(mse(engine(X[rows]), Y[rows])).detach())
        engine.step()
    return losses


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    """The lines of progress so far, as names and values."""
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step=")]
    return [dict(part.split("=") for part in line.split(", ")) for line in said]


@pytest.fixture(autouse=True)
def _listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="engine")


def test_progress_is_printed_once_every_so_many_updates(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(gradient_accumulation_steps=2, steps_per_print=3, gradient_clipping=1.0)
    train(engine, 14)
    assert [list(line) for line in lines(caplog)] == [
        ["step", "skipped", "loss", "lr", "mom", "norm", "samples/s"]
    ] * 2  # fmt: skip
    assert [line["step"] for line in lines(caplog)] == ["3", "6"]


def test_progress_tells_the_loss_and_the_rate_of_the_update_it_counts(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=1, scheduler={"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}})
    losses = [float(train(engine, 1)[0]) for _ in range(3)]
    assert [float(line["loss"]) for line in lines(caplog)] == pytest.approx(losses, rel=1e-5)
    assert [line["lr"] for line in lines(caplog)] == ["[0.1]", "[0.05]", "[0.025]"]


def test_the_loss_is_the_mean_over_the_micro_batches(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=1, gradient_accumulation_steps=4)
    with torch.no_grad():
        whole = float(mse(engine(X), Y))
    train(engine, 4)
    assert float(lines(caplog)[0]["loss"]) == pytest.approx(whole, rel=1e-5)


def test_a_tensor_rate_is_printed_as_a_number(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.25))
    engine = initialize(model, {"train_batch_size": 4, "steps_per_print": 1}, optimizer=optimizer, device="cpu")
    train(engine, 1)
    assert lines(caplog)[0]["lr"] == "[0.25]"


def test_no_progress_is_printed_unless_asked_for_and_then_at_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine()
    train(engine, 20)
    assert lines(caplog) == []
    engine.steps_per_print = 7
    train(engine, 2)
    assert [line["step"] for line in lines(caplog)] == ["21"]
    engine.steps_per_print = None
    train(engine, 20)
    assert len(lines(caplog)) == 1


def test_other_ranks_print_no_progress(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(steps_per_print=1)
    monkeypatch.setenv("RANK", "1")
    train(engine, 2)
    assert lines(caplog) == []


def test_a_loss_that_is_not_a_number_is_trained_on_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=1)
    engine.backward(mse(engine(X), Y) * math.nan)
    engine.step()
    assert lines(caplog)[0]["loss"] == "nan"


def test_a_range_test_prints_no_progress_and_training_after_it_does(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=1, wall_clock_breakdown=True, memory_breakdown=True)
    said = len(caplog.records)
    run_range_test(engine, (X, Y), mse, steps=20, rates=[5.0], progress=False)
    assert [record.getMessage() for record in caplog.records[said:]] == []
    train(engine, 2)
    assert [line["step"] for line in lines(caplog)] == ["1", "2"]


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
    assert [line["samples/s"] for line in lines(caplog)] == ["4", "2"]


def test_the_time_before_the_first_update_does_not_count(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=1)
    train_in(clock, [100, 2], engine)
    assert "samples/s" not in lines(caplog)[0]
    assert lines(caplog)[1]["samples/s"] == "2"


def test_a_counter_that_jumps_as_at_a_checkpoint_does_not_show_in_the_speed(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(steps_per_print=2)
    train_in(clock, [1, 1], engine)
    engine.global_steps = 1000
    train_in(clock, [1, 1], engine)
    assert lines(caplog)[-1]["samples/s"] == "4"


def test_the_speed_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=1, timers={"throughput": {"enabled": False}})
    train(engine, 3)
    assert "samples/s" not in lines(caplog)[-1]


# -- what goes with it ---------------------------------------------------------------------------------------


class Scaled:
    """As much of an engine in fp16 as a line looks at."""

    steps_per_print, global_steps, skipped_steps, loss_scale = 1, 5, 2, 1024.0
    loss, grad_norm = torch.tensor(0.5), torch.tensor(2.0)

    class world:
        @staticmethod
        def mean(value: Tensor) -> Tensor:
            return value

    def get_lr(self) -> list[float]:
        return [0.1, 0.2]

    def get_mom(self) -> list[Any]:
        return [(0.9, 0.99), None]


def test_a_loss_scale_is_shown_where_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    Progress().updated(Scaled())  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == [
        "step=5, skipped=2, loss=0.5, lr=[0.1, 0.2], mom=[[0.9, 0.99], None], norm=2, loss_scale=1024"
    ]


def test_a_gauge_gets_updates_and_seconds_and_may_be_silent(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    class Gauge:
        def line(self, updates: int, seconds: float) -> str | None:
            return f"{updates} in {seconds:g}" if updates else None

    engine = make_engine(steps_per_print=2)
    engine.observers[:] = [Progress([Gauge()])]
    said = len(caplog.records)
    train_in(clock, [1, 1, 3, 3], engine)
    assert [r.getMessage() for r in caplog.records[said:] if r.getMessage()[0] == " "] == ["  1 in 1", "  2 in 6"]


def test_numbers_are_shown_to_six_digits() -> None:
    assert shown([1 / 3, (1e-9, None)]) == "[0.333333, [1e-09, None]]"


def lines_of_a_rank() -> tuple[list[str], float]:
    """What a rank prints over two updates, and its own last loss."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("engine").addHandler(handler)
    logging.getLogger("engine").setLevel(logging.INFO)
    engine = make_engine(steps_per_print=2)
    for _ in range(2):
        engine.backward(mse(engine(X[:4] * (1 + engine.global_rank)), Y[:4]))
        engine.step()
    assert engine.loss is not None
    return [line for line in said if line.startswith("step=")], float(engine.loss)


def test_two_ranks_print_one_line_with_the_mean_of_their_losses() -> None:
    (first, one), (second, other) = run_ranks(lines_of_a_rank, 2)
    assert (len(first), second) == (1, [])
    assert one != other
    assert float(first[0].split("loss=")[1].split(",")[0]) == pytest.approx((one + other) / 2, rel=1e-5)
