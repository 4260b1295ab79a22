"""The README's recipes on two hosts: two network namespaces of Linux, with addresses and names of their own.

    python scripts/two_hosts.py [--keep-output DIR]

    static      2 x 2 processes, the README's two commands              hosts as Debian installs them: their own names
                                                                        are 127.0.1.1; the other's name is unknown
    cable       the same run goes on, and the cable is pulled out       what is left must end, and say why
    one host    four processes, torchrun --standalone                   what the others are compared with
    slurm       2 x 2 processes, the README's srun with c10d            srun and scontrol are stand-ins that do what
                                                                        SLURM's do: one task per host

Losses and weights must be equal bit for bit. Commands are read from README.md, with 2 processes for its 4. Exits with
77, and says so, where namespaces cannot be made (it takes root and the package iproute2). Namespaces, and what runs in
them, are removed whatever happens; no packet leaves them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77
PATIENCE = 120.0  # seconds for each run
TIMEOUT = 5.0  # seconds that training waits for a lost host
ADDRESSES = ("10.0.0.1", "10.0.0.2")  # the README's; these are known in the two namespaces only
BY_NAME = ["127.0.0.1 localhost\n10.0.0.1 node0\n10.0.0.2 node1\n"] * 2
AS_DEBIAN = [f"127.0.0.1 localhost\n127.0.1.1 node{index}\n" for index in (0, 1)]

TRAIN = """
import os, sys, time
import torch
from torch import nn
from engine import initialize

out, updates, timeout = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.1), nn.Tanh(), nn.Linear(64, 1))
generator = torch.Generator().manual_seed(1)
data = torch.utils.data.TensorDataset(*(torch.randn(256, size, generator=generator) for size in (16, 1)))
config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "redline": {"distributed_timeout": timeout},
}
engine = initialize(model, config, training_data=data, device="cpu")
losses = []
while engine.global_steps < updates:
    for x, y in engine.training_dataloader:
        engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step()
        losses.append(engine.world.mean(engine.loss).item())
        if engine.global_steps == 32 and engine.global_rank == 0:
            numbers = losses + torch.cat([weight.flatten() for weight in model.parameters()]).tolist()
            with open(out + ".part", "w") as file:
                file.write("\\n".join(number.hex() for number in numbers))
            os.replace(out + ".part", out)
        if engine.global_steps > 32:
            time.sleep(0.05)
"""

SRUN = """#!/bin/sh
# One task per node, at once, each with the command as it is; the first failure is the step's.
{python} {this} --task 0 {names} "$@" & first=$!
{python} {this} --task 1 {names} "$@"; second=$?
wait $first && exit $second
"""

SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames node[0-1]" ] && printf 'node0\\nnode1\\n'
"""


class Forbidden(Exception):
    """This machine does not let us make hosts."""


