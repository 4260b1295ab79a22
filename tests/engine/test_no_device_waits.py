"""Nothing on the hot path waits for the device, shown without one.

A tensor on the meta device has no values, so that whatever reads one raises: a run on it takes the branch that CUDA
takes, and fails where that would wait. Collectives need values; there a dispatch mode on the CPU raises for the
operations that read them, while the engine takes the CPU for a device that runs on its own.

A dispatch mode does not see two ways of waiting: an event, and `torch.tensor(number, device=...)`, which copies from
pageable memory. Both are replaced here, and counted or refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from redline import Engine, device, initialize
from tests.distributed import run_ranks

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, unchecked": {"bf16": {"enabled": True, "check_grad_overflow": False}},
    "fp16": {"fp16": {"enabled": True}},
    "autocast bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "autocast fp16": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "Adam": ("Adam", {"adam_w_mode": False}),
    "SGD": ("SGD", {}),
    "SGD with momentum": ("SGD", {"momentum": 0.9}),
    "Adagrad": ("Adagrad", {}),
    "Lamb": ("Lamb", {}),
    "Lion": ("Lion", {}),
    "Muon": ("Muon", {}),
    "RMSprop": ("RMSprop", {}),
    **{name: (name, {}) for name in ("Adadelta", "Adamax", "NAdam", "RAdam", "Rprop")},
}
_FUSED = ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_")


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def config_of(optimizer: str, precision: str, accumulation: int, **rest: Any) -> dict[str, Any]:
    name, params = OPTIMIZERS[optimizer]
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": name, "params": {"lr": 0.01, **params}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000,
        **PRECISIONS[precision],
        **rest,
    }


def train(engine: Engine, rows: Tensor, steps: int) -> None:
    for _ in range(steps * engine.gradient_accumulation_steps()):
        engine.backward(engine(rows).float().square().mean())
        engine.step()


# -- the meta device -------------------------------------------------------------------------------------------------


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch and the engine choose on the meta device what they choose on CUDA; missing kernels do nothing."""
    chooses = importlib.import_module("torch.optim.optimizer")  # torch.optim has taken its name away
    monkeypatch.setattr(chooses, "_get_fused_kernels_supported_devices", lambda: ["cuda", "cpu", "meta"])
    monkeypatch.setattr(chooses, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "meta"])
    monkeypatch.setattr("redline.optimizers.fused._DEVICES", ("cpu", "cuda", "meta"))
    for name in _FUSED:
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: None)
    make = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        assert torch.device(kwargs.get("device") or "cpu").type == "cpu", "torch.tensor() waits for a device"
        return make(data, *args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values[0].item(), lambda values: values.tolist(), lambda values: values.cpu(),
        lambda values: values.numpy(), lambda values: bool(values[0]), lambda values: float(values[0]),
        lambda values: values[values > 0], lambda values: values.nonzero(), lambda values: torch.where(values > 0),
        lambda values: torch.equal(values, values), lambda values: torch.allclose(values, values),
        lambda values: values.unique(), lambda values: torch.empty(3).copy_(values),
    ],
)  # fmt: skip
def test_whatever_reads_a_value_raises_on_the_meta_device(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        read(torch.ones(3, device="meta"))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_reads_nothing_from_the_device(
    precision: str, optimizer: str, accumulation: int, like_cuda: None
) -> None:
    engine = initialize(model_of(), config_of(optimizer, precision, accumulation), device="meta")
    train(engine, torch.zeros(2, dtype=torch.long, device="meta"), steps=4)
    assert engine.global_steps == 4
    assert isinstance(engine.grad_norm, Tensor) and engine.grad_norm.device.type == "meta"


# -- a device that runs on its own, played by the CPU ----------------------------------------------------------------


class Arrivals:
    """Takes the place of page-locked memory and CUDA's events: what is sent to the host arrives at once.

    Attributes:
        waits: how often the host has waited for an arrival.
    """

    def __init__(self) -> None:
        self.waits = 0

    def send(self, values: Sequence[Tensor | float]) -> tuple[list[float], Arrivals]:
        with unwatched():
            return [float(value) for value in values], self

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.waits += 1


@contextmanager
def cpu_like_cuda() -> Iterator[Arrivals]:
    """Have the engine take the branch of CUDA on the CPU."""
    arrivals = Arrivals()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_READ_AT_ONCE", ())
        patch.setattr(device, "_send", arrivals.send)
        yield arrivals


def weights_after(optimizer: str, precision: str, overflows: Sequence[int]) -> tuple[list[Tensor], Any, list[Any]]:
    """Train, with a loss that is not finite at some steps."""
    engine = initialize(model_of(), config_of(optimizer, precision, 1), device="cpu")
    for step in range(6):
        loss = engine(torch.arange(2)).float().square().mean()
        engine.backward(loss * float("inf") if step in overflows else loss)
        engine.step()
    return [param.detach() for param in engine.module.parameters()], engine.get_lr(), [
        engine.skipped_steps, engine.loss_scale
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "autocast fp16"])
def test_steps_that_the_device_skips_leave_what_skipped_steps_leave(precision: str, optimizer: str) -> None:
    overflows = [0, 3, 4]
    expected = weights_after(optimizer, precision, overflows)
    with cpu_like_cuda():
        weights, lr, counts = weights_after(optimizer, precision, overflows)
    assert (lr, counts) == expected[1:] and counts[0] == len(overflows)
    for weight, wanted in zip(weights, expected[0]):
        assert weight.isfinite().all()
        torch.testing.assert_close(weight, wanted, rtol=1e-3, atol=1e-5)


