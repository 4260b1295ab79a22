"""Runs a script and writes down the losses of its engines: the part of `redline compare-run` that is in each rank.

It stands alone, since a Python that has DeepSpeed may not have Redline. `deepspeed` is whichever package the path has.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import runpy
import sys
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Run a script: the arguments are a folder, steps, a seed or "", "module" or "file", the script and its own."""
    folder, steps, seed, kind, script, *arguments = sys.argv[1:]
    if seed:
        _seed(int(seed))
    _record(os.path.join(folder, f"{os.environ['RANK']}.jsonl"), int(steps))
    sys.argv = [script, *arguments]
    if kind == "module":
        sys.path[0] = os.getcwd()
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")


def _seed(seed: int) -> None:
    import torch

    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def _record(path: str, steps: int) -> None:
    """Write [engine, optimizer step, loss] at each backward(); leave the script after so many optimizer steps.

    A plain ``loss.backward()`` counts for the engine whose step() comes next, if its own backward() was not called.
    """
    import torch

    engine_class: Any = importlib.import_module("deepspeed").DeepSpeedEngine
    tensor_class: Any = torch.Tensor
    backward, step, plain_backward = engine_class.backward, engine_class.step, tensor_class.backward
    numbers: dict[int, int] = {}  # of the engines, in the order in which they train
    done: dict[int, int] = {}  # optimizer steps, without those of a loaded checkpoint
    plain: list[Any] = []  # losses of plain backwards since the last step()
    told: set[int] = set()  # engines whose backward() was called since their last step()

    def write(engine: Any, loss: Any) -> None:
        number = numbers.setdefault(id(engine), len(numbers))
        with open(path, "a") as file:
            json.dump([number, done.get(number, 0) + 1, loss.detach().double().mean().item()], file)
            file.write("\n")

    @functools.wraps(backward)
    def recorded(engine: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        write(engine, loss)
        told.add(id(engine))
        before = len(plain)
        try:
            return backward(engine, loss, *args, **kwargs)
        finally:
            del plain[before:]  # its own

    @functools.wraps(plain_backward)
    def noted(loss: Any, *args: Any, **kwargs: Any) -> Any:
        plain.append(loss.detach())
        return plain_backward(loss, *args, **kwargs)

    @functools.wraps(step)
    def counted(engine: Any, *args: Any, **kwargs: Any) -> Any:
        for loss in plain if id(engine) not in told else ():
            write(engine, loss)
        plain.clear()
        told.discard(id(engine))
        before = engine.global_steps
        result = step(engine, *args, **kwargs)
        number = numbers.setdefault(id(engine), len(numbers))
        done[number] = done.get(number, 0) + (engine.global_steps > before)
        if done[number] >= steps:
            sys.exit(0)
        return result

    engine_class.backward, engine_class.step, tensor_class.backward = recorded, counted, noted


if __name__ == "__main__":
    main()
