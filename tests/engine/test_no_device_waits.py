"""Nothing on the hot path waits for the device, shown without one.

A tensor on the meta device has no values, so that whatever reads one raises: a run on it takes the branch that CUDA
takes, and fails where that would wait. Collectives need values; there a dispatch mode on the CPU raises for the operations
that read them, while the engine takes the CPU for a device that runs on its own.

A dispatch mode does not see two ways of waiting: an event, and `torch.tensor(number, device=...)`, which copies from
pageable memory. Both are replaced here, and counted or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import Engine, initialize, transfer
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
    """Have torch and the engine choose on the meta device what they choose on CUDA; kernels that it lacks do nothing."""
    monkeypatch.setattr("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["cuda", "cpu", "meta"])
    monkeypatch.setattr("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: ["cuda", "meta"])
    monkeypatch.setattr("engine.fused._DEVICES", ("cpu", "cuda", "meta"))
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
