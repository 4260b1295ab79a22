"""Kills runs with SIGKILL at random instants, starts them again, and looks whether anything was lost.

    python scripts/kill_test.py                              200 kills, 2 processes: some minutes
    python scripts/kill_test.py --count 50 --stage 3         the model shared out
    python scripts/kill_test.py --count 50 --async           checkpoints written while training goes on

A run trains a small model (dropout, shuffled data, two micro-batches an update) for 60 updates, and saves after every
second one. It is killed somewhere between its start and its end, starts again with load_checkpoint, is killed again,
until it is through; then comes the next run. After each kill and each restart these must hold:

    whole       what `latest` names is whole, by a check of sizes and checksums that shares no code with the engine;
    loaded      the restart loads that checkpoint (the newest whole one, where there is no `latest`), on all processes;
    not less    it is no older than the last one whose save_checkpoint had returned (with --async: that was written);
    the same    each update reads the same samples and leaves the same loss and weights on its process, however often it
                is made, as in a run that nothing interrupted; so do the last weights, bit for bit;
    the others  where one of two processes is killed, the other ends by itself, with an EngineError;
    tidy        at the end there are the two checkpoints of keep_last, and no remains of others.

Exits with 0 if all held, and with 1 and what did not. Each process is a fork of this one, which has imported torch.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process that is forked should have one thread

# What a process comes to import is imported here, once, and not in each fork.
import numpy.random  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.utils.data import Dataset

import engine.checkpoint.tensors
import engine.config.values
import engine.zero.shards  # noqa: F401
from engine import initialize

UPDATES, SAVE_EVERY, KEPT = 60, 2, 2
TIMEOUT = 10.0  # seconds that training waits for a process
PATIENCE = 30.0  # seconds for the others to end after one was killed
EARLY = 1.0  # the same, where it was killed before training began: they wait for TIMEOUT, which nothing depends on


class Lost(Exception):
    """Something did not hold; the message says what."""


@dataclass(frozen=True)
class Plan:
    """What all runs have in common; `sabotage` makes them wrong, to see that it is found."""

    processes: int
    stage: int
    background: bool
    victims: str
    sabotage: str | None = None


# -- one process of a run ------------------------------------------------------------------------------------


class Rows(Dataset[tuple[int, Tensor]]):
    """Samples that tell their index; no multiple of an update, so that some span the end of an epoch."""

    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.rows[index]


def train(plan: Plan, folder: Path, rank: int) -> None:
    """The script of docs/restarts.md, which also writes down what it does."""
    journal = os.open(folder / f"journal.{rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*words: object) -> None:
        os.write(journal, (" ".join(map(str, words)) + "\n").encode())  # one call: whole lines, whenever it is killed

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.3), nn.Tanh(), nn.Linear(32, 8))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 20}},
        "zero_optimization": {"stage": plan.stage},
        "redline": {
            "progress": False,
            "distributed_timeout": TIMEOUT,
            "zero": {"smallest_block": 50},
            "checkpoint": {"keep_last": KEPT, "async_save": plan.background},
        },
    }
    engine = initialize(model, config, training_data=Rows(), device="cpu")
    torch.manual_seed(rank)
    path, _ = engine.load_checkpoint(folder / "checkpoints")
    note("loaded", engine.global_steps if path else 0)
    loader = engine.training_dataloader
    assert loader is not None and engine.optimizer is not None
    if path and plan.sabotage == "data":
        loader.position = (0, 0, True)
    weights = [weight for group in engine.optimizer.param_groups for weight in group["params"]]

    def content() -> bytes:
        own = (getattr(weight, "to_local", lambda weight=weight: weight)() for weight in weights)
        return b"".join(each.detach().contiguous().numpy().tobytes() for each in own)

    read: list[int] = []
    written = engine.global_steps if path else -1
    while engine.global_steps < UPDATES:
        for indices, x in loader:
            read += indices.tolist()
            engine.backward((engine(x) - x).square().mean())
            engine.step()
            if engine.micro_steps % 2:
                continue
            update = engine.global_steps
            assert engine.loss is not None
            left = zlib.crc32(content() + float(engine.loss).hex().encode())
            note("update", update, ",".join(map(str, read)), f"{left:08x}")
            read = []
            if update % SAVE_EVERY == 0:
                note("saving", update)
                engine.save_checkpoint(folder / "checkpoints")
                note("saved", written if plan.background else update)  # in the background: the one before
                written = update
            if update == UPDATES:
                break
    engine.wait_for_checkpoint()
    note("saved", engine.global_steps)
    (folder / f"weights.{rank}").write_bytes(content())
    note("through")


def fork(plan: Plan, folder: Path, rank: int, port: int) -> int:
    """Start one process of a run; its id."""
    process = os.fork()
    if process:
        return process
    _live(plan, folder, rank, port)


def _live(plan: Plan, folder: Path, rank: int, port: int) -> NoReturn:
    """What a fork does: train, and end as an interpreter does."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        said = os.open(folder / f"said.{rank}", os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if plan.processes > 1:
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": plan.processes, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in here.items()})
        try:
            train(plan, folder, rank)
            code = 0
        except Exception:
            sys.excepthook(*sys.exc_info())
        threading._shutdown()  # type: ignore[attr-defined]  # threads that write a checkpoint are waited for
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# -- what a folder of checkpoints holds, in other words than the engine's --------------------------------------


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's files are those of its manifest, and the manifest that of its own checksum."""
    try:
        document = json.loads((folder / "manifest.json").read_bytes())
        seal = document.pop("crc32")
        if f"{zlib.crc32(json.dumps(document, sort_keys=True).encode()):08x}" != seal:
            return False
        for name, record in document["files"].items():
            content = (folder / name).read_bytes()
            if len(content) != record["bytes"] or f"{zlib.crc32(content):08x}" != record["crc32"]:
                return False
    except (OSError, ValueError, KeyError):
        return False
    return True


