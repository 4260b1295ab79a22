"""scripts/dev/bench_checkpoint.py runs; its figures depend on the machine and are not checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_it_prints_the_time_of_each_way_of_saving(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/dev/bench_checkpoint.py", "--rounds", "1", "--dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[2:5]]
    assert names == ["torch.save", "save_checkpoint", "async_save"]
    assert list(tmp_path.iterdir()) == []
