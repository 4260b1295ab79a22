"""The command `redline`: what can be done without writing a script.

Each command is a function whose docstring is its help. What it runs it imports when it runs, so that help, and commands
that only read configs, load no torch. Exit codes: 0 done; 1 the input is invalid, or nothing can be suggested, with the
reason; 2 the command line is wrong; 3 (`validate`) valid DeepSpeed that asks for something not
supported, or (`compare-run`) no DeepSpeed to compare with.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from redline import __version__
from redline.cli.arguments import Parser
from redline.cli.checkpoints import consolidate
from redline.cli.compare_run import compare_run
from redline.cli.configs import diff, explain, schema, validate
from redline.cli.learning_rates import plot, range_test, report, tune
from redline.cli.run import run
from redline.errors import ConfigError, EngineError

__all__ = ["build_parser", "main"]

_COMMANDS = (validate, explain, diff, schema, plot, range_test, tune, report, consolidate, run, compare_run)
_FIRST_STEPS = """
`redline COMMAND --help` explains a command, with examples.

examples:
  redline validate config.json
  redline plot config.json --steps 4000
  redline tune task.py:digits --config config.json --steps 4000"""
_BROKEN_PIPE = 141  # 128 + SIGPIPE, a shell's code for a program whose reader has gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except EngineError as error:
        # Every rank reads the same config and finds the same mistakes, but a file may be missing on one host only.
        rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if rank == "0" or not isinstance(error, ConfigError):
            print(f"redline{f' (rank {rank})' if ranks != '1' else ''}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # As of `redline explain | head`. Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        print(f"redline: {error.filename or 'file'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("redline: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses has the command's function as `run`, and its options."""
    parser = Parser("redline", "Train PyTorch models from DeepSpeed's JSON, and find their learning rate.")
    parser.add_argument("--version", action="version", version=f"redline {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, help="what to do; see below")
    lines = ["commands:"]
    for command in _COMMANDS:
        added = commands.add_parser(command.name, description=command.summary, epilog=command.details)
        for names, settings in command.arguments:
            added.add_argument(*names, **settings)
        added.set_defaults(run=command.run)
        lines.append(f"    {command.name:<12} {command.summary}")
    parser.epilog = "\n".join([*lines, _FIRST_STEPS])
    return parser
