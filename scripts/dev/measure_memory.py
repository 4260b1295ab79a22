"""Measure the memory of parameters, gradients and optimizer state per rank at each ZeRO stage, next to the estimate.

    python scripts/dev/measure_memory.py                 # one, two and four ranks; rewrites the table in docs/zero.md
    python scripts/dev/measure_memory.py --page -        # prints it

Trains a small GPT for two optimizer steps in each setting and counts the storages that its engine holds
(benchmark/held.py), on the rank that holds most. Ranks run on this host's CPU, under torchrun, with gloo.
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

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCK = re.compile(r"(<!-- by scripts/dev/measure_memory.py -->\n).*?(<!-- end -->)", re.DOTALL)
DTYPES = ("fp32", "bf16")
HEAD = ("dtype", "stage", "ranks", "parameters", "gradients", "optimizer", "peak", "estimated", "ZeRO paper")


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    rows = [row for ranks in options.ranks for row in measure(options, ranks)]
    text = page(rows)
    if options.page == "-":
        print(text)
        return
    path = Path(options.page)
    before = path.read_text()
    if not BLOCK.search(before):
        sys.exit(
            f"measure_memory: {path} has no block for the table: "
            "<!-- by scripts/dev/measure_memory.py --> ... <!-- end -->"
        )
    path.write_text(BLOCK.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", before))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="how many; default 1 2 4")
    parser.add_argument("--layers", type=int, default=12, help="of the GPT; default 12")
    parser.add_argument("--width", type=int, default=256, help="of the GPT; default 256")
    parser.add_argument("--page", default=str(ROOT / "docs" / "zero.md"), help="file with the table; - prints it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # where rank 0 writes the measurement
    return parser.parse_args()


def measure(options: argparse.Namespace, ranks: int) -> list[dict[str, Any]]:
    """Every setting on a number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        model = ["--layers", str(options.layers), "--width", str(options.width)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        subprocess.run([*torchrun, __file__, *model, "--worker", str(answer)], check=True)
        rows: list[dict[str, Any]] = json.loads(answer.read_text())
    return rows


# -- one rank ----------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Measure as one rank; rank 0 writes the maximum over the ranks."""
    import torch.distributed as dist

    logging.getLogger("redline").setLevel("WARNING")
    rows = []
    for kind in DTYPES:
        for stage in (0, 1, 2, 3):
            row = one(options, kind, stage)
            rows.append(row)
            if row["ranks"] == 1:
                break
            everyone: list[Any] = [None] * row["ranks"]
            dist.all_gather_object(everyone, row["held"])
            row["held"] = [max(each) for each in zip(*everyone)]
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(options.worker).write_text(json.dumps(rows))


def one(options: argparse.Namespace, kind: str, stage: int) -> dict[str, Any]:
    """Train in one setting."""
    import torch

    sys.path.insert(0, str(ROOT / "scripts"))
    from benchmark import held, workloads
    from torch.nn.functional import cross_entropy

    from redline import initialize
    from redline.distributed.blocks import find_blocks
    from redline.distributed.memory_estimate import Bytes, count, estimate

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
    expected = estimate(elements, Bytes(computed=2 if kind == "bf16" else 4), engine.world_size)[stage]
    return {
        "dtype": kind, "stage": stage, "ranks": engine.world_size, "weights": elements.trained,
        "held": found, "estimated": expected.most,
    }  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------


def papers(kind: str, stage: int, ranks: int, weights: int) -> float:
    """Bytes by the paper's formulas: weights, gradients, and what the optimizer has for each weight."""
    weight, gradient, optimizer = (2, 2, 12) if kind == "bf16" else (4, 4, 8)
    sharded = (0, optimizer, optimizer + gradient, optimizer + gradient + weight)[stage]
    return weights * (weight + gradient + optimizer - sharded + sharded / ranks)


def page(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown; stages 1 and 2 in one row if they are equal."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for row in sorted(rows, key=lambda row: (DTYPES.index(row["dtype"]), row["stage"], row["ranks"])):
        twin = next((each for each in rows if key(each) == key(row) and each["stage"] == 3 - row["stage"]), None)
        same = row["stage"] in (1, 2) and twin is not None and twin["held"] == row["held"]
        if same and row["stage"] == 1:
            continue
        paper = papers(row["dtype"], row["stage"], row["ranks"], row["weights"])
        numbers = [f"{number / 2**20:.1f}" for number in (*row["held"], row["estimated"], paper)]
        lines.append((row["dtype"], "1, 2" if same else str(row["stage"]), str(row["ranks"]), *numbers))
    weights = rows[0]["weights"]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"A GPT of {weights / 1e6:.1f} million weights, AdamW, MiB per rank:\n\n{table}"


def key(row: dict[str, Any]) -> tuple[str, int]:
    return row["dtype"], row["ranks"]


if __name__ == "__main__":
    main()
