"""The complete scripts in the documentation run as it says: by `redline run`, on one rank and on two."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 500  # seconds, on a busy machine


def script(page: str) -> str:
    """The page's one Python block."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    return str(code)


def run(folder: Path, *command: str) -> str:
    """What it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, timeout=LIMIT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize(
    ("page", "pattern", "least", "most", "writes"),
    [
        ("deepspeed.md", r"accuracy ([\d.]+)", 0.8, 1.0, "output/latest"),
        ("hf_trainer.md", r"eval loss ([\d.]+)", 0.0, 1.0, "output/model/model.safetensors"),
        ("accelerate.md", r"accuracy ([\d.]+)", 0.8, 1.0, "output/model.pt"),
        ("lightning.md", r"accuracy ([\d.]+)", 0.8, 1.0, "output/checkpoints"),
    ],
)
def test_the_script_of_a_page_runs(
    page: str, pattern: str, least: float, most: float, writes: str, ranks: str, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(script(page))
    printed = run(tmp_path, "redline", "run", "--num_gpus", ranks, "train.py")
    (value,) = re.findall(rf"^{pattern}$", printed, re.MULTILINE)
    assert least <= float(value) <= most
    assert (tmp_path / writes).exists()


def test_accelerates_own_launcher_starts_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(script("accelerate.md"))
    printed = run(
        tmp_path,
        "accelerate.commands.launch",
        *["--use_deepspeed", "--zero_stage", "2", "--num_processes", "2", "train.py"],
    )
    assert re.search(r"^accuracy 0\.[89]", printed, re.MULTILINE)
