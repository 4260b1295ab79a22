"""Ray Train's workers are ranks: the script of docs/launch.md trains on two of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "launch" / "train_ray.py"
LIMIT = 500  # seconds, on a busy machine


def test_rays_workers_train_one_model(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path)
    ran = subprocess.run(
        [sys.executable, SCRIPT.name], cwd=tmp_path, timeout=LIMIT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-5000:]
    loss = re.findall(r"2 ranks, loss ([\d.]+)", ran.stdout)[0]  # Ray may print a line twice
    assert float(loss) < 0.1
