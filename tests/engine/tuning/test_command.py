"""`redline tune` and `redline report` on its folder: exit codes, files, seeds with initial models of their own."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from redline.cli import main
from redline.tuning.result import load_tuning
from tests.tasks import task_folder

TASK = """
import torch
from torch import nn

def linear():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
    return nn.Linear(4, 1), (x, y), nn.MSELoss(), (x[:32], y[:32])

def flat():
    x = torch.zeros(64, 4)
    return nn.Linear(4, 1, bias=False), (x, x[:, :1]), nn.MSELoss()

def never():
    def loss(model, batch):
        raise ValueError("it was run")
    return nn.Linear(4, 1), torch.zeros(64, 4), loss
"""
CONFIG = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a task and a config."""
    with task_folder(tmp_path, monkeypatch, TASK):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        yield tmp_path


def tune(*arguments: str, task: str = "linear") -> int:
    return main(["tune", f"task.py:{task}", "--config", "config.json", "--quiet", *arguments])


def test_each_seed_has_an_initial_model_of_its_own() -> None:
    assert tune("--steps", "5000", "--seeds", "2") == 0
    curves = {curve.name: curve for curve in load_tuning("tune").test.curves}
    assert list(curves) == ["sweep", "sweep, seed 1"]
    assert len({curve.losses[0] for curve in curves.values()}) == 2


def test_the_folder_can_be_reported_again_for_another_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--steps", "4000", "--out", "out") == 0
    assert main(["validate", "out/tuned.json"]) == 0
    (folder / "out" / "report.html").unlink()
    assert main(["report", "out", "--train-steps", "7777"]) == 0
    assert "Tuned for 7777 steps" in capsys.readouterr().out
    assert json.loads((folder / "out" / "tuned.json").read_text())["_range_test"]["train_steps"] == 7777
    assert (folder / "out" / "report.html").exists()
    # A training without room for a cycle has no config.
    assert main(["report", "out", "--train-steps", "1"]) == 1
    assert "No config. A training run of 1 " in capsys.readouterr().out
    assert not (folder / "out" / "tuned.json").exists()


def test_the_monitors_of_the_config_get_the_curves(folder: Path) -> None:
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "job"}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "csv_monitor": monitor}))
    assert tune("--steps", "4000") == 0
    tuning = load_tuning("tune")
    for group, curve in (("RangeTest", tuning.test.curves[0]), ("Search", tuning.search[0].curve)):
        _, *rows = (folder / "job" / f"{group}_{curve.name.replace(' ', '_')}_loss.csv").read_text().splitlines()
        assert [float(row.split(",")[1]) for row in rows] == pytest.approx(list(curve.losses))


def test_a_task_without_descent_exits_with_1_and_no_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tune").mkdir()
    (folder / "tune" / "tuned.json").write_text("{}")  # an earlier tuning's
    assert tune("--steps", "1000", "--force", task="flat") == 1
    assert "No config. " in capsys.readouterr().out
    assert not (folder / "tune" / "tuned.json").exists()
    assert (folder / "tune" / "tune.json").exists()


def test_the_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    text = capsys.readouterr().out
    assert "redline tune task.py:digits --config config.json --steps 4000" in text
    assert "Ctrl-C" in text and "Exit code" in text


def test_a_full_disk_costs_the_files_but_not_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("redline.tuning.result.write_text", write)
    assert tune("--steps", "400") == 1
    printed = capsys.readouterr()
    assert "Tuned for 400 steps" in printed.out and '"scheduler": {' in printed.out
    assert "out: tune: No space left on device; the result is printed above" in printed.err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no folder that even root cannot write to")
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tune("--steps", "4000", "--out", "/proc/self", task="never") == 1
    message = capsys.readouterr().err
    assert "out: /proc/self: " in message and "give a folder that can be written to" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "20"], "a search takes 12 at least"),
        (["--steps", "4000", "--budget", "11"], "budget: got 11.0; expected a multiple"),
        (["--steps", "4000", "--config", "nowhere.json"], "nowhere.json"),
        (["--steps", "4000", "--out", "task.py"], "task.py: File exists"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(*arguments) == 1
    assert message in capsys.readouterr().err
