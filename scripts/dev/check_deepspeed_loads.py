"""Let real DeepSpeed load checkpoints that Redline wrote with `redline.checkpoint.format: "deepspeed"`, and go on.

Run by hand with DeepSpeed 0.19.8 and Redline installed on a machine without GPU:

    python scripts/dev/check_deepspeed_loads.py [CASE ...]

Each case starts from what DeepSpeed recorded in ``tests/golden/deepspeed_checkpoints``: Redline loads it, trains on and
saves; DeepSpeed loads that, and its losses have to be those that it had recorded from there on. DeepSpeed's own
zero_to_fp32 has to make the weights that Redline trained of it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.distributed import run_ranks  # noqa: E402
from tests.golden import checkpoint_workload as workload  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "deepspeed_checkpoints"
GROUPED = ("stage1-fp16-two", "stage2-bf16-two", "stage3-bf16-two-groups")
STEPS = 2  # that Redline takes; DeepSpeed takes the rest of those that were recorded
CASES = {
    "stage0-fp32": 1, "stage2-fp32": 1, "stage3-fp32": 1, "stage1-fp32-two": 2, "stage1-fp16-two": 2,
    "stage2-bf16-two": 2, "stage3-fp32-two-subgroups": 2, "stage3-bf16-two-groups": 2, "stage3-fp16-two": 2,
}  # fmt: skip


def train(initialize: Any, name: str, steps: range, source: str, target: str | None) -> tuple[list[float], Any]:
    """Load, train, save; the losses over all ranks, and the weights. Runs in every rank."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    model = workload.build_model()
    params = workload.parameter_groups(model) if name in GROUPED else workload.trainable(model)
    engine = initialize(model, config, params)
    engine.load_checkpoint(source)
    losses = []
    for step in steps:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        loss = workload.loss_of(engine, step, rank, size)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        if size > 1:
            torch.distributed.all_reduce(mean)
        losses.append(float(mean / size))
    if target is None:
        return losses, None
    engine.save_checkpoint(target)
    weights = {key: value.detach() for key, value in engine.module.named_parameters()}
    return losses, {key: getattr(value, "full_tensor", lambda v=value: v)().float() for key, value in weights.items()}


def with_redline(name: str, target: str) -> Any:
    from redline import initialize

    def make(model: Any, config: dict[str, Any], params: Any) -> Any:
        config["redline"] = {"checkpoint": {"format": "deepspeed"}}
        return initialize(model, config, model_parameters=params, device="cpu")

    before = workload.STEPS_BEFORE
    return train(make, name, range(before, before + STEPS), str(GOLDEN / name), target)


def with_deepspeed(name: str, source: str) -> Any:
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True

    def make(model: Any, config: dict[str, Any], params: Any) -> Any:
        return deepspeed.initialize(model=model, config=config, model_parameters=params)[0]

    before, after = workload.STEPS_BEFORE, workload.STEPS_AFTER
    losses, _ = train(make, name, range(before + STEPS, before + after), source, None)
    weights = None if "stage0" in name else dict(get_fp32_state_dict_from_zero_checkpoint(source))
    return losses, weights


def main() -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    failed = False
    for name in sys.argv[1:] or CASES:
        ranks = CASES[name]
        recorded = torch.load(GOLDEN / name / "expected.pt", weights_only=True)["losses"]
        folder = tempfile.mkdtemp()
        first, trained = run_ranks(with_redline, ranks, name, folder, timeout=600.0, fresh=True)[0]
        rest, consolidated = run_ranks(with_deepspeed, ranks, name, folder, timeout=600.0, fresh=True)[0]
        shutil.rmtree(folder)
        low = "16" in name
        worst = max(abs(one - other) / abs(other) for one, other in zip([*first, *rest], recorded, strict=True))
        pairs = [] if consolidated is None else [(consolidated[key], value) for key, value in trained.items()]
        apart = max((float((one - other).abs().max()) for one, other in pairs), default=0.0)
        good = worst < (1e-2 if low else 1e-5) and apart < (1e-2 if low else 1e-7)
        failed |= not good
        print(
            f"{name}: losses within {worst:.1e}, zero_to_fp32 within {apart:.1e}: {'ok' if good else 'FAILED'}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
