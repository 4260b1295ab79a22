"""The command compare-run: a script's losses here and in DeepSpeed, side by side."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from redline.cli.arguments import aliased, arg, command, kind, positive
from redline.cli.run import FACE
from redline.console import rows_as_text, terminal
from redline.errors import EngineError

__all__ = ["compare_run"]

_RECORDER = Path(__file__).with_name("record_losses.py")
_Losses = dict[tuple[int, int, int], list[float]]  # of each rank, engine and optimizer step: a loss per micro-batch


@command(
    arg("--deepspeed-python", default=sys.executable, metavar="PATH",
        help="a Python that has DeepSpeed (default: this one)"),
    arg("--steps", type=positive, default=20, metavar="N", help="optimizer steps to run (default: 20)"),
    arg("--tolerance", type=kind(float, "a number >= 0", lambda value: value >= 0), default=1e-3, metavar="X",
        help="the largest difference of equal losses, times the loss where that is above 1 (default: 0.001)"),
    *aliased("--num_gpus", "--num-gpus", "--nproc-per-node", "--nproc_per_node", dest="ranks", type=positive,
             default=1, metavar="N", help="ranks on this host (default: 1)"),
    arg("--seed", type=int, metavar="N", help="seed torch, random and numpy before the script (default: do not)"),
    arg("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script"),
    arg("-m", "--module", action="store_true", help="SCRIPT is the name of a module"),
    arg("words", nargs=argparse.REMAINDER, metavar="[CONFIG.json] SCRIPT ...",
        help="a config that is passed as --deepspeed_config, the script, and its arguments"),
)  # fmt: skip
def compare_run(options: argparse.Namespace) -> int:
    """Run a script here and in DeepSpeed, and compare their losses.

    The script does not change: losses are taken where it calls backward() of an engine, and it is stopped after 20
    optimizer steps. It runs twice in this directory; {run} in an argument becomes "redline" or "deepspeed", for
    directories that it writes to. A script that seeds nothing needs --seed.

    Exit code: 0 equal within the tolerance, 1 different or failed, 2 wrong command line, 3 DeepSpeed is not installed,
    so that only the losses here are printed.

    examples:
      redline compare-run ds.json train.py
      redline compare-run --deepspeed-python ~/ds/bin/python --num_gpus 2 ds.json train.py --epochs 1
      redline compare-run --seed 1 train.py --deepspeed_config ds.json --output_dir /tmp/{run}
    """
    config = options.words[0] if options.words and options.words[0].endswith((".json", ".hjson")) else None
    words = options.words[config is not None :]
    if not words:
        raise EngineError("compare-run: got no script; expected compare-run [options] [CONFIG.json] SCRIPT ...")
    given = ["--deepspeed_config", config] if config else []
    pythons = {"redline": sys.executable}
    if _has_deepspeed(options.deepspeed_python):
        pythons["deepspeed"] = options.deepspeed_python
    losses = {name: _run(name, python, options, [*words, *given]) for name, python in pythons.items()}
    return _compare(losses["redline"], losses.get("deepspeed"), options)


def _environment(*, face: bool) -> dict[str, str]:
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != FACE]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(FACE), *paths] if face else paths)}


def _has_deepspeed(python: str) -> bool:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('deepspeed') is None)"
    try:
        return subprocess.run([python, "-c", code], env=_environment(face=False), check=False).returncode == 0
    except OSError as error:
        raise EngineError(f"compare-run: --deepspeed-python {python}: {error.strerror}") from None


def _run(name: str, python: str, options: argparse.Namespace, words: list[str]) -> _Losses:
    """Losses of one run.

    Raises:
        EngineError: it failed, or had no losses.
    """
    script, *arguments = (word.replace("{run}", name) for word in words)
    local_rank = [] if options.no_local_rank else ["--local_rank=${local_rank}"]  # torchrun puts the number in
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
                   f"--nproc-per-node={options.ranks}", str(_RECORDER), folder, str(options.steps),
                   "" if options.seed is None else str(options.seed), "module" if options.module else "file",
                   script, *local_rank, *arguments]  # fmt: skip
        print(f"{name}: {script} ...", file=sys.stderr)
        ended = subprocess.run(command, env=_environment(face=name == "redline"), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, errors="replace", check=False)  # fmt: skip
        losses: _Losses = defaultdict(list)
        for path in sorted(Path(folder).glob("*.jsonl")):
            for line in path.read_text().splitlines():
                engine, step, loss = json.loads(line)
                losses[int(path.stem), engine, step].append(loss)
    if ended.returncode or not losses:
        why = f"exit code {ended.returncode}" if ended.returncode else "it never called backward() of an engine"
        raise EngineError(f"compare-run: {name}: {why}; the end of its output:\n{ended.stdout[-4000:]}")
    return dict(losses)


def _compare(ours: _Losses, theirs: _Losses | None, options: argparse.Namespace) -> int:
    """Print rank 0's losses of each step, and the verdict over all ranks; returns the exit code."""
    several = len({engine for _, engine, _ in ours}) > 1
    rows = []
    for (rank, engine, step), values in sorted(ours.items()):
        row = [f"{step} of engine {engine}" if several else str(step), _mean(values)]
        if theirs is not None:
            other = theirs.get((rank, engine, step), [])
            row += [_mean(other), f"{max(map(_distance, values, other), default=math.nan):.2g}"]
        rows += [row] if rank == 0 else []
    heads = ["step", "redline", "deepspeed", "difference"][: len(rows[0])]
    print("\n".join(rows_as_text(rows, heads, *terminal(), numbers=True)) + "\n")
    if theirs is None:
        python = options.deepspeed_python
        print(f"DeepSpeed is not installed for {python}: nothing is compared; give --deepspeed-python")
        return 3
    counts = [sum(map(len, losses.values())) for losses in (ours, theirs)]
    if {key: len(values) for key, values in ours.items()} != {key: len(values) for key, values in theirs.items()}:
        print(f"different: {counts[0]} micro-batches here, {counts[1]} in DeepSpeed")
        return 1
    pairs = [(key, a, b) for key in ours for a, b in zip(ours[key], theirs[key])]
    worst, (rank, _, step) = max((_distance(a, b), key) for key, a, b in pairs)
    tolerance = options.tolerance
    equal = all(_distance(a, b) <= tolerance * max(1.0, abs(b)) for _, a, b in pairs)
    print(f"{'equal' if equal else 'different'}: {counts[0]} losses; the largest difference is {worst:.2g}, in step "
          f"{step} on rank {rank}; tolerance {tolerance:g}, times the loss above 1")  # fmt: skip
    first = min(ours)
    if not equal and _distance(ours[first][0], theirs[first][0]) > tolerance:
        print("The first losses differ, before any optimizer step: the script may seed nothing; give --seed.")
    return 0 if equal else 1


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.6f}" if values else "-"


def _distance(a: float, b: float) -> float:
    return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) if math.isfinite(a - b) else math.inf
