"""Run the README's commands for two hosts on two Linux network namespaces, with addresses and names of their own.

    static     2 x 2 ranks, the README's two torchrun commands   each host knows only its own name, as 127.0.1.1, which
                                                                 is how Debian writes /etc/hosts
    cable      the same run goes on, the cable is pulled         each host must end with an error that names the other
    one host   four ranks, torchrun --standalone                 the reference
    slurm      2 x 2 ranks, docs/launch/train.sbatch with c10d   srun and scontrol are stand-ins: one task per host

Losses and weights must equal the reference bit for bit. Commands are read from these files, with 2 ranks per host for
their 4. Exits with 77 if namespaces cannot be made (that needs root and iproute2). Namespaces, and what runs in them,
are always removed.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77
PATIENCE = 120.0  # seconds for each run
TIMEOUT = 5.0  # redline.distributed_timeout of the runs, in seconds
ADDRESSES = ("10.0.0.1", "10.0.0.2")  # the README's, which exist in the two namespaces only
BY_NAME = ["127.0.0.1 localhost\n10.0.0.1 node0\n10.0.0.2 node1\n"] * 2
AS_DEBIAN = [f"127.0.0.1 localhost\n127.0.1.1 node{index}\n" for index in (0, 1)]

TRAIN = """
import os, sys, time
import torch
from torch import nn
from redline import initialize

out, steps, timeout = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
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
while engine.global_steps < steps:
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
# One task per node; the exit code is that of a task that failed.
while [ "${{1#-}}" != "$1" ]; do shift; done # its options
{python} {this} --task 0 {names} "$@" & first=$!
{python} {this} --task 1 {names} "$@"; second=$?
wait $first && exit $second
"""

SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames node[0-1]" ] && printf 'node0\\nnode1\\n'
"""


class Forbidden(Exception):
    """This machine does not allow namespaces."""


