"""What a process holds of parameters, gradients and optimizer state at each stage of ZeRO, measured and estimated.

    python scripts/measure_memory.py                 # one, two and four processes; renews the table in docs/zero.md
    python scripts/measure_memory.py --page -        # prints it

Trains a small GPT for two updates in each setting and counts the storages that its engine holds (benchmark/held.py),
on the process that holds most. Processes are this host's CPUs, under torchrun, with gloo.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- by scripts/measure_memory.py -->\n).*?(<!-- end -->)", re.DOTALL)
FORMATS = ("fp32", "bf16")
HEAD = (
    "format",
    "stage",
    "processes",
    "parameters",
    "gradients",
    "optimizer",
    "most at once",
    "estimated",
    "the paper's",
)


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    rows = [row for processes in options.processes for row in measure(options, processes)]
    text = page(rows)
    if options.page == "-":
        print(text)
        return
    path = Path(options.page)
    before = path.read_text()
    if not BLOCK.search(before):
        sys.exit(
            f"measure_memory: {path} has no place for the table: <!-- by scripts/measure_memory.py --> ... <!-- end -->"
        )
    path.write_text(BLOCK.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", before))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="how many; default 1 2 4")
    parser.add_argument("--layers", type=int, default=12, help="of the GPT; default 12")
    parser.add_argument("--width", type=int, default=256, help="of the GPT; default 256")
    parser.add_argument("--page", default=str(ROOT / "docs" / "zero.md"), help="file with the table; - prints it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # where a process leaves what it has measured
    return parser.parse_args()


def measure(options: argparse.Namespace, processes: int) -> list[dict[str, Any]]:
    """Every setting on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        model = ["--layers", str(options.layers), "--width", str(options.width)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        subprocess.run([*torchrun, __file__, *model, "--worker", str(answer)], check=True)
        rows: list[dict[str, Any]] = json.loads(answer.read_text())
    return rows


# -- one process -------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Measure as one of the processes; rank zero writes what the one holds that holds most."""
    import torch.distributed as dist

    logging.getLogger("engine").setLevel("WARNING")
    rows = []
    for kind in FORMATS:
        for stage in (0, 1, 2, 3):
            row = one(options, kind, stage)
            rows.append(row)
            if row["processes"] == 1:
                break
            everyone: list[Any] = [None] * row["processes"]
            dist.all_gather_object(everyone, row["held"])
            row["held"] = [max(each) for each in zip(*everyone)]
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(options.worker).write_text(json.dumps(rows))


def one(options: argparse.Namespace, kind: str, stage: int) -> dict[str, Any]:
    """Train in one setting and look on."""
    import torch
    from benchmark import held, workloads
    from torch.nn.functional import cross_entropy

    from engine import initialize
    from engine.zero.blocks import find_blocks
    from engine.zero.memory import Bytes, count, estimate

    torch.manual_seed(0)
    model = workloads.GPT(options.layers, options.width, 4, 64, 256)
    elements = count(model, find_blocks(model), low=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": kind == "bf16"},
        "redline": {"zero": {"smallest_block": 0}},
    }
    engine = initialize(model, config, device="cpu")
    tokens = torch.randint(256, (1, 65))
    batches = [(tokens[:, :-1], tokens[:, 1:])] * 2
    found = held.measure(
        engine, batches, lambda out, targets: cross_entropy(out.float().flatten(0, 1), targets.flatten())
    )
    said = estimate(elements, Bytes(computed=2 if kind == "bf16" else 4), engine.world_size)[stage]
    return {
        "format": kind, "stage": stage, "processes": engine.world_size, "weights": elements.trained,
        "held": found, "estimated": said.most,
    }  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------


def papers(kind: str, stage: int, processes: int, weights: int) -> float:
    """Bytes by the paper's formulas: of weights, gradients and all that the optimizer has for each weight."""
    weight, gradient, optimizer = (2, 2, 12) if kind == "bf16" else (4, 4, 8)
    shared = (0, optimizer, optimizer + gradient, optimizer + gradient + weight)[stage]
    return weights * (weight + gradient + optimizer - shared + shared / processes)


def page(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown; stages 1 and 2 in one row where they hold the same."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for row in sorted(rows, key=lambda row: (FORMATS.index(row["format"]), row["stage"], row["processes"])):
        twin = next((each for each in rows if key(each) == key(row) and each["stage"] == 3 - row["stage"]), None)
        same = row["stage"] in (1, 2) and twin is not None and twin["held"] == row["held"]
        if same and row["stage"] == 1:
            continue
        paper = papers(row["format"], row["stage"], row["processes"], row["weights"])
        numbers = [f"{number / 2**20:.1f}" for number in (*row["held"], row["estimated"], paper)]
        lines.append((row["format"], "1, 2" if same else str(row["stage"]), str(row["processes"]), *numbers))
    weights = rows[0]["weights"]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"A GPT of {weights / 1e6:.1f} million weights, AdamW, MiB on each process:\n\n{table}"


def key(row: dict[str, Any]) -> tuple[str, int]:
    return row["format"], row["processes"]


if __name__ == "__main__":
    main()
