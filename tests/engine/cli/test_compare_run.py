"""`redline compare-run`: a script's losses here and in a stand-in for DeepSpeed, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from redline.cli import main
from tests.face import FACE

SCRIPT = """
import argparse, deepspeed, torch
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.add_argument("--output")
arguments = deepspeed.add_config_arguments(parser).parse_args()
model = torch.nn.Linear(4, 1)
engine = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())[0]
for step in range(100):
    loss = engine(torch.rand(2, 4)).square().mean()
    engine.backward(loss)
    engine.step()
    with open(arguments.output, "a") as file:
        print(step, file=file)
"""
STAND_IN = """
import json, torch
class DeepSpeedEngine(torch.nn.Module):
    def __init__(self, model, config):
        super().__init__()
        self.module, self.global_steps = model, 0
        self.optimizer = torch.optim.SGD(model.parameters(), **config["optimizer"]["params"])
    def forward(self, x):
        return self.module(x)
    def backward(self, loss):
        loss.backward()
    def step(self):
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.global_steps += 1
def add_config_arguments(parser):
    parser.add_argument("--deepspeed_config")
    return parser
def initialize(args, model, model_parameters):
    return DeepSpeedEngine(model, json.load(open(args.deepspeed_config))), None, None, None
"""


def run(folder: Path, *flags: str, package: str | None, script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    """Run the command with a Python that has this package `deepspeed`, or none."""
    (folder / "train.py").write_text(script)
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    (folder / "ds.json").write_text(json.dumps(config))
    packages = folder / "packages"
    packages.mkdir(exist_ok=True)
    if package is not None:
        (packages / "deepspeed.py").write_text(package)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, "-m", "redline", "compare-run", "--deepspeed-python", str(python), "--seed", "1", *flags,
               "ds.json", "train.py", "--output", "out.{run}"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FACE)}  # the command leaves the face out
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.long
def test_a_script_has_the_same_losses_in_both_and_is_stopped_early(tmp_path: Path) -> None:
    done = run(tmp_path, "--steps", "3", package=STAND_IN)
    assert done.returncode == 0, done.stdout + done.stderr
    head, *rows, _, verdict = done.stdout.splitlines()
    assert head.split() == ["step", "redline", "deepspeed", "difference"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert all(row.split()[1] == row.split()[2] for row in rows)
    assert verdict.startswith("equal: 3 losses; the largest difference is ")
    assert (tmp_path / "out.redline").read_text() == (tmp_path / "out.deepspeed").read_text() == "0\n1\n"


@pytest.mark.long
def test_other_losses_and_a_script_that_fails_exit_with_1(tmp_path: Path) -> None:
    done = run(tmp_path, "--steps", "3", package=STAND_IN.replace('["params"])', '["params"], momentum=0.9)'))
    assert done.returncode == 1 and "different: 3 losses" in done.stdout, done.stdout + done.stderr
    assert "before any optimizer step" not in done.stdout, "the first losses are equal"
    done = run(tmp_path, package="def add_config_arguments(parser): raise OSError('no disk')")
    assert done.returncode == 1 and "compare-run: deepspeed: exit code 1" in done.stderr


@pytest.mark.parametrize("backward", ["engine.backward(loss)", "loss.backward()"])
def test_without_deepspeed_the_losses_here_are_printed(backward: str, tmp_path: Path) -> None:
    done = run(tmp_path, "--steps", "2", package=None, script=SCRIPT.replace("engine.backward(loss)", backward))
    assert done.returncode == 3, done.stderr
    assert [row.split()[0] for row in done.stdout.splitlines()[1:3]] == ["1", "2"]
    assert done.stdout.splitlines()[0].split() == ["step", "redline"]
    assert "DeepSpeed is not installed for" in done.stdout


def test_mistakes_say_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare-run", "ds.json"]) == 1
    assert "got no script" in capsys.readouterr().err
    assert main(["compare-run", "--deepspeed-python", "/nowhere/python", "train.py"]) == 1
    assert "--deepspeed-python /nowhere/python: No such file" in capsys.readouterr().err
