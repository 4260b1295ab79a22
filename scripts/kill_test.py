"""Kill training runs with SIGKILL at random instants, restart them, and check that nothing is lost.

    scripts/kill_test                            200 kills: on 1 and 2 ranks, at each ZeRO stage, with checkpoints
                                                 written at once and while training continues; some minutes
    scripts/kill_test --count 50 --stage 3       the same, with the model sharded
    scripts/kill_test --count 50 --ranks 2 --async

A run trains a small model (dropout, shuffled data, two micro-batches per step) for 60 optimizer steps and saves after
every second one. It is killed, restarts with load_checkpoint, and is killed again until it completes; then the next run
begins. After each kill and restart these must hold:

    complete   the checkpoint that `latest` names is complete, by checks of sizes and checksums that share no code with
               the engine;
    loaded     the restart loads that checkpoint (the newest complete one if there is no `latest`), on all ranks;
    saved      it is no older than the last one whose save_checkpoint had returned (with --async: that was written);
    same       each step reads the same samples and leaves the same loss and weights on its rank as in a run without
               interruption, however often it is made; so do the final weights, bit for bit;
    others     if one of two ranks is killed, the other ends by itself, with an EngineError;
    tidy       at the end there are the two checkpoints of keep_last and the one that was loaded last, nothing else.

Exits with 0 if all held, else with 1 and a report. Ranks are forks of this process, which has imported torch.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
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

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process that is forked should have one thread

# Imported here once, and not in every fork.
import numpy.random  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.utils.data import Dataset

import redline.checkpoint.load
import redline.checkpoint.save
import redline.config.report
import redline.distributed.fsdp  # noqa: F401
from redline import initialize

STEPS, SAVE_EVERY, KEEP = 60, 2, 2
TIMEOUT = 10.0  # seconds that training waits for a rank
PATIENCE = 30.0  # seconds for the others to end after one was killed
EARLY = 1.0  # the same before training began: the others wait for TIMEOUT, which nothing depends on


class Lost(Exception):
    """A check failed; the message says which."""


@dataclass(frozen=True)
class Plan:
    """What all runs have in common; `sabotage` breaks them, to test that this is found."""

    ranks: int
    stage: int
    background: bool
    victims: str
    sabotage: str | None = None

    def __str__(self) -> str:
        return f"{self.ranks} rank(s), stage {self.stage}{', async' if self.background else ''}"


# -- one rank -----------------------------------------------------------------------------------------


class Rows(Dataset[tuple[int, Tensor]]):
    """Samples with their index; their number is no multiple of the batch size, so some steps span two epochs."""

    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.rows[index]


def train(plan: Plan, folder: Path, rank: int) -> None:
    """The script of docs/restarts.md, with a journal of what it does."""
    journal = os.open(folder / f"journal.{rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*words: object) -> None:
        os.write(journal, (" ".join(map(str, words)) + "\n").encode())  # one call, so that a kill leaves full lines

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
            "checkpoint": {"keep_last": KEEP, "async_save": plan.background},
        },
    }
    engine = initialize(model, config, training_data=Rows(), device="cpu")
    torch.manual_seed(rank)
    note("loading")
    path, _ = engine.load_checkpoint(folder / "checkpoints")
    note("loaded", engine.global_steps if path else 0)
    loader = engine.training_dataloader
    assert loader is not None and engine.optimizer is not None
    if path and plan.sabotage == "data":
        loader.position = (0, 0, True)
    weights = [weight for group in engine.optimizer.param_groups for weight in group["params"]]

    def content() -> bytes:
        local = (getattr(weight, "to_local", lambda weight=weight: weight)() for weight in weights)
        return b"".join(each.detach().contiguous().numpy().tobytes() for each in local)

    read: list[int] = []
    written = engine.global_steps if path else -1
    while engine.global_steps < STEPS:
        for indices, x in loader:
            read += indices.tolist()
            engine.backward((engine(x) - x).square().mean())
            engine.step()
            if engine.micro_steps % 2:
                continue
            step = engine.global_steps
            assert engine.loss is not None
            digest = zlib.crc32(content() + float(engine.loss).hex().encode())
            note("step", step, ",".join(map(str, read)), f"{digest:08x}")
            read = []
            if step % SAVE_EVERY == 0:
                note("saving", step)
                engine.save_checkpoint(folder / "checkpoints")
                note("saved", written if plan.background else step)  # in the background: the one before
                written = step
            if step == STEPS:
                break
    engine.wait_for_checkpoint()
    note("saved", engine.global_steps)
    (folder / f"weights.{rank}").write_bytes(content())
    note("completed")


def fork(plan: Plan, folder: Path, rank: int, port: int) -> int:
    """Start one rank; returns its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(folder / f"output.{rank}", os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if plan.ranks > 1:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": plan.ranks, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in own.items()})
        try:
            train(plan, folder, rank)
            code = 0
        except Exception:
            sys.excepthook(*sys.exc_info())
        # End as an interpreter does: threads that write a checkpoint first, then exit functions.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# -- checkpoints, checked without the engine's code -----------------------------------------------------


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint's files match its manifest, and the manifest its own checksum."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        checksum = manifest.pop("crc32")
        if f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}" != checksum:
            return False
        for name, record in manifest["files"].items():
            content = (folder / name).read_bytes()
            if len(content) != record["bytes"] or f"{zlib.crc32(content):08x}" != record["crc32"]:
                return False
    except (OSError, ValueError, KeyError):
        return False
    return True