@dataclass
class Folder:
    """A folder of checkpoints between two lives of a run.

    Attributes:
        latest: the tag that is named as the newest; None for none.
        whole: steps of the whole checkpoints, by tag; one that was about to be replaced counts under its own name.
        remains: names of what a kill has left.
    """

    latest: str | None
    whole: dict[str, int]
    remains: list[str]

    @classmethod
    def look(cls, path: Path) -> Folder:
        latest = path / "latest"
        whole, remains = {}, []
        for each in sorted(path.iterdir()) if path.is_dir() else ():
            if each.name.startswith("."):
                remains.append(each.name)
            aside = each.name.startswith(".") and each.name.endswith(".replaced")
            tag = each.name[1 : -len(".replaced")] if aside else each.name
            if not tag.startswith(".") and tag not in whole and each.is_dir() and is_whole(each):
                whole[tag] = int(tag.removeprefix("global_step"))
        return cls(latest.read_text().strip() if latest.exists() else None, whole, remains)

    def to_load(self) -> int:
        """The step that a restart has to go on from; -1 for none."""
        if self.latest is None:
            return max(self.whole.values(), default=-1)
        if self.latest not in self.whole:
            raise Lost(f"whole: latest names {self.latest}; whole are {', '.join(self.whole) or 'none'}")
        return self.whole[self.latest]


