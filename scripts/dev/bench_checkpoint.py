"""What a checkpoint costs next to torch.save, to the same disk with the same flushing.

    python scripts/dev/bench_checkpoint.py [--rounds 15] [--dir FOLDER]

A GPT of 3.3 million weights with AdamW, 37 MiB, one rank. In turn: `torch.save` of model and optimizer into one file,
flushed (fsync of the file and its folder) and renamed; `engine.save_checkpoint`; and `engine.save_checkpoint` with
`redline.checkpoint.async_save`, timed until the loop goes on. The medians of the ratios within each round must be below
1.3 and 0.25.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.workloads import WORKLOADS

from redline import Engine, initialize

LIMIT, ASYNC_LIMIT = 1.3, 0.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: %(default)s)")
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_checkpoint-", dir=options.dir))
    try:
        sync, background = build({}), build({"async_save": True})
        print(f"state: {size_of(sync) / 2**20:.1f} MiB; {options.rounds} rounds on {folder}")
        subjects: dict[str, Callable[[], float]] = {
            "torch.save": lambda: timed(lambda: save_by_hand(sync, folder / "by_hand")),
            "save_checkpoint": lambda: timed(lambda: sync.save_checkpoint(folder / "sync", tag="tag")),
            "async_save": lambda: stopped(background, folder / "async"),
        }
        for measure in subjects.values():  # the first of each allocates, and imports
            measure()
        rounds = [{name: measure() for name, measure in subjects.items()} for _ in range(options.rounds)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'':18}{'median ms':>10}{'of torch.save':>15}")
    ratios = {}
    for name in subjects:
        median = statistics.median(each[name] for each in rounds)
        ratios[name] = statistics.median(each[name] / each["torch.save"] for each in rounds)
        print(f"{name:18}{median * 1e3:10.1f}{ratios[name]:15.2f}")
    held = ratios["save_checkpoint"] <= LIMIT and ratios["async_save"] <= ASYNC_LIMIT
    print(f"{'within' if held else 'beyond'} the limits of {LIMIT} and {ASYNC_LIMIT}")
    return 0 if held else 1


def build(checkpoint: dict[str, object]) -> Engine:
    """An engine after two optimizer steps, so that the optimizer has its moments."""
    torch.manual_seed(0)
    work = WORKLOADS["GPT 4 x 256"]
    config = {
        "train_micro_batch_size_per_gpu": work.batch,
        "optimizer": {"type": "AdamW"},
        "redline": {"checkpoint": checkpoint},
    }
    engine = initialize(work.build(), config, device="cpu")
    for parameter in engine.module.parameters():
        engine.optimizer.state[parameter] = {  # type: ignore[union-attr]
            "step": torch.tensor(2.0),
            "exp_avg": torch.randn_like(parameter),
            "exp_avg_sq": torch.rand_like(parameter),
        }
    return engine


def size_of(engine: Engine) -> int:
    """Bytes of weights and moments."""
    return 3 * sum(parameter.nbytes for parameter in engine.module.parameters())


def save_by_hand(engine: Engine, folder: Path) -> None:
    """What a careful script does without an engine."""
    assert engine.optimizer is not None
    folder.mkdir(exist_ok=True)
    with open(folder / "new.pt", "wb") as file:
        torch.save({"model": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "new.pt", folder / "state.pt")
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def timed(save: Callable[[], object]) -> float:
    """Seconds of one save."""
    began = time.perf_counter()
    save()
    return time.perf_counter() - began


def stopped(engine: Engine, folder: Path) -> float:
    """Seconds for which an asynchronous save holds up the loop; the writing itself is waited for outside of them."""
    seconds = timed(lambda: engine.save_checkpoint(folder, tag="tag"))
    engine.wait_for_checkpoint()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
