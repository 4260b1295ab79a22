"""The command run: a script that imports deepspeed, under torchrun, with Redline behind that name."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from pathlib import Path

from redline.cli.arguments import aliased, arg, command, kind, positive
from redline.errors import EngineError

__all__ = ["FACE", "run"]

FACE = Path(__file__).resolve().parents[1] / "compat"  # the folder of the package `deepspeed`
_Hosts = dict[str, list[int]]  # slots of each host
_index = kind(int, "an integer >= 0", lambda value: value >= 0)


@command(
    *aliased("--num_gpus", "--num-gpus", "--nproc-per-node", "--nproc_per_node", dest="ranks", type=positive,
             metavar="N", help="ranks on this host, as --nproc-per-node (default: one per GPU, else 1)"),
    *aliased("--num_nodes", "--num-nodes", "--nnodes", dest="nnodes", type=positive, metavar="N",
             help="hosts, as --nnodes (default: 1)"),
    *aliased("--node_rank", "--node-rank", dest="node_rank", type=_index, default=0, metavar="I",
             help="number of this host among them (default: 0)"),
    *aliased("--master_addr", "--master-addr", dest="master_addr", metavar="HOST",
             help="the first host; all hosts can reach it"),
    *aliased("--master_port", "--master-port", dest="master_port", type=positive, metavar="PORT",
             help="a free port there (default: 29500; on one host any free port)"),
    arg("--hostfile", metavar="FILE", help='lines "HOST slots=N", as DeepSpeed reads them'),
    arg("--include", default="", metavar="HOSTS", help="hosts and slots to use: host0@host1:0,2"),
    arg("--exclude", default="", metavar="HOSTS", help="hosts and slots not to use"),
    arg("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script"),
    arg("-m", "--module", action="store_true", help="SCRIPT is the name of a module"),
    arg("--force_multi", "--enable_each_rank_log", "--no_ssh", action="store_true", help=argparse.SUPPRESS),
    arg("--launcher", "--launcher_args", help=argparse.SUPPRESS),
    arg("script", metavar="SCRIPT", help="what to run"),
    arg("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script"),
)  # fmt: skip
def run(options: argparse.Namespace) -> int:
    """Run a script that imports deepspeed, without DeepSpeed.

    In the script, and in what it spawns, `import deepspeed` gives Redline under DeepSpeed's names. The flags of
    `deepspeed` and of `torchrun` work; like `deepspeed` it passes --local_rank=N to the script. On several hosts run it
    on each of them: it prints the command for the others and starts its own ranks; there is no ssh.

    examples:
      redline run train.py --deepspeed_config ds.json
      redline run --num_gpus 2 train.py --deepspeed --deepspeed_config ds.json
      redline run --include localhost:1,3 train.py
      redline run --num_nodes 2 --node_rank 0 --master_addr host0 --num_gpus 4 train.py
      redline run --hostfile hosts --exclude host1:0 train.py
    """
    hosts = _choose_hosts(options)
    paths = filter(None, [str(FACE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if not hosts:
        ranks = options.ranks or _count_gpus() or 1
    else:
        here = _this_host(list(hosts))
        if len(hosts) > 1:
            options.nnodes, options.node_rank = len(hosts), list(hosts).index(here)
            options.master_addr = options.master_addr or next(iter(hosts))
        slots = hosts[here][: options.ranks]
        ranks = len(slots)
        if slots != list(range(ranks)):
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
        for host in [each for each in hosts if each != here]:
            print(f"on {host}: {_command_line(options)}", file=sys.stderr)
    sys.stdout.flush()
    command = [sys.executable, "-m", "torch.distributed.run", *_torchrun(options, ranks)]
    os.execve(sys.executable, command, environment)  # keeps signals


def _torchrun(options: argparse.Namespace, ranks: int) -> list[str]:
    """torchrun's arguments on this host."""
    arguments = [f"--nproc-per-node={ranks}"]
    if (options.nnodes or 1) > 1:
        if options.master_addr is None:
            raise EngineError("run: --num_nodes above 1 needs --master_addr, the name or address of the first host")
        arguments += [f"--nnodes={options.nnodes}", f"--node-rank={options.node_rank}"]
        arguments += [f"--master-addr={options.master_addr}", f"--master-port={options.master_port or 29500}"]
    elif options.master_port is None:
        arguments += ["--standalone", "--local-addr=127.0.0.1"]
    else:
        arguments += ["--master-addr=127.0.0.1", f"--master-port={options.master_port}"]
    if options.module:
        arguments.append("--module")
    # torchrun puts the number of each rank into its place.
    local_rank = [] if options.no_local_rank else ["--local_rank=${local_rank}"]
    return [*arguments, options.script, *local_rank, *options.arguments]


