"""What commands share: how one is declared, the parser and its help, and kinds of values."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

__all__ = ["Argument", "Command", "Parser", "aliased", "arg", "command", "kind", "numbers", "positive"]

T = TypeVar("T")
Argument = tuple[tuple[str, ...], dict[str, Any]]  # of argparse's `add_argument`

# Headings, options, and the commands of examples.
_HELP_STYLES = {
    r"(?m)^\w[\w ]*:": "bold",
    r"(?<![\w-])--?[a-z][\w-]*": "cyan",
    r"(?m)^  (redline|torchrun) .*$": "green",
}


class Command(NamedTuple):
    """A command of the command line; `run` takes its options and returns the exit code."""

    name: str
    summary: str
    details: str
    arguments: tuple[Argument, ...]
    run: Callable[[argparse.Namespace], int]


def command(*arguments: Argument) -> Callable[[Callable[[argparse.Namespace], int]], Command]:
    """Make a function a command of its name; the first line of its docstring is the summary, the rest the details."""

    def declare(run: Callable[[argparse.Namespace], int]) -> Command:
        summary, _, details = inspect.cleandoc(run.__doc__ or "").partition("\n\n")
        return Command(run.__name__.replace("_", "-"), summary, details, arguments, run)

    return declare


def arg(*names: str, **settings: Any) -> Argument:
    """An argument of a command, as argparse's `add_argument` takes it."""
    return names, settings


def aliased(*names: str, dest: str, **settings: Any) -> tuple[Argument, Argument]:
    """An argument; its names after the first are understood and not shown."""
    hidden = {**settings, "dest": dest, "help": argparse.SUPPRESS}
    return arg(names[0], dest=dest, **settings), arg(*names[1:], **hidden)


class Parser(argparse.ArgumentParser):
    """An argument parser that prints help in color on a terminal."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        # Keeps the line breaks of descriptions, and each option and its help on one line where there is room.
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
        super().__init__(prog, description=description, formatter_class=formatter, **options)

    def print_help(self, file: Any = None) -> None:
        from rich.console import Console
        from rich.text import Text

        # rich prints plain text where there is no terminal, and with NO_COLOR.
        text = Text(self.format_help())
        for pattern, style in _HELP_STYLES.items():
            text.highlight_regex(pattern, style)
        Console(file=file).print(text, end="", soft_wrap=True)


def kind(convert: Callable[[str], T], expected: str, accepts: Callable[[T], bool] = lambda value: True) -> Any:
    """A type for argparse: what a text is converted to, and the words for what is expected."""

    def parse(text: str) -> T:
        try:
            if accepts(value := convert(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f'got "{text}"; expected {expected}')

    return parse


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


positive = kind(int, "an integer >= 1", lambda value: value >= 1)
numbers = kind(_floats, "numbers with commas, such as 5,50")
