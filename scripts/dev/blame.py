"""Lose one of several ranks, in every way and at every place, and count whether the others name it, and it alone.

    .venv/bin/python scripts/dev/blame.py                       2, 4 and 8 ranks: some minutes
    .venv/bin/python scripts/dev/blame.py --ranks 4 --part      some of it, on 4 ranks
    .venv/bin/python scripts/dev/blame.py --stage 3             with ZeRO stage 3; the default is 0

One rank is killed, is stopped, raises an exception, or gets a NaN: in forward, backward, step, save or load. A rank
that is left is right if it ends by itself, and its last error names the lost rank and no other. A NaN ends nobody: the
log has to name the rank whose numbers were the first that are not finite.

Exits with 0 if nine of ten are right, else with 1. Ranks are forks of this process, which has imported torch.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import itertools
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process that is forked should have one thread

import torch
from torch import Tensor, nn

from redline import initialize
from redline.callbacks import Callback
from redline.checkpoint.load import _Load
from redline.checkpoint.save import Save

FATES = ("killed", "stopped", "raises", "nan")
PLACES = ("forward", "backward", "step", "save", "load")
REQUIRED = 0.9  # of all answers
TIMEOUT = 15.0  # seconds that a rank waits for another
PATIENCE = 150.0  # seconds until a rank counts as one that does not end
PROCESSES = 16  # at a time: most of them wait


class Trial(NamedTuple):
    """One rank of several that is lost."""

    size: int
    victim: int
    fate: str
    place: str
    stage: int = 0  # of ZeRO

    def __str__(self) -> str:
        return f"{self.size} ranks, rank {self.victim}, {self.fate} in {self.place}"


class Strike:
    """What happens to the victim the third time that it is at a place."""

    def __init__(self, fate: str, place: str) -> None:
        self.fate, self.place, self.left = fate, place, 3

    def __call__(self, place: str) -> bool:
        """Lose this rank, if it is time; whether it gets a NaN instead."""
        self.left -= place == self.place
        if place != self.place or self.left != 0:
            return False
        if self.fate == "raises":
            raise ValueError("planted")
        if self.fate != "nan":
            os.kill(os.getpid(), signal.SIGKILL if self.fate == "killed" else signal.SIGSTOP)
        return self.fate == "nan"


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strike: Strike) -> Tensor:
        ctx.strike = strike
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * (torch.nan if ctx.strike("backward") else 1.0), None


class Model(nn.Module):
    def __init__(self, strike: Strike) -> None:
        super().__init__()
        self.first, self.last, self.strike = nn.Linear(4, 8), nn.Linear(8, 1), strike

    def forward(self, x: Tensor) -> Any:
        factor = torch.nan if self.strike("forward") else 1.0
        return self.last(InBackward.apply(self.first(x), self.strike)) * factor  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def strike_weights(self, place: str) -> None:
        if self.strike(place):
            self.first.weight.fill_(torch.nan)


class InStep(Callback):
    def on_step(self, engine: Any) -> None:
        engine.module.strike_weights("step")


def strike_before(owner: type, name: str, act: Callable[[], object]) -> None:
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        act()
        return real(*arguments, **options)

    setattr(owner, name, call)


def train(trial: Trial, is_victim: bool, folder: Path) -> None:
    """A script that trains, saves and loads."""
    model = Model(Strike(trial.fate if is_victim else "", trial.place))
    if not is_victim:
        model.strike.place = ""
    if trial.fate != "nan":  # in the middle of it
        strike_before(Save, "_write_rank", lambda: model.strike("save"))
        strike_before(_Load, "read", lambda: model.strike("load"))
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
              "zero_optimization": {"stage": trial.stage},
              "redline": {"distributed_timeout": TIMEOUT}}  # fmt: skip
    engine = initialize(model, config, device="cpu")
    engine.callbacks.append(InStep())
    for _ in range(5):
        engine.backward(engine(torch.randn(2, 4)).square().mean())
        engine.step()
        if trial.fate == "nan":
            model.strike_weights("save")
        engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)
        if trial.fate == "nan":
            model.strike_weights("load")


def start(trial: Trial, rank: int, port: int, folder: Path) -> int:
    """Fork a rank; its process id."""
    process = os.fork()
    if process:
        return process
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": trial.size, "LOCAL_WORLD_SIZE": trial.size}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {k: str(v) for k, v in own.items()})
    log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        train(trial, rank == trial.victim, folder / "checkpoints")
    except BaseException as error:
        sys.last_value = error
        sys.excepthook(*sys.exc_info())
    finally:  # end as an interpreter does
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(0)


class Running:
    """A trial that has been started."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        self.trial, self.folder = trial, folder
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self._left = {rank: start(trial, rank, port, folder) for rank in range(trial.size)}
        self._deadline = time.monotonic() + PATIENCE

    def is_over(self) -> bool:
        """Whether all ranks but the victim have ended; then the victim is ended, too, and after a long time all are."""
        for rank, process in list(self._left.items()):
            if os.waitpid(process, os.WNOHANG)[0]:
                del self._left[rank]
        late = time.monotonic() > self._deadline
        if set(self._left) - {self.trial.victim} and not late:
            return False
        if self.trial.fate == "nan" and self._left and not late:
            return False
        for rank, process in self._left.items():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            if rank != self.trial.victim:
                (self.folder / f"{rank}.log").open("a").write("\nredline.errors.EngineError: it did not end\n")
        return True

    def kill(self) -> None:
        for process in self._left.values():
            os.kill(process, signal.SIGKILL)

    def answers(self) -> list[tuple[str, bool]]:
        """What each rank that was left said, and whether it is right; of a NaN one answer for all."""
        logs = [(self.folder / f"{rank}.log").read_text() for rank in range(self.trial.size)]
        if self.trial.fate == "nan":
            steps = [(int(step), text) for log in logs for step, text in re.findall(r"(?m)^step (\d+): (.*)$", log)]
            first = min((step for step, _ in steps), default=-1)
            said = [text for step, text in steps if step == first and "itself)" not in text]
            said += re.findall(r"(?m)^save_checkpoint: .*differ on ranks? [^:]*", "\n".join(logs))
            return [("; ".join(said) or "nothing", named(said[0] if said else "") == {self.trial.victim})]
        errors = [re.findall(r"(?m)^(?:\[rank\d+\]: )?redline\.errors\.EngineError: (.*)$", log) for log in logs]
        last = [
            found[-1] if found else (log.strip().splitlines() or ["nothing"])[-1] for found, log in zip(errors, logs)
        ]
        return [(text, named(text) == {self.trial.victim}) for r, text in enumerate(last) if r != self.trial.victim]


