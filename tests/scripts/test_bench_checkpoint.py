"""The bench of checkpoints runs; its figures depend on the machine, and are not judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_says_what_each_way_of_saving_takes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/bench_checkpoint.py", "--rounds", "1", "--dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[2:5]]
    assert names == ["torch.save", "save_checkpoint", "async_save"]
    assert list(tmp_path.iterdir()) == []