def _command_line(options: argparse.Namespace) -> str:
    """What to type on another host: the same, since each host finds itself in the host file."""
    given = vars(options) | {"num_gpus": options.ranks}
    names = ("hostfile", "include", "exclude", "master_addr", "master_port", "num_gpus")
    flags = [f"--{name}={given[name]}" for name in names if given[name]]
    flags += ["--no_local_rank"] * options.no_local_rank + ["--module"] * options.module
    return shlex.join(["redline", "run", *flags, options.script, *options.arguments])


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _choose_hosts(options: argparse.Namespace) -> _Hosts:
    """Slots of each host that takes part, in the order of the host file; empty where no flag chooses hosts.

    Raises:
        EngineError: a flag or the host file is wrong, or nothing is left.
    """
    if options.hostfile is None and not options.include and not options.exclude:
        return {}
    if options.include and options.exclude:
        raise EngineError("run: got --include and --exclude; give one of them")
    hosts = _read_hosts(Path(options.hostfile)) if options.hostfile else {"localhost": list(range(_count_gpus() or 1))}
    included, excluded = _parse_slots(options.include, hosts), _parse_slots(options.exclude, hosts)
    chosen = {name: included[name] or hosts[name] for name in hosts if name in included}
    chosen = chosen if options.include else hosts
    for name, slots in excluded.items():
        chosen = {**chosen, name: [slot for slot in chosen[name] if slots and slot not in slots]}
    chosen = dict([(name, slots) for name, slots in chosen.items() if slots][: options.nnodes])
    if not chosen:
        raise EngineError("run: no slot is left; give --exclude fewer hosts or slots")
    return chosen


def _read_hosts(path: Path) -> _Hosts:
    hosts: _Hosts = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        key, _, slots = words[-1].partition("=")
        if len(words) != 2 or key != "slots" or not slots.isdigit() or words[0] in hosts:
            raise EngineError(f'{path}:{number}: got "{line.strip()}"; expected "HOST slots=N", each host once')
        hosts[words[0]] = list(range(int(slots)))
    return hosts


def _parse_slots(text: str, hosts: _Hosts) -> _Hosts:
    """``host0@host1:0,2`` as slots of each host; no slots for all of them."""
    chosen = {}
    for part in filter(None, text.split("@")):
        name, _, slots = part.partition(":")
        numbers = [slot.strip() for slot in slots.split(",") if slot.strip()]
        if name not in hosts or not all(number.isdigit() for number in numbers):
            known = f"{', '.join(hosts)}, such as {next(iter(hosts))}:0,1"
            raise EngineError(f'run: got "{part}"; expected a host of {known}')
        chosen[name] = [int(number) for number in numbers]
    return chosen


def _this_host(hosts: list[str]) -> str:
    """Which of the hosts this is."""
    own = {"localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()}
    addresses = {"127.0.0.1", *_addresses(socket.gethostname())}
    for host in hosts:
        if host in own or addresses & _addresses(host):
            return host
    raise EngineError(f"run: this host, {socket.gethostname()}, is none of {', '.join(hosts)}; run it on one of them")


def _addresses(host: str) -> set[str]:
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return set()