@dataclass
class Hosts:
    """Two namespaces joined by a cable, and what runs in them."""

    names: tuple[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, index: int, command: str, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Run a shell command on a host, its output into a file."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                on_host(self.names, index, ["sh", "-c", command]),
                stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
        self.running.append(process)
        return process

    def know(self, files: list[str]) -> None:
        """Give each host a file /etc/hosts of its own."""
        for name, text in zip(self.names, files):
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text(text)

    def pull_cable(self) -> None:
        ip("-n", self.names[1], "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        ip("-n", self.names[1], "link", "set", "eth0", "up")


def on_host(names: tuple[str, str], index: int, command: list[str]) -> list[str]:
    """A command as it runs on a host: in its network, with its /etc/hosts, under its name."""
    under_its_name = ["unshare", "--uts", "--", "sh", "-c", 'hostname "$0" && exec "$@"', f"node{index}"]
    return ["ip", "netns", "exec", names[index], *under_its_name, *command]


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Forbidden(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts, gone afterwards with all that ran on them."""
    for needed in ("ip", "unshare", "hostname"):
        if shutil.which(needed) is None:
            raise Forbidden(f"the command {needed} is not there (Debian: iproute2, util-linux, hostname)")
    remove_orphans()
    hosts = Hosts((f"redline0-{os.getpid()}", f"redline1-{os.getpid()}"))
    try:
        for name in hosts.names:
            ip("netns", "add", name)
        first, second = hosts.names
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in zip(hosts.names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        hosts.know(BY_NAME)
        trial = subprocess.run(on_host(hosts.names, 0, ["true"]), capture_output=True, text=True)
        if trial.returncode:
            raise Forbidden(f"no host under a name of its own: {trial.stderr.strip()}")
        yield hosts
    finally:
        for process in hosts.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for name in hosts.names:
            remove(name)


def remove(name: str) -> None:
    """A host, with all that runs on it."""
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)  # torchrun's workers have sessions of their own
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
    with suppress(OSError):
        Path("/etc/netns").rmdir()


def remove_orphans() -> None:
    """Hosts whose script was killed before it could remove them."""
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
        name = line.split()[0]
        owner = re.fullmatch(r"redline[01]-(\d+)", name)
        if owner and not Path("/proc", owner[1]).exists():
            remove(name)


def recipes() -> tuple[list[str], str]:
    """The README's commands: those of two hosts, and that of SLURM; for 2 processes each, and without the script."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("--nproc-per-node 4", "--nproc-per-node 2")
    static = re.findall(r"^torchrun --nnodes 2 --node-rank \d .*?(?= train\.py)", text, re.MULTILINE)
    slurm = re.findall(r"^srun torchrun (?:.*\\\n)*.*?(?= train\.py)", text, re.MULTILINE)
    assert len(static) == 2 and len(slurm) == 1, "README.md has no such recipes any more"
    return static, slurm[0]


class Trial:
    """The runs, in order; each raises AssertionError with the output where it is not as it should be."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.static, self.slurm = recipes()
        (folder / "train.py").write_text(TRAIN)
        commands = folder / "bin"
        commands.mkdir()
        this, names = Path(__file__).resolve(), ",".join(hosts.names)
        scripts = {
            "torchrun": f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
            "srun": SRUN.format(python=sys.executable, this=this, names=names),
            "scontrol": SCONTROL,
        }
        for name, script in scripts.items():
            (commands / name).write_text(script)
            (commands / name).chmod(0o755)
        mine = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]"}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("GLOO_", "TORCHELASTIC"))},
            **mine,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name: str, index: int, command: str, updates: int = 32) -> subprocess.Popen[bytes]:
        script = f"{self.folder}/train.py {self.folder}/{name}.txt {updates} {TIMEOUT}"
        return self.hosts.start(index, f"{command} {script}", self.folder / f"{name}-{index}.log", self.environment)

    def output(self, name: str) -> str:
        logs = sorted(self.folder.glob(f"{name}-*.log"))
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')}" for log in logs)

    def end(self, name: str, processes: list[subprocess.Popen[bytes]]) -> None:
        """Wait for runs that must end well."""
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name}: not done in {PATIENCE:g} s\n{self.output(name)}") from None
        assert not any(process.returncode for process in processes), f"{name}: failed\n{self.output(name)}"

    def compare(self, name: str) -> None:
        one, two = ((self.folder / f"{each}.txt").read_text().split() for each in ("one", name))
        worst = max(abs(float.fromhex(a) - float.fromhex(b)) for a, b in zip(one, two, strict=True))
        assert one == two, f"{name}: losses and weights are not those of one host; they differ by up to {worst:g}"

    def one_host(self) -> None:
        self.end("one", [self.start("one", 0, "torchrun --standalone --nproc-per-node 4")])

    def slurm_job(self) -> None:
        self.hosts.know(BY_NAME)
        self.hosts.plug_in()
        self.end("slurm", [self.start("slurm", 0, self.slurm)])

    def two_commands(self) -> list[subprocess.Popen[bytes]]:
        """The README's two commands, which train on after the part that is compared."""
        self.hosts.know(AS_DEBIAN)
        processes = [self.start("static", index, self.static[index], 10**6) for index in (0, 1)]
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / "static.txt").exists():
            ended = any(process.poll() is not None for process in processes)
            assert not ended and time.monotonic() < deadline, f"static: no losses\n{self.output('static')}"
            time.sleep(0.1)
        return processes

    def last_words(self, processes: list[subprocess.Popen[bytes]]) -> list[str]:
        """What each host said when it had lost the other."""
        deadline = time.monotonic() + PATIENCE
        words = []
        for index, process in enumerate(processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"cable: still running\n{self.output('static')}") from None
            said = (self.folder / f"static-{index}.log").read_text(errors="replace")
            told = re.search(r"EngineError: (update \d+: lost .*)", said)
            assert process.returncode and told, f"cable: no word of the loss on host {index}\n{said}"
            words.append(told[1])
        return words


def run(folder: Path) -> None:
    with two_hosts() as hosts:
        trial = Trial(hosts, folder)
        processes = trial.two_commands()
        print("static: 32 updates; now the cable is pulled out", flush=True)
        hosts.pull_cable()
        trial.one_host()  # while the others wait for each other
        print("one host: 32 updates", flush=True)
        trial.compare("static")
        print("static, on hosts as Debian installs them: the same losses and weights, bit for bit", flush=True)
        for index, words in enumerate(trial.last_words(processes)):
            print(f"cable: host {index} has ended: {words}", flush=True)
        trial.slurm_job()
        trial.compare("slurm")
        print("slurm: the same losses and weights, bit for bit", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep-output", type=Path, metavar="DIR", help="keep scripts, logs and numbers there")
    parser.add_argument("--task", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # srun's stand-in calls this
    arguments = parser.parse_args()
    if arguments.task:
        index, names, *command = arguments.task
        first, second = names.split(",")
        line = on_host((first, second), int(index), command)
        os.execvp(line[0], line)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the hosts are removed
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep_output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run(folder)
        except Forbidden as error:
            print(f"skipped: this machine lets nobody make hosts: {error}")
            return SKIPPED
        except AssertionError as error:
            print(f"FAILED\n{error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
