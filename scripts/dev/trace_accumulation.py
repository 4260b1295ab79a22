#!/usr/bin/env python3
"""In which dtype are the gradients of micro-batches added up? Traces one optimizer step of the `deepspeed` on the path.

    PYTHONPATH=engine/compat .venv/bin/python scripts/dev/trace_accumulation.py bf16 2
    DS_ACCELERATOR=cpu ~/ds/bin/python scripts/dev/trace_accumulation.py bf16 2 --grad-accum-dtype fp32

SGD with a learning rate of 1 takes the gradient off the master weights. It is compared with sums of the same
micro-batches' gradients by plain torch, added up in fp32 and in the dtype of training, and with the gradient in fp64
of the same rounded weights and inputs. Prints relative distances. docs/deepspeed.md has the result in short.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

ROWS, SCALE = 16, 2.0**12  # of a micro-batch; the loss scale in fp16


def make_model(dtype: torch.dtype, seed: int) -> nn.Module:
    """A model whose fp32 weights are rounded to `dtype`, as DeepSpeed's are."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    return model.to(dtype).float()


def flat(tensors: Any) -> Tensor:
    return torch.cat([each.detach().double().flatten() for each in tensors])


def micro_gradients(model: nn.Module, x: Tensor, y: Tensor, scale: float) -> list[tuple[Tensor, ...]]:
    """The gradients of each micro-batch, of its share of the mean loss times the scale."""
    losses = (nn.functional.cross_entropy(model(inputs), labels) / len(x) for inputs, labels in zip(x, y))
    return [torch.autograd.grad(loss.float() * scale if scale > 1 else loss, [*model.parameters()]) for loss in losses]


def taken_by_engine(model: nn.Module, config: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
    """What a step takes off the master weights."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator  # type: ignore[import-not-found]

    get_accelerator().is_fp16_supported = lambda: True  # which DeepSpeed asks of a CPU
    deepspeed.init_distributed("gloo")
    start = flat(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for inputs, labels in zip(x, y):
        engine.backward(nn.functional.cross_entropy(engine(inputs), labels))
        engine.step()
    if config["zero_optimization"]["stage"] == 0 and not hasattr(deepspeed, "__redline__"):
        return start - flat(engine.optimizer.optimizer.param_groups[0]["params"])  # one flat tensor
    return start - flat(map(deepspeed.utils.safe_get_full_fp32_param, engine.module.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtype", choices=["bf16", "fp16"])
    parser.add_argument("stage", type=int)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--grad-accum-dtype", help="the config's data_types.grad_accum_dtype")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dtype, low = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[args.dtype]), {"enabled": True}
    scale = SCALE if args.dtype == "fp16" else 1.0
    made = torch.Generator().manual_seed(args.seed)
    x = torch.randn(args.micro_batches, ROWS, 32, generator=made).to(dtype)
    y = torch.randint(10, (args.micro_batches, ROWS), generator=made)

    exact = sum(map(flat, micro_gradients(make_model(dtype, args.seed).double(), x.double(), y, 1.0)))
    by_batch = micro_gradients(make_model(dtype, args.seed).to(dtype), x, y, scale)
    in_low, in_fp32 = [each.clone() for each in by_batch[0]], [each.float() for each in by_batch[0]]
    for gradients in by_batch[1:]:
        for sums in (in_low, in_fp32):
            torch._foreach_add_(sums, gradients)

    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        os.environ.setdefault("MASTER_PORT", "29533")
        os.chdir(folder)
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": args.micro_batches,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": args.stage},
            "zero_allow_untested_optimizer": True,
            args.dtype: low if args.dtype == "bf16" else {**low, "loss_scale": SCALE},
        }
        if args.grad_accum_dtype:
            config["data_types"] = {"grad_accum_dtype": args.grad_accum_dtype}
        taken = taken_by_engine(make_model(dtype, args.seed), config, x, y)
    sums_by_name = {"fp32 sum": flat(in_fp32) / scale, f"{args.dtype} sum": flat(in_low) / scale, "fp64": exact}
    for name, other in {"the engine": taken, **sums_by_name}.items():
        apart = {to: float((other - each).norm() / each.norm()) for to, each in sums_by_name.items() if to != name}
        print(f"{name}:", ", ".join(f"{value:.2g} from {to}" for to, value in apart.items()))


if __name__ == "__main__":
    main()