def named(text: str) -> set[int]:
    """The ranks that a text names."""
    found: set[int] = set()
    for ranks in re.findall(r"\branks? (\d+(?:(?:-|, )\d+)*)", text):
        for each in ranks.split(", "):
            first, _, last = each.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def run(trials: Sequence[Trial]) -> dict[Trial, list[tuple[str, bool]]]:
    """Run trials, some at a time."""
    answers: dict[Trial, list[tuple[str, bool]]] = {}
    waiting, running = list(trials), list[Running]()
    folder = Path(tempfile.mkdtemp(prefix="blame-"))  # a TemporaryDirectory would be removed by each rank that ends
    try:
        while waiting or running:
            while waiting and sum(each.trial.size for each in running) + waiting[0].size <= PROCESSES:
                running.append(Running(waiting.pop(0), folder / str(len(waiting))))
            for each in [each for each in running if each.is_over()]:
                running.remove(each)
                answers[each.trial] = each.answers()
            time.sleep(0.02)
    finally:
        for each in running:
            each.kill()
        shutil.rmtree(folder)
    return answers


def trials_of(size: int, stage: int, *, part: bool) -> list[Trial]:
    """All trials on so many ranks; a part of them has each fate and each place."""
    victims = itertools.cycle(dict.fromkeys([size - 1, 0, 1, size // 2]))
    trials = [Trial(size, next(victims), fate, place, stage) for fate, place in itertools.product(FATES, PLACES)]
    return (
        [each for index, each in enumerate(trials) if index % 5 == (index // 5 + size.bit_length()) % 5]
        if part
        else trials
    )


def report(answers: dict[Trial, list[tuple[str, bool]]]) -> bool:
    """Print what is wrong and a table; whether enough is right."""
    counts: dict[tuple[int, str, str], list[bool]] = defaultdict(list)
    for trial, given in sorted(answers.items()):
        counts[trial.size, trial.fate, trial.place] += [right for _, right in given]
        for text in sorted({text for text, right in given if not right}):
            print(f"{trial}: {text[:300]}")
    print(f"{'right / answers':<20}" + "".join(f"{place:>12}" for place in PLACES))
    for size, fate in sorted({(trial.size, trial.fate) for trial in answers}):
        cells = (counts.get((size, fate, place), []) for place in PLACES)
        print(f"{f'{size} ranks, {fate}':<20}" + "".join(f"{f'{sum(c)} / {len(c)}' if c else '':>12}" for c in cells))
    everything = [right for given in counts.values() for right in given]
    print(f"{sum(everything)} of {len(everything)} right")
    return sum(everything) >= REQUIRED * len(everything)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], metavar="N", help="default 2 4 8")
    parser.add_argument("--part", action="store_true", help="of each number of ranks four trials: each fate once")
    parser.add_argument("--stage", type=int, default=0, choices=range(4), help="ZeRO stage; default 0")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    initialize(nn.Linear(1, 1), config, device="cpu")  # imports what the ranks need
    gc.freeze()  # else each of them looks through all of it as it ends
    trials = [trial for size in given.ranks for trial in trials_of(size, given.stage, part=given.part)]
    return 0 if report(run(trials)) else 1


if __name__ == "__main__":
    sys.exit(main())