# -- collectives -----------------------------------------------------------------------------------------------------

_READS = ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim")


class NoReads(TorchDispatchMode):
    """Raises where a value is read, except from an optimizer's step counters, which are on the host."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self._optimizer = optimizer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        reads = name in _READS
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # a mask's size is read
            reads = any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
        if reads and not any(args[0] is each for each in self._counters()):
            raise AssertionError(f"{func} reads a value of shape {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))

    def _counters(self) -> list[Any]:
        names = ("step", "mu_product")
        return [state[name] for state in self._optimizer.state.values() for name in names if name in state]


@contextmanager
def no_reads(optimizer: Any) -> Iterator[None]:
    """Raise where a value is read."""

    def refuse(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"tolist(), cpu() or numpy() reads a value of shape {tuple(tensor.shape)}")

    with pytest.MonkeyPatch.context() as patch, NoReads(optimizer):
        for name in ("tolist", "cpu", "numpy"):  # on the CPU no operation that a mode sees
            patch.setattr(Tensor, name, refuse)
        yield


@contextmanager
def unwatched() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def test_a_read_on_the_cpu_is_noticed() -> None:
    values = torch.ones(3)
    optimizer = torch.optim.SGD([nn.Parameter(values)])
    for read in (
        lambda: values[0].item(), lambda: float(values.sum()), lambda: bool(values[0]), lambda: values.tolist(),
        lambda: values.cpu(), lambda: values.numpy(), lambda: values.nonzero(), lambda: values[values > 0],
        lambda: torch.equal(values, values), lambda: torch.where(values > 0), lambda: values.unique(),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="reads a value"), no_reads(optimizer):
            read()
    engine = initialize(model_of(), config_of("AdamW", "fp32", 1), device="cpu")
    with pytest.raises(AssertionError, match="reads a value"), no_reads(engine.optimizer):
        train(engine, torch.arange(2), steps=1)


def waits_of_steps(cases: list[tuple[int, str, str, int]]) -> list[int]:
    """How often three steps wait for a number of the step before, for each (stage, optimizer, precision, steps)."""
    dist.init_process_group("gloo")
    found = []
    for stage, optimizer, precision, accumulation in cases:
        rest = {"zero_optimization": {"stage": stage}, "redline": {"zero": {"smallest_block": 1}}}
        with cpu_like_cuda() as arrivals:
            engine = initialize(model_of(), config_of(optimizer, precision, accumulation, **rest), device="cpu")
            rows = torch.arange(2) + dist.get_rank()
            train(engine, rows, steps=1)  # compares the ranks' first batches, and makes the optimizer's state
            engine.resolve_pending_step()
            # Numbers of the host's own, on CUDA, too.
            engine._accumulation._agrees_before_backward = engine._accumulation._agrees_on_host = False
            arrivals.waits = 0
            try:
                with no_reads(engine.optimizer):
                    train(engine, rows, steps=3)
            except AssertionError as error:
                raise AssertionError(f"stage {stage}, {optimizer}, {precision}, accumulation {accumulation}") from error
            found.append(arrivals.waits)
            assert isinstance(engine.grad_norm, Tensor)
    return found


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.long), 2, 3])
def test_a_step_of_two_ranks_reads_nothing(stage: int) -> None:
    """Where steps may be skipped, a backward waits for the norm of the step before, whose loss scale it needs."""
    optimizers = ["AdamW", "SGD with momentum", "Adagrad", "Lamb", "Lion", "Muon", "RMSprop"]
    cases = [(stage, "AdamW", precision, 1) for precision in PRECISIONS]
    cases += [(stage, "AdamW", precision, 3) for precision in ("fp32", "bf16", "fp16")]
    cases += [(stage, optimizer, "bf16", 1) for optimizer in optimizers[1:]]
    expected = [2 if precision in ("bf16", "fp16", "autocast fp16") else 0 for _, _, precision, _ in cases]
    for waits in run_ranks(waits_of_steps, 2, cases):
        assert waits == expected
