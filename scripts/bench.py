"""What a step of the engine costs over a hand-written loop: python scripts/bench.py [--json FILE]

The loop has torch's fused AdamW, its foreach clipping and a learning rate set by hand. Every subject first
repeats the loop's losses; then they take turns, so that a machine whose speed drifts slows all alike. The
overhead is the median, over the rounds, of the difference to the loop's time in the same round.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from engine import initialize
from engine.range_test.recorder import Recorder

BATCH = 8
LR = 1e-3
STEP_SIZE = 1000  # of the range test that the recording subject runs; by hand the loop does the same

Step = Callable[[], Tensor]


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def build_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 64, generator=generator), torch.randint(10, (BATCH,), generator=generator)


def build_loop(clip: float) -> Step:
    """The hand-written loop."""
    model, (x, y) = build_model(), build_batch()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    count = 0

    def step() -> Tensor:
        nonlocal count
        loss = cross_entropy(model(x), y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        count += 1
        optimizer.param_groups[0]["lr"] = LR * (1 + count / STEP_SIZE)
        return loss

    return step


def build_engine(clip: float, *, recording: bool) -> Step:
    """The same by the engine: with a schedule, and with the record of a range test if asked for."""
    model, (x, y) = build_model(), build_batch()
    test = {"lr_range_test_min_lr": LR, "lr_range_test_step_size": STEP_SIZE, "lr_range_test_step_rate": 1.0}
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": {"lr": LR}},
        "scheduler": {"type": "LRRangeTest", "params": test},
    }
    engine = initialize(model, config, device="cpu")
    engine.recorder = Recorder(engine.world) if recording else None  # in memory: the config's would write files

    def step() -> Tensor:
        loss = cross_entropy(engine(x), y)
        engine.backward(loss)
        engine.step()
        return loss

    return step


def build_subjects(clip: float) -> dict[str, Step]:
    return {
        "loop by hand": build_loop(clip),
        "engine": build_engine(clip, recording=False),
        "engine, recording": build_engine(clip, recording=True),
    }


def prove_equal(clip: float) -> None:
    """Every subject has the loop's losses."""
    losses = {name: [float(step().detach()) for _ in range(24)] for name, step in build_subjects(clip).items()}
    for name, found in losses.items():
        assert torch.allclose(torch.tensor(found), torch.tensor(losses["loop by hand"]), rtol=1e-6), name


def measure(clip: float, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Microseconds a step, and over the loop, for each subject."""
    subjects = build_subjects(clip)
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for step in subjects.values():
        for _ in range(steps):
            step()
    for _ in range(rounds):
        for name, step in subjects.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            times[name].append((time.perf_counter() - start) / steps * 1e6)
    base = times["loop by hand"]
    return {
        name: {
            "us": statistics.median(found),
            "overhead_us": statistics.median(a - b for a, b in zip(found, base)),
            "ratio": statistics.median(a / b for a, b in zip(found, base)),
        }
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="turns of each subject (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)

    results = {}
    print(f"MLP 64-64-10, batch {BATCH}, one thread, torch {torch.__version__}")
    for clip in (1.0, 0.0):
        prove_equal(clip)
        results[f"clip {clip:g}"] = measure(clip, options.rounds, options.steps)
        print(f"\n{'clipped at 1' if clip else 'not clipped':20}{'us a step':>12}{'overhead':>12}{'ratio':>8}")
        for name, found in results[f"clip {clip:g}"].items():
            print(f"{name:20}{found['us']:12.1f}{found['overhead_us']:+12.1f}{found['ratio']:8.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
