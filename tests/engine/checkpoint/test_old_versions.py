"""Checkpoints that older versions wrote: they load bit for bit, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from redline import initialize
from redline.run_state import named_weights
from tests.distributed import run_ranks
from tests.golden import old_checkpoints

FOLDER = Path(__file__).parent.parent.parent / "golden" / "checkpoints_0_1"


def load_all() -> dict[str, list[str]]:
    """What differs from the old engine, in each case."""
    found: dict[str, list[str]] = {}
    for name in old_checkpoints.CASES:
        expected = torch.load(FOLDER / name / "expected.pt", weights_only=True)
        engine: Any = initialize(old_checkpoints.Net(), old_checkpoints.config_of(name), device="cpu")
        _, client_state = engine.load_checkpoint(FOLDER / name)
        assert (engine.global_steps, client_state) == (old_checkpoints.STEPS, {"epoch": 3})
        faults = found[name] = []
        for key, weight in named_weights(engine).items():
            if not torch.equal(old_checkpoints.full(weight), expected["weights"][key]):
                faults.append(key)
            state = engine.optimizer.state[weight]
            assert state.keys() == expected["state"][key].keys()
            wanted = expected["state"][key]
            faults += [
                f"{each} of {key}"
                for each, value in state.items()
                if not torch.equal(old_checkpoints.full(value), wanted[each])
            ]
        loss = old_checkpoints.train(engine, old_checkpoints.STEPS)
        # FSDP2 left scalars in fp32 in the forward of bf16.
        tolerance = 1e-6 if name.endswith("fp32") else 2e-3
        if engine.global_rank == 0 and not torch.allclose(loss, expected["loss"], rtol=tolerance):
            faults.append(f"the next loss is {loss} instead of {expected['loss']}")
    return found


def test_checkpoints_of_0_1_0_load_bit_for_bit_at_every_stage() -> None:
    assert run_ranks(load_all, 2) == [{name: [] for name in old_checkpoints.CASES}] * 2
