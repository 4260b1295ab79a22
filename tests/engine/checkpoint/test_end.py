"""A script that ends right after its last save, which is still being written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, torch
from engine import initialize

model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"},
          "redline": {"checkpoint": {"async_save": True}}}
engine = initialize(model, config, device="cpu")
engine.backward(engine(torch.ones(1, 512)).square().mean())
engine.step()
engine.save_checkpoint(sys.argv[1])
"""


def test_the_interpreters_end_waits_until_it_is_on_the_disk(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr
    assert "was not written" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "latest"]