class Checkpoints:
    """What a folder of checkpoints holds.

    Attributes:
        latest: the tag in `latest`; None if there is no such file.
        steps: step of each complete checkpoint, by tag; one that was about to be replaced counts under its own tag.
        remains: hidden names, which a kill has left.
    """

    def __init__(self, path: Path) -> None:
        latest = path / "latest"
        self.latest = latest.read_text().strip() if latest.exists() else None
        self.steps: dict[str, int] = {}
        self.remains: list[str] = []
        for each in sorted(path.iterdir()) if path.is_dir() else ():
            tag = each.name
            if tag.startswith("."):
                self.remains.append(tag)
                if tag.endswith(".replaced"):
                    tag = tag.removeprefix(".").removesuffix(".replaced")
            if not tag.startswith(".") and tag not in self.steps and each.is_dir() and is_complete(each):
                self.steps[tag] = int(tag.removeprefix("global_step"))

    def to_load(self) -> int:
        """The step that a restart has to continue from; -1 for none."""
        if self.latest is None:
            return max(self.steps.values(), default=-1)
        if self.latest not in self.steps:
            raise Lost(f"complete: latest names {self.latest}; complete are {', '.join(self.steps) or 'none'}")
        return self.steps[self.latest]


# -- runs, from outside ---------------------------------------------------------------------------------


class Life:
    """A run from one start to its end, by itself or by a kill."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.folder, self.codes = folder, dict[int, int]()
        self._journals = [folder / f"journal.{rank}" for rank in range(plan.ranks)]
        self._starts = [path.stat().st_size if path.exists() else 0 for path in self._journals]
        self.began = time.monotonic()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        sys.stdout.flush()
        self._processes: list[int] = []
        for rank in range(plan.ranks):
            self._processes.append(fork(plan, folder, rank, port))

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for all ranks to end; returns whether they have."""
        deadline = time.monotonic() + seconds
        while True:
            for rank, process in enumerate(self._processes):
                if rank not in self.codes:
                    done, status = os.waitpid(process, os.WNOHANG)
                    if done:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            left = deadline - time.monotonic()
            if len(self.codes) == len(self._processes) or left <= 0:
                return len(self.codes) == len(self._processes)
            time.sleep(min(left, 0.005))

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            if rank not in self.codes:
                os.kill(self._processes[rank], signal.SIGKILL)

    def end(self) -> None:
        self.kill(list(range(len(self._processes))))
        self.wait(PATIENCE)

    def notes(self, rank: int) -> list[list[str]]:
        """What a rank wrote to its journal in this life, as words."""
        path = self._journals[rank]
        content = path.read_bytes()[self._starts[rank] :] if path.exists() else b""
        return [line.split() for line in content.decode().splitlines()]

    def output(self, rank: int) -> str:
        return (self.folder / f"output.{rank}").read_text(errors="replace")