# -- one run, from outside -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Life:
    """A run from one start to its end, by itself or by a kill."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.folder = folder
        self._journals = [folder / f"journal.{rank}" for rank in range(plan.processes)]
        self._starts = [path.stat().st_size if path.exists() else 0 for path in self._journals]
        self.codes: dict[int, int] = {}
        self.began = time.monotonic()
        port = free_port()
        sys.stdout.flush()
        self._ids: list[int] = []
        for rank in range(plan.processes):
            self._ids.append(fork(plan, folder, rank, port))

    def wait(self, seconds: float) -> bool:
        """Wait for all to end, for so long; whether they have."""
        end = time.monotonic() + seconds
        while True:
            for rank, process in enumerate(self._ids):
                if rank not in self.codes:
                    done, status = os.waitpid(process, os.WNOHANG)
                    if done:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            left = end - time.monotonic()
            if len(self.codes) == len(self._ids) or left <= 0:
                return len(self.codes) == len(self._ids)
            time.sleep(min(left, 0.005))

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            if rank not in self.codes:
                os.kill(self._ids[rank], signal.SIGKILL)

    def end(self) -> None:
        """Leave none of them behind."""
        self.kill(list(range(len(self._ids))))
        self.wait(PATIENCE)

    def notes(self, rank: int) -> list[list[str]]:
        """What a process wrote down in this life, as words."""
        path = self._journals[rank]
        content = path.read_bytes()[self._starts[rank] :] if path.exists() else b""
        return [line.split() for line in content.decode().splitlines()]

    def said(self, rank: int) -> str:
        return (self.folder / f"said.{rank}").read_text(errors="replace")


@dataclass
class Straight:
    """A run that nothing interrupts: what the others are compared with, and how long it takes."""

    updates: list[dict[str, list[str]]]  # by rank: what was noted of each update
    weights: list[bytes]
    start: float  # seconds until training begins
    update: float  # seconds

    @classmethod
    def run(cls, plan: Plan, folder: Path) -> Straight:
        folder.mkdir()
        life = Life(plan, folder)
        try:
            while not any(life.notes(0)) and not life.wait(0.01):
                pass
            start = time.monotonic() - life.began
            life.wait(10 * PATIENCE)
        finally:
            life.end()
        ranks = range(plan.processes)
        for rank in ranks:
            if life.codes[rank] != 0:
                raise Lost(f"nothing was killed, and rank {rank} ended with {life.codes[rank]}:\n{life.said(rank)}")
        updates = [{words[1]: words[2:] for words in life.notes(rank) if words[0] == "update"} for rank in ranks]
        weights = [(folder / f"weights.{rank}").read_bytes() for rank in ranks]
        return cls(updates, weights, start, (time.monotonic() - life.began - start) / UPDATES)


@dataclass
class Tally:
    """What happened, for the table."""

    counts: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)  # seconds until a process whose peer was killed had ended
    seconds: float = 0.0


class Run:
    """One run, killed until it is through."""

    def __init__(self, plan: Plan, folder: Path, straight: Straight, dice: random.Random, tally: Tally) -> None:
        self.plan, self.folder, self.straight, self.dice, self.tally = plan, folder, straight, dice, tally
        self._saved = -1  # the last step that has to be there
        self._made: list[set[str]] = [set() for _ in range(plan.processes)]
        folder.mkdir()

    def live(self, *, to_be_killed: bool) -> bool:
        """One life of it; whether it is through.

        Raises:
            Lost: something did not hold.
        """
        checkpoints = Folder.look(self.folder / "checkpoints")
        if self.plan.sabotage == "save" and checkpoints.latest:
            shutil.rmtree(self.folder / "checkpoints" / checkpoints.latest, ignore_errors=True)
            (self.folder / "checkpoints" / "latest").unlink()
            checkpoints = Folder.look(self.folder / "checkpoints")
        expected = checkpoints.to_load()
        if expected < self._saved:
            raise Lost(f"not less: step {self._saved} was saved, and the folder has {expected} to go on from")
        life = Life(self.plan, self.folder)
        try:
            if not (self._let_live(life, expected) if to_be_killed else life.wait(10 * PATIENCE)):
                if not to_be_killed:
                    raise Lost(f"nothing was killed, and the run did not end:\n{life.said(0)}")
                self._strike(life)
        finally:
            life.end()
        self._check(life, expected)
        return all(life.notes(rank)[-1:] == [["through"]] for rank in range(self.plan.processes)) and self._ends(life)

    def _let_live(self, life: Life, step: int) -> bool:
        """Wait for the instant of the kill; whether the run has ended before. A tenth fall before training."""
        if self.dice.random() < 0.1:
            return life.wait(self.dice.uniform(0, self.straight.start))
        # By what it has done, and then by the clock: a machine that others use is now fast, now slow.
        start = max(0, step)
        reached = self.dice.randrange(start, UPDATES) if start < UPDATES else start
        while not any(words[0] in ("loaded", "update") and int(words[1]) >= reached for words in life.notes(0)):
            if life.wait(0.002):
                return True
        return life.wait(self.dice.uniform(0, 2 * SAVE_EVERY * self.straight.update))

    def _strike(self, life: Life) -> None:
        """Kill, and see what the others do."""
        ranks = list(range(self.plan.processes))
        self.dice.shuffle(ranks)
        if self.plan.victims == "all" or (self.plan.victims == "either" and self.dice.random() < 0.75):
            life.kill(ranks)
        else:
            victim, *others = ranks
            life.kill([victim])
            training = all(life.notes(rank) for rank in ranks)
            struck = time.monotonic()
            if life.wait(PATIENCE if training else EARLY):
                if others and life.codes[victim] == -signal.SIGKILL:
                    self.tally.waits.append(time.monotonic() - struck)
                    self.tally.counts["the other ended by itself"] += 1
            elif training:
                raise Lost(f"the others: they ran on for {PATIENCE:g} s after rank {victim} was killed")
            else:
                self.tally.counts["the other was still waiting for the start, and was killed, too"] += 1
        life.end()
        if -signal.SIGKILL in life.codes.values():
            self._count(life)

    def _count(self, life: Life) -> None:
        counts, notes = self.tally.counts, life.notes(0)
        counts["kills"] += 1
        checkpoints = Folder.look(self.folder / "checkpoints")
        newest = max(checkpoints.whole.values(), default=-1)
        latest = -1 if checkpoints.latest is None else checkpoints.whole.get(checkpoints.latest, -1)
        counts["before training began"] += not notes
        counts["between begin and end of a save_checkpoint"] += bool(notes) and notes[-1][0] == "saving"
        counts["left a folder that was being written or removed"] += any(
            ".partial-" in each for each in checkpoints.remains
        )
        counts["left a checkpoint that was about to be replaced"] += any(
            ".replaced" in each for each in checkpoints.remains
        )
        counts["between a checkpoint's name and `latest`"] += newest > latest

    def _check(self, life: Life, expected: int) -> None:
        ranks = range(self.plan.processes)
        struck = -signal.SIGKILL in life.codes.values()
        for rank in ranks:
            code = life.codes[rank]
            if code in (0, -signal.SIGKILL) or (struck and "EngineError: " in life.said(rank)):
                continue
            raise Lost(f"rank {rank} ended with exit code {code}:\n{life.said(rank)}")
        for rank in ranks:
            for word, *rest in life.notes(rank):
                if word == "loaded" and int(rest[0]) != max(0, expected):
                    raise Lost(f"loaded: rank {rank} went on from {rest[0]}, expected {expected}")
                if word == "saved" and rank == 0:
                    self._saved = max(self._saved, int(rest[0]))
                if word == "update":
                    ours, straight = rest[1:], self.straight.updates[rank][rest[0]]
                    if ours != straight:
                        raise Lost(
                            f"the same: rank {rank}, update {rest[0]}, samples and hash: {' '.join(ours)}; "
                            f"without interruption: {' '.join(straight)}"
                        )
                    self.tally.counts["updates made again"] += rest[0] in self._made[rank] and rank == 0
                    self._made[rank].add(rest[0])

    def _ends(self, life: Life) -> bool:
        for rank, straight in enumerate(self.straight.weights):
            if self._made[rank] != set(self.straight.updates[rank]):
                raise Lost(f"the same: rank {rank} made {len(self._made[rank])} of {UPDATES} updates")
            if (self.folder / f"weights.{rank}").read_bytes() != straight:
                raise Lost(f"the same: rank {rank}'s last weights are not those of a run without interruption")
        checkpoints = Folder.look(self.folder / "checkpoints")
        if checkpoints.to_load() != UPDATES:
            raise Lost(f"whole: the last checkpoint is of update {checkpoints.to_load()}; expected {UPDATES}")
        if ["saving", str(UPDATES)] in life.notes(0) and (checkpoints.remains or len(checkpoints.whole) != KEPT):
            raise Lost(f"tidy: expected {KEPT} checkpoints, found {[*checkpoints.whole]} and {checkpoints.remains}")
        return True


# -- all of them -----------------------------------------------------------------------------------------------


def show(done: int, count: int, tally: Tally, began: float) -> None:
    """A bar on a terminal; elsewhere a line, ten times."""
    line = f"{done}/{count} kills, {tally.counts['runs']} runs through, {time.monotonic() - began:.0f} s"
    if sys.stdout.isatty():
        filled = 30 * done // count
        print(f"\r[{'#' * filled}{' ' * (30 - filled)}] {line}", end="\n" if done == count else "", flush=True)
    elif done % max(1, count // 10) == 0:
        print(line, flush=True)


def kill_all(plan: Plan, count: int, seed: int, folder: Path) -> tuple[Tally, list[str]]:
    """So many kills; what happened, and what did not hold."""
    tally, dice = Tally(), random.Random(seed)
    faults: list[str] = []
    straight = Straight.run(plan, folder / "straight")
    began = time.monotonic()
    number, shown = 0, 0
    while tally.counts["kills"] < count and len(faults) < 3:
        number += 1
        run = Run(plan, folder / f"run{number}", straight, dice, tally)
        try:
            while not run.live(to_be_killed=tally.counts["kills"] < count):
                if tally.counts["kills"] > shown:
                    shown = tally.counts["kills"]
                    show(shown, count, tally, began)
            tally.counts["runs"] += 1
            shutil.rmtree(run.folder)
        except Lost as error:
            faults.append(f"run {number} (its files are in {run.folder}): {error}")
    tally.seconds = time.monotonic() - began
    return tally, faults


def table(tally: Tally) -> str:
    """What happened, one thing a line."""
    counts = Counter(tally.counts)
    kills = counts.pop("kills", 0)
    rows = [("kills", str(kills)), ("runs that came through", str(counts.pop("runs", 0)))]
    rows += [(f"  {name}", str(number)) for name, number in sorted(counts.items())]
    if tally.waits:
        waits = sorted(tally.waits)
        rows.append(
            ("  seconds until the other had ended: median, most", f"{waits[len(waits) // 2]:.2f}, {waits[-1]:.2f}")
        )
    rows.append(("seconds, and a kill", f"{tally.seconds:.0f}, {tally.seconds / max(1, kills):.2f}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> int:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, metavar="N", help="kills (default 200)")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2, help="of a run (default 2)")
    parser.add_argument("--stage", type=int, choices=range(4), default=0, help="of ZeRO (default 0)")
    parser.add_argument(
        "--victims",
        choices=("all", "one", "either"),
        default="either",
        help="whom a kill strikes; either: one of the processes in a quarter of the kills (default)",
    )
    parser.add_argument("--seed", type=int, help="of the instants and victims; default another one each time")
    parser.add_argument("--async", dest="background", action="store_true", help="with async_save")
    parser.add_argument(
        "--sabotage",
        choices=("data", "save"),
        help="restarts forget their place in the data, or a checkpoint vanishes before them: this must end with 1",
    )
    given = parser.parse_args()
    if given.count < 1:
        parser.error(f"--count: got {given.count}; expected at least 1")
    seed = random.randrange(10**6) if given.seed is None else given.seed
    plan = Plan(given.processes, given.stage, given.background, given.victims, given.sabotage)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no process is left behind
    print(f"{given.count} kills of {plan.processes} process(es), stage {plan.stage}, seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="kill_test-"))
    faults: list[str] = ["it was broken off"]
    try:
        tally, faults = kill_all(plan, given.count, seed, folder)
    except Lost as error:
        print(f"FAILED\n{error}")
        return 1
    finally:
        if not faults:
            shutil.rmtree(folder)
    print(table(tally))
    print("\n".join(["FAILED", *faults]) if faults else "nothing was lost")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
