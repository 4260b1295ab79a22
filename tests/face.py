"""The package `deepspeed` of `engine/compat`, importable for as long as a test needs it."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

__all__ = ["FACE", "face", "with_face"]

FACE = Path(__file__).parents[1] / "engine" / "compat"


@contextmanager
def face() -> Iterator[Any]:
    """A context with the folder on the path; afterwards the package, its finder and its process group are gone."""
    sys.path.insert(0, str(FACE))
    try:
        yield importlib.import_module("deepspeed")
    finally:
        sys.path.remove(str(FACE))
        sys.meta_path[:] = [each for each in sys.meta_path if type(each).__module__ != "deepspeed._paths"]
        for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
            del sys.modules[name]
        if dist.is_initialized():
            dist.destroy_process_group()


def with_face(work: Callable[..., Any]) -> Callable[..., Any]:
    """A function for `run_ranks` that gets the package as its first argument."""

    @functools.wraps(work)
    def run(*args: Any) -> Any:
        with face() as deepspeed:
            return work(deepspeed, *args)

    return run