class Reference:
    """A run without interruption: what the others are compared with, and how long it takes."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        folder.mkdir()
        life = Life(plan, folder)
        try:
            while not life.notes(0) and not life.wait(0.01):
                pass
            self.start = time.monotonic() - life.began  # seconds until training begins
            life.wait(10 * PATIENCE)
        finally:
            life.end()
        self.step = (time.monotonic() - life.began - self.start) / STEPS  # seconds
        for rank in range(plan.ranks):
            if life.codes[rank] != 0:
                raise Lost(f"nothing was killed, and rank {rank} ended with {life.codes[rank]}:\n{life.output(rank)}")
        journals = [life.notes(rank) for rank in range(plan.ranks)]
        self.steps = [{words[1]: words[2:] for words in notes if words[0] == "step"} for notes in journals]
        self.weights = [(folder / f"weights.{rank}").read_bytes() for rank in range(plan.ranks)]


@dataclass
class Tally:
    """What happened in all runs."""

    counts: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)  # seconds until a rank whose peer was killed had ended


class Run:
    """One run, killed until it completes."""

    def __init__(self, plan: Plan, folder: Path, reference: Reference, dice: random.Random, tally: Tally) -> None:
        self.plan, self.folder, self.reference, self.dice, self.tally = plan, folder, reference, dice, tally
        self._saved = -1  # the last step that must be there
        self._made: list[set[str]] = [set() for _ in range(plan.ranks)]
        folder.mkdir()

    def live(self, *, kill: bool) -> bool:
        """One life; returns whether the run has completed. Raises `Lost` if a check fails."""
        folder = self.folder / "checkpoints"
        checkpoints = Checkpoints(folder)
        if self.plan.sabotage == "save" and checkpoints.latest:
            shutil.rmtree(folder / checkpoints.latest, ignore_errors=True)
            (folder / "latest").unlink()
            checkpoints = Checkpoints(folder)
        expected = checkpoints.to_load()
        if expected < self._saved:
            raise Lost(f"saved: step {self._saved} was saved, and the newest checkpoint is of {expected}")
        life = Life(self.plan, self.folder)
        try:
            if kill:
                if not self._wait_for_instant(life, expected):
                    self._strike(life)
            elif not life.wait(10 * PATIENCE):
                raise Lost(f"nothing was killed, and the run did not end:\n{life.output(0)}")
        finally:
            life.end()
        self._check(life, expected)
        completed = all(life.notes(rank)[-1:] == [["completed"]] for rank in range(self.plan.ranks))
        if completed:
            self._check_end(life)
        return completed

    def _wait_for_instant(self, life: Life, step: int) -> bool:
        """Wait for the instant of the kill, one in five before training; returns whether the run ended before."""
        when = self.dice.random()
        if when < 0.1:
            return life.wait(self.dice.uniform(0, self.reference.start))
        if when < 0.2:
            while not life.notes(0):
                if life.wait(0.002):
                    return True
            return life.wait(self.dice.uniform(0, SAVE_EVERY * self.reference.step))
        # First by progress, then by the clock: a machine that others use is now fast, now slow.
        first = max(0, step)
        target = self.dice.randrange(first, STEPS) if first < STEPS else first
        while not any(words[0] in ("loaded", "step") and int(words[1]) >= target for words in life.notes(0)):
            if life.wait(0.002):
                return True
        return life.wait(self.dice.uniform(0, 2 * SAVE_EVERY * self.reference.step))

    def _strike(self, life: Life) -> None:
        """Kill one rank or all, and see what the others do."""
        counts, ranks = self.tally.counts, list(range(self.plan.ranks))
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
                    counts["the other ended by itself"] += 1
            elif training:
                raise Lost(f"others: they ran on for {PATIENCE:g} s after rank {victim} was killed")
            else:
                counts["the other was still waiting for the start, and was killed, too"] += 1
        life.end()
        if -signal.SIGKILL not in life.codes.values():
            return
        notes, checkpoints = life.notes(0), Checkpoints(self.folder / "checkpoints")
        latest = checkpoints.steps.get(checkpoints.latest or "", -1)
        counts["kills"] += 1
        counts["before training began"] += not notes
        counts["during a load_checkpoint"] += bool(notes) and notes[-1][0] == "loading"
        counts["during a save_checkpoint"] += bool(notes) and notes[-1][0] == "saving"
        counts["left a partial checkpoint"] += any(".partial-" in each for each in checkpoints.remains)
        counts["left a checkpoint that was about to be replaced"] += any(
            ".replaced" in each for each in checkpoints.remains
        )
        counts["between a checkpoint's rename and `latest`"] += max(checkpoints.steps.values(), default=-1) > latest

    def _check(self, life: Life, expected: int) -> None:
        """Exit codes, the step that was loaded, and every step that was made."""
        killed = -signal.SIGKILL in life.codes.values()
        for rank, code in sorted(life.codes.items()):
            if code not in (0, -signal.SIGKILL) and not (killed and "EngineError: " in life.output(rank)):
                raise Lost(f"rank {rank} ended with exit code {code}:\n{life.output(rank)}")
        for rank in range(self.plan.ranks):
            for word, *rest in life.notes(rank):
                if word == "loaded" and int(rest[0]) != max(0, expected):
                    raise Lost(f"loaded: rank {rank} continued from {rest[0]}, expected {expected}")
                if word == "saved" and rank == 0:
                    self._saved = max(self._saved, int(rest[0]))
                if word == "step":
                    step, *ours = rest
                    theirs = self.reference.steps[rank][step]
                    if ours != theirs:
                        raise Lost(
                            f"same: rank {rank}, step {step}, samples and digest: {' '.join(ours)}; "
                            f"without interruption: {' '.join(theirs)}"
                        )
                    self.tally.counts["steps repeated"] += step in self._made[rank] and rank == 0
                    self._made[rank].add(step)

    def _check_end(self, life: Life) -> None:
        """The final weights, and what is left in the folder."""
        for rank, weights in enumerate(self.reference.weights):
            if self._made[rank] != set(self.reference.steps[rank]):
                raise Lost(f"same: rank {rank} made {len(self._made[rank])} of {STEPS} steps")
            if (self.folder / f"weights.{rank}").read_bytes() != weights:
                raise Lost(f"same: rank {rank}'s final weights differ from those of a run without interruption")
        checkpoints = Checkpoints(self.folder / "checkpoints")
        if checkpoints.to_load() != STEPS:
            raise Lost(f"complete: the last checkpoint is of step {checkpoints.to_load()}; expected {STEPS}")
        if ["saving", str(STEPS)] in life.notes(0):
            newest = sorted(checkpoints.steps, key=lambda tag: checkpoints.steps[tag])[-KEEP:]
            kept = {*newest, *(f"global_step{words[1]}" for words in life.notes(0) if words[0] == "loaded")}
            if checkpoints.remains or set(checkpoints.steps) - kept or len(newest) != KEEP:
                raise Lost(f"tidy: expected {sorted(kept)}, found {[*checkpoints.steps]} and {checkpoints.remains}")


# -- all runs -------------------------------------------------------------------------------------------


def kill_all(plan: Plan, count: int, dice: random.Random, folder: Path, tally: Tally) -> list[str]:
    """Runs with so many kills; returns which checks failed."""
    faults = list[str]()
    reference = Reference(plan, folder / "reference")
    began, number, kills, runs = time.monotonic(), 0, tally.counts["kills"], tally.counts["runs"]
    while tally.counts["kills"] < kills + count and len(faults) < 3:
        number += 1
        run = Run(plan, folder / f"run{number}", reference, dice, tally)
        try:
            while not run.live(kill=tally.counts["kills"] < kills + count):
                pass
            tally.counts["runs"] += 1
            shutil.rmtree(run.folder)
        except Lost as error:
            faults.append(f"{plan}, run {number} (its files are in {run.folder}): {error}")
    made, completed = tally.counts["kills"] - kills, tally.counts["runs"] - runs
    print(f"{plan}: {made} kills, {completed} runs completed, {time.monotonic() - began:.0f} s", flush=True)
    return faults


def table(tally: Tally) -> str:
    counts = Counter(tally.counts)
    rows = [("kills", str(counts.pop("kills", 0))), ("runs completed", str(counts.pop("runs", 0)))]
    rows += [(f"  {name}", str(number)) for name, number in sorted(counts.items())]
    if tally.waits:
        waits = sorted(tally.waits)
        rows.append(("  seconds until the other ended: median, max", f"{waits[len(waits) // 2]:.2f}, {waits[-1]:.2f}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/kill_test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, metavar="N", help="kills, of all runs (default 200)")
    parser.add_argument("--ranks", type=int, choices=(1, 2), help="of each run; default: both")
    parser.add_argument("--stage", type=int, choices=range(4), help="of ZeRO; default: each")
    parser.add_argument(
        "--async",
        dest="background",
        action=argparse.BooleanOptionalAction,
        help="with async_save or without; default: both",
    )
    victims = "which ranks a kill strikes; either: one rank in a quarter of the kills (default)"
    parser.add_argument("--victims", choices=("all", "one", "either"), default="either", help=victims)
    parser.add_argument("--seed", type=int, help="of the instants and victims; default: another one each time")
    sabotage = "lose the position in the data, or a checkpoint, before each restart: must exit with 1"
    parser.add_argument("--sabotage", choices=("data", "save"), help=sabotage)
    given = parser.parse_args()
    if given.count < 1:
        parser.error(f"--count: got {given.count}; expected at least 1")
    seed = random.randrange(10**6) if given.seed is None else given.seed
    choices = itertools.product(
        (1, 2) if given.ranks is None else [given.ranks],
        range(4) if given.stage is None else [given.stage],
        (False, True) if given.background is None else [given.background],
    )
    plans = [Plan(*each, given.victims, given.sabotage) for each in choices]
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no process is left behind
    print(f"{given.count} kills, seed {seed}", flush=True)
    tally, dice, folder = Tally(), random.Random(seed), Path(tempfile.mkdtemp(prefix="kill_test-"))
    faults = ["interrupted"]
    try:
        for number, plan in enumerate(plans):
            count = given.count * (number + 1) // len(plans) - given.count * number // len(plans)
            if count:
                (folder / str(number)).mkdir()
                faults = kill_all(plan, count, dice, folder / str(number), tally)
            if faults:
                break
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