# -- hosts --------------------------------------------------------------------------------------------


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Forbidden(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def on_host(names: tuple[str, str], index: int, command: list[str]) -> list[str]:
    """A command in a host's network, with its /etc/hosts, under its hostname."""
    with_hostname = ["unshare", "--uts", "--", "sh", "-c", 'hostname "$0" && exec "$@"', f"node{index}"]
    return ["ip", "netns", "exec", names[index], *with_hostname, *command]


def set_etc_hosts(names: tuple[str, str], files: list[str]) -> None:
    for name, text in zip(names, files):
        folder = Path("/etc/netns") / name  # `ip netns exec` mounts it over /etc
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(text)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces joined by a cable; removed afterwards, with all that runs in them."""
    for needed in ("ip", "unshare", "hostname"):
        if shutil.which(needed) is None:
            raise Forbidden(f"the command {needed} is not there (Debian: iproute2, util-linux, hostname)")
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = re.fullmatch(r"redline[01]-(\d+)", name)
        if owner and not Path("/proc", owner[1]).exists():
            remove(name)  # left by a script that was killed
    names = (f"redline0-{os.getpid()}", f"redline1-{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        set_etc_hosts(names, BY_NAME)
        trial = subprocess.run(on_host(names, 0, ["true"]), capture_output=True, text=True)
        if trial.returncode:
            raise Forbidden(f"no hostname of its own: {trial.stderr.strip()}")
        yield names
    finally:
        for name in names:
            remove(name)


def remove(name: str) -> None:
    """A namespace, with all that runs in it."""
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)  # torchrun's workers have sessions of their own
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
    with suppress(OSError):
        Path("/etc/netns").rmdir()


# -- runs ---------------------------------------------------------------------------------------------


def readme_commands() -> tuple[list[str], str]:
    """The README's two torchrun commands and the batch script's, with 2 ranks per host and without the script."""
    readme, batch = (
        (ROOT / path).read_text(encoding="utf-8").replace("--nproc-per-node 4", "--nproc-per-node 2")
        for path in ("README.md", "docs/launch/train.sbatch")
    )
    static = re.findall(r"^torchrun --nnodes 2 --node-rank \d .*?(?= train\.py)", readme, re.MULTILINE)
    assert len(static) == 2, "README.md no longer has these commands"
    return static, batch[batch.index("head_node=") : batch.rindex("train.py")].rstrip().removesuffix("\\").rstrip()


class Runs:
    """Starts runs on the hosts, waits for them and compares them; raises AssertionError with their output."""

    def __init__(self, names: tuple[str, str], folder: Path) -> None:
        self.names, self.folder = names, folder
        (folder / "train.py").write_text(TRAIN)
        scripts = {
            "torchrun": f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
            "srun": SRUN.format(python=sys.executable, this=Path(__file__).resolve(), names=",".join(names)),
            "scontrol": SCONTROL,
        }
        (folder / "bin").mkdir()
        for name, script in scripts.items():
            (folder / "bin" / name).write_text(script)
            (folder / "bin" / name).chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GLOO_", "TORCHELASTIC"))}
        slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]"}
        own = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.environment = inherited | slurm | own

    def start(self, name: str, index: int, command: str, steps: int = 32) -> subprocess.Popen[bytes]:
        script = f"{self.folder}/train.py {self.folder}/{name}.txt {steps} {TIMEOUT}"
        with (self.folder / f"{name}-{index}.log").open("wb") as log:
            line = on_host(self.names, index, ["sh", "-c", f"{command} {script}"])
            return subprocess.Popen(
                line, stdout=log, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )

    def output(self, name: str) -> str:
        logs = sorted(self.folder.glob(f"{name}-*.log"))
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')}" for log in logs)

    def wait(self, name: str, *processes: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name}: not done in {PATIENCE:g} s\n{self.output(name)}") from None

    def run(self, name: str, command: str) -> None:
        """A run that must end well, started on host 0."""
        process = self.start(name, 0, command)
        self.wait(name, process)
        assert process.returncode == 0, f"{name}: failed\n{self.output(name)}"

    def wait_for_numbers(self, name: str, processes: list[subprocess.Popen[bytes]]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / f"{name}.txt").exists():
            ended = any(process.poll() is not None for process in processes)
            assert not ended and time.monotonic() < deadline, f"{name}: no losses\n{self.output(name)}"
            time.sleep(0.1)

    def compare(self, name: str) -> None:
        one, two = ((self.folder / f"{each}.txt").read_text().split() for each in ("one", name))
        worst = max(abs(float.fromhex(a) - float.fromhex(b)) for a, b in zip(one, two, strict=True))
        assert one == two, f"{name}: losses and weights differ from those of one host by up to {worst:g}"
        print(f"{name}: the same losses and weights as one host, bit for bit", flush=True)

    def loss_of_the_other(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """Each host of `static` must end with an error that names the other."""
        self.wait("static", *processes)
        for index, process in enumerate(processes):
            output = (self.folder / f"static-{index}.log").read_text(errors="replace")
            error = re.search(r"EngineError: (step \d+: lost .*)", output)
            assert process.returncode and error, f"cable: host {index} does not report the loss\n{output}"
            print(f"cable: host {index} has ended: {error[1]}", flush=True)


def run_all(folder: Path) -> None:
    static, slurm = readme_commands()
    with two_hosts() as names:
        runs = Runs(names, folder)
        set_etc_hosts(names, AS_DEBIAN)
        processes = [runs.start("static", index, static[index], 10**6) for index in (0, 1)]
        runs.wait_for_numbers("static", processes)
        print("static: 32 steps; now the cable is pulled", flush=True)
        ip("-n", names[1], "link", "set", "eth0", "down")
        runs.run("one", "torchrun --standalone --nproc-per-node 4")  # while the others wait for each other
        runs.compare("static")
        runs.loss_of_the_other(processes)
        ip("-n", names[1], "link", "set", "eth0", "up")
        set_etc_hosts(names, BY_NAME)
        runs.run("slurm", slurm)
        runs.compare("slurm")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/two_hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep-output", type=Path, metavar="DIR", help="keep scripts, logs and numbers there")
    parser.add_argument("--task", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # the stand-in for srun calls this
    arguments = parser.parse_args()
    if arguments.task:
        index, names, *command = arguments.task
        first, second = names.split(",")
        line = on_host((first, second), int(index), command)
        os.execvp(line[0], line)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the namespaces are removed
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep_output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run_all(folder)
        except Forbidden as error:
            print(f"skipped: this machine does not allow network namespaces: {error}")
            return SKIPPED
        except AssertionError as error:
            print(f"FAILED\n{error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
