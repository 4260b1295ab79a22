"""Whichever way one rank is lost and wherever it is: do the others name it, and it alone?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_others_name_the_rank_that_is_lost_wherever_it_was(size: int) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "dev" / "blame.py"), "--part", "--ranks", str(size)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
