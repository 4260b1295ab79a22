"""Record checkpoints of Redline 0.1.0 into tests/golden/checkpoints_0_1, on two ranks.

    PYTHONPATH=CHECKOUT_OF_0_1_0 torchrun --nproc-per-node 2 scripts/dev/record_old_checkpoints.py

One folder per stage and precision: what `save_checkpoint` wrote, and ``expected.pt`` with the full fp32 weights, the
optimizer state by name, and the loss of the next step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # after PYTHONPATH, whose package is recorded

from tests.golden.old_checkpoints import CASES, STEPS, Net, config_of, full, train  # noqa: E402


def main() -> None:
    from engine import initialize  # the import name of 0.1.0

    for name in CASES:
        engine: Any = initialize(Net(), config_of(name), device="cpu")
        for step in range(STEPS):
            train(engine, step)
        folder = ROOT / "tests" / "golden" / "checkpoints_0_1" / name
        engine.save_checkpoint(folder, client_state={"epoch": 3})
        expected: dict[str, Any] = {"weights": {}, "state": {}}
        for key, param in engine.module.named_parameters():
            expected["weights"][key] = full(param)
            expected["state"][key] = {each: full(value) for each, value in engine.optimizer.state[param].items()}
        expected["loss"] = train(engine, STEPS)
        if engine.global_rank == 0:
            torch.save(expected, folder / "expected.pt")


if __name__ == "__main__":
    main()
