"""scripts/dev/measure_memory.py runs, and measures what is estimated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_a_small_run_writes_a_table_in_which_the_estimate_holds(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- by scripts/dev/measure_memory.py -->\nold\n<!-- end -->\n\nafter\n")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "dev" / "measure_memory.py"),
        "--ranks",
        "2",
        "--page",
        str(page),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "--layers", "6", "--width", "32"], env=environment, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stderr
    text = page.read_text()
    assert text.startswith("before") and text.endswith("<!-- end -->\n\nafter\n") and "old" not in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| fp32", "| bf16"))]
    assert [row[:3] for row in rows] == [
        [kind, stage, "2"] for kind in ("fp32", "bf16") for stage in ("0", "1, 2", "3")
    ]
    for row in rows:
        most, estimated = float(row[6]), float(row[7])
        assert 0.85 * estimated <= most <= 1.05 * estimated, row
