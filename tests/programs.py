"""Random programs: training scripts that users could write, run on the engine and on the hand-written loop.

    python -m tests.programs --count 2000 --ranks 2 --seed 7

A program is a setup and a list of operations. Each operation has the lines that a script would have, which are what the
engine runs, and its meaning on `tests.plain_loop.Loop`. After each operation the weights must agree, after an optimizer
step the gradient norm as well, or the engine must have refused with an EngineError that the loop expects. Programs come
from a seed alone. On two ranks many of them run one after another on one process group, as a script with several
engines does.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import random
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from redline import EngineError, initialize
from tests.distributed import RanksFailed, run_ranks
from tests.plain_loop import LEFT_OUT, NEVER_SHARDED, Broken, Impossible, Loop, Net, Setup, batch, mse

__all__ = ["Outcome", "Program", "generate", "report", "run", "run_alone", "run_together", "shrink"]

HEADS = ("a", "b")
MODULES = ("trunk", "gain", "branch", "a", "b", LEFT_OUT)
_PATIENCE = timedelta(seconds=60)  # of a rank, until the other one has done the same operation


# -- operations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """The loss of one or two forwards.

    Attributes:
        number: of the batch.
        terms: how each forward is made ("engine", "module", "method", or "weights" for a term that has none), and its
            route on each rank.
        factor: of the sum.
    """

    number: int
    terms: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]
    factor: float = 1.0

    def text(self, setup: Setup) -> str:
        parts = []
        for place, (how, routes) in enumerate(self.terms):
            x = "x.flip(0)" if place else "x"
            route = repr(list(routes[0])) if len(set(routes)) == 1 else f"{[list(each) for each in routes]}[rank]"
            parts.append(
                {
                    "engine": f"mse(engine({x}, {route}), y)",
                    "module": f"mse(engine.module({x}, {route}), y)",
                    "method": f"model.loss({x}, y, {route})",
                    "weights": f"getattr(model, {route}[-1]).weight.float().square().mean()",
                }[how]
            )
        total = " + ".join(parts)
        return total if self.factor == 1.0 else f"{self.factor} * ({total})"

    def lines(self, setup: Setup) -> list[str]:
        return [batch_line(setup, self.number), f"loss = {self.text(setup)}"]

    def of(self, loop: Loop) -> Callable[[int], Tensor]:
        """The loss of a rank."""

        def loss(rank: int) -> Tensor:
            total: Any = None
            for place, (how, routes) in enumerate(self.terms):
                route = routes[rank]
                if not all(hasattr(loop.model, name) for name in route):
                    raise Impossible("a head that is not there")
                if how == "weights":
                    if loop.setup.sharded:
                        raise Impossible("the loss of a shard")
                    term = getattr(loop.model, route[-1]).weight.float().square().mean()
                else:
                    term = loop.call(rank, self.number, route, flipped=place > 0)
                total = term if total is None else total + term
            scaled: Tensor = total if self.factor == 1.0 else total * self.factor
            return scaled

        if loop.setup.blocks and loop.setup.sharded and any(len(set(routes)) > 1 for _, routes in self.terms):
            raise Impossible("ranks that gather different modules")
        return loss


def batch_line(setup: Setup, number: int) -> str:
    return f"x, y = batch({number}, rank, torch.bfloat16)" if setup.low else f"x, y = batch({number}, rank)"


class Operation:
    """What a script does next."""

    def lines(self, setup: Setup) -> list[str]:
        """As a script would write it."""
        raise NotImplementedError

    def apply(self, loop: Loop) -> None:
        """What must come of it.

        Raises:
            Impossible: no script could say this here.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Backward(Operation):
    loss: Loss
    scale: bool = True

    def lines(self, setup: Setup) -> list[str]:
        arguments = "loss" if self.scale else "loss, scale_wrt_gas=False"
        return [*self.loss.lines(setup), f"engine.backward({arguments})"]

    def apply(self, loop: Loop) -> None:
        loop.backward(self.loss.of(loop), scale=self.scale)


@dataclass(frozen=True)
class Twice(Operation):
    """Two losses of one forward, each with a backward of its own."""

    loss: Loss

    def lines(self, setup: Setup) -> list[str]:
        return [*self.loss.lines(setup), "engine.backward(loss, retain_graph=True)", "engine.backward(0.5 * loss)"]

    def apply(self, loop: Loop) -> None:
        loop.backward(self.loss.of(loop))
        loop.backward(lambda rank: 0.5 * self.loss.of(loop)(rank))


@dataclass(frozen=True)
class NoSync(Operation):
    """Backwards whose gradients stay on their rank until the next one."""

    losses: tuple[Loss, ...]
    then: Loss

    def lines(self, setup: Setup) -> list[str]:
        inner = [line for loss in self.losses for line in (*loss.lines(setup), "engine.backward(loss)")]
        after = [*self.then.lines(setup), "engine.backward(loss)"]
        return ["with engine.no_sync():", *indented(inner), *after]

    def apply(self, loop: Loop) -> None:
        for loss in self.losses:
            loop.backward(loss.of(loop), sync=False)
        loop.backward(self.then.of(loop))


@dataclass(frozen=True)
class PlainBackward(Operation):
    loss: Loss

    def lines(self, setup: Setup) -> list[str]:
        return [*self.loss.lines(setup), "loss.backward()"]

    def apply(self, loop: Loop) -> None:
        loop.plain_backward(self.loss.of(loop))


@dataclass(frozen=True)
class Step(Operation):
    def lines(self, setup: Setup) -> list[str]:
        return ["engine.step()"]

    def apply(self, loop: Loop) -> None:
        loop.step()


@dataclass(frozen=True)
class Flush(Operation):
    def lines(self, setup: Setup) -> list[str]:
        return ["engine.flush()"]

    def apply(self, loop: Loop) -> None:
        loop.flush()


@dataclass(frozen=True)
class UnevenFlush(Operation):
    """An accumulation that ends early, after other numbers of micro-batches on the ranks."""

    counts: tuple[int, ...]
    loss: Loss

    def lines(self, setup: Setup) -> list[str]:
        first = self.loss.number
        body = [
            batch_line(setup, first).replace(str(first), f"{first} + i", 1),
            f"engine.backward({self.loss.text(setup)})",
            *(["engine.step()"] if setup.managed else []),
        ]
        return [f"for i in range({list(self.counts)}[rank]):", *indented(body), "engine.flush()"]

    def apply(self, loop: Loop) -> None:
        if len(self.counts) != loop.setup.ranks or loop.setup.sharded or loop.pending:
            raise Impossible("ranks that gather at different times")
        most = loop.ranks[0].micro_batches + max(self.counts)
        if loop.setup.managed and (loop.boundary or (loop.boundary is None and most >= loop.setup.accumulation)):
            raise Impossible("a step that only one rank takes")
        for rank, count in enumerate(self.counts):
            for i in range(count):
                loop.backward_of(rank, replace(self.loss, number=self.loss.number + i).of(loop)(rank))
                if loop.setup.managed:
                    loop.ranks[rank].micro_batches += 1
                    loop.ranks[rank].pending = False
        if loop.may_refuse not in ("", NEVER_SHARDED):
            raise Impossible("a refusal on one rank only")
        loop.flush()


@dataclass(frozen=True)
class Breaks(Operation):
    """A forward or a backward that raises, is caught on all ranks, and cleared."""

    where: str
    number: int
    route: tuple[str, ...]
    by: str

    def lines(self, setup: Setup) -> list[str]:
        return [
            "try:",
            f"    {batch_line(setup, self.number)}",
            f"    engine.backward(mse(engine(x, {list(self.route)}, {self.where!r}), y))",
            "except Broken:",
            f"    {self.by}.zero_grad()",
        ]

    def apply(self, loop: Loop) -> None:
        if self.where == "backward":
            # Where nothing before the broken place requires a gradient, it is never come to.
            before = ("trunk", "gain", "branch") if "branch" in self.route else ("trunk", "gain")
            if not any(param.requires_grad for name, param in loop.params.items() if name.split(".")[0] in before):
                raise Impossible("a backward that would not break")
        loop.broken(self.where)
        loop.zero_grad()


@dataclass(frozen=True)
class Clear(Operation):
    by: str

    def lines(self, setup: Setup) -> list[str]:
        return [f"{self.by}.zero_grad()"]

    def apply(self, loop: Loop) -> None:
        loop.zero_grad()


@dataclass(frozen=True)
class Boundary(Operation):
    value: bool

    def lines(self, setup: Setup) -> list[str]:
        return [f"engine.set_gradient_accumulation_boundary({self.value})"]

    def apply(self, loop: Loop) -> None:
        loop.set_boundary(self.value)


@dataclass(frozen=True)
class RequiresGrad(Operation):
    modules: tuple[str, ...]
    flag: bool

    def lines(self, setup: Setup) -> list[str]:
        return [f"model.{name}.requires_grad_({self.flag})" for name in self.modules]

    def apply(self, loop: Loop) -> None:
        if not all(hasattr(loop.model, name) for name in self.modules):
            raise Impossible("a module that is not there")
        loop.set_requires_grad(self.modules, self.flag)


@dataclass(frozen=True)
class OnlyHead(Operation):
    """All but one head frozen."""

    head: str

    def lines(self, setup: Setup) -> list[str]:
        return ["model.requires_grad_(False)", f"model.{self.head}.requires_grad_(True)"]

    def apply(self, loop: Loop) -> None:
        if loop.accumulating:
            raise Impossible("whether gradients from before the freezing count is nobody's business")
        loop.set_requires_grad((*MODULES, "new"), False)
        loop.set_requires_grad((self.head,), True)


@dataclass(frozen=True)
class AddGroup(Operation):
    """A module of the model that the optimizer did not have."""

    def lines(self, setup: Setup) -> list[str]:
        return [f'engine.optimizer.add_param_group({{"params": list(model.{LEFT_OUT}.parameters()), "lr": 0.03}})']

    def apply(self, loop: Loop) -> None:
        loop.add_param_group([LEFT_OUT], lr=0.03)


@dataclass(frozen=True)
class AddHead(Operation):
    """A module that the model did not have."""

    def lines(self, setup: Setup) -> list[str]:
        return [
            f"head = model.add_head({setup.dtype})",
            'engine.optimizer.add_param_group({"params": list(head.parameters())})',
        ]

    def apply(self, loop: Loop) -> None:
        loop.add_head()


# What a script may do to its weights. The hand-written loop runs the same lines on its own model.
_WRITES = {
    "mul": ["with torch.no_grad():", "    for p in {params}:", "        p.mul_(0.8)"],
    "clamp": ["with torch.no_grad():", "    for p in {params}:", "        p.clamp_(-0.25, 0.25)"],
    "copy": ["with torch.no_grad():", "    for p in {params}:", "        p.copy_(p * 0.5 + 0.125)"],
    "init": ["for p in {params}:", "    torch.nn.init.constant_(p, 0.25)"],
    "load_state_dict": ["model.load_state_dict({{n: v * 0.75 for n, v in model.state_dict().items()}})"],
    "data": ["for p in {params}:", "    p.data.mul_(0.75)", "engine.train()"],
    "data_copy": ["for p in {params}:", "    p.data.copy_(p.data + 0.25)", "engine.train()"],
    "data_set": ["for p in {params}:", "    p.data = p.data * 0.75", "engine.train()"],
    "vector": [
        "vector = torch.nn.utils.parameters_to_vector({params})",
        "torch.nn.utils.vector_to_parameters(vector * 0.75, {params})",
        "engine.train()",
    ],
    "snapshot": ["ema = {{n: p.detach().clone() for n, p in model.named_parameters()}}"],
    "average": [
        "for n, p in model.named_parameters():",
        "    if n in ema:",
        "        ema[n].mul_(0.5).add_(p.detach(), alpha=0.5)",
    ],
    "adopt": [
        "params = dict(model.named_parameters())",
        "for n, v in ema.items():",
        "    params[n].data.copy_(v)",
        "engine.train()",
    ],
    "adopt_copy": [
        "params = dict(model.named_parameters())",
        "with torch.no_grad():",
        "    for n, v in ema.items():",
        "        params[n].copy_(v)",
    ],
}
_ON_MODULE = ("mul", "clamp", "copy", "init", "data", "data_copy", "data_set", "vector")
_ON_FULL_PARAMETERS = ("data_set", "vector")  # FSDP2 keeps shards as views, which no other tensor can replace


@dataclass(frozen=True)
class Write(Operation):
    kind: str
    module: str = ""

    def lines(self, setup: Setup) -> list[str]:
        owner = f"model.{self.module}" if self.module else "model"
        # A list: torch.nn.utils goes through it twice.
        return [line.format(params=f"list({owner}.parameters())") for line in _WRITES[self.kind]]

    def apply(self, loop: Loop) -> None:
        if self.kind in _ON_FULL_PARAMETERS and loop.setup.sharded:
            raise Impossible("shards in the place of other shards")
        if self.module and not hasattr(loop.model, self.module):
            raise Impossible("a module that is not there")
        if self.kind in ("average", "adopt", "adopt_copy") and not loop.snapshot:
            raise Impossible("an average that was never begun")
        space: dict[str, Any] = {"model": loop.model, "torch": torch, "ema": loop.snapshot, "engine": loop.model}
        exec("\n".join(self.lines(loop.setup)), space)
        loop.snapshot = space["ema"]
        loop.written()


@dataclass(frozen=True)
class Evaluate(Operation):
    """An evaluation in between, of the weights or of their average."""

    loss: Loss
    mode: str
    ema: bool = False

    def lines(self, setup: Setup) -> list[str]:
        swap_in = [
            "own = {n: p.detach().clone() for n, p in model.named_parameters()}",
            *_WRITES["adopt"][:-1],
        ]
        swap_out = ["for n, p in model.named_parameters():", "    p.data.copy_(own[n])"]
        return [
            *(swap_in if self.ema else []),
            "engine.eval()",
            f"with torch.{self.mode}():",
            *indented([batch_line(setup, self.loss.number), f"seen.append(float({self.loss.text(setup)}))"]),
            *(swap_out if self.ema else []),
            "engine.train()",
        ]

    def apply(self, loop: Loop) -> None:
        if self.ema and not loop.snapshot:
            raise Impossible("an average that was never begun")
        params = loop.params
        own = {name: param.detach().clone() for name, param in params.items()}
        losses = self.loss.of(loop)
        with torch.no_grad():
            for name, value in loop.snapshot.items() if self.ema else ():
                params[name].copy_(value)
            for rank, seen in enumerate(loop.seen):
                seen.append(float(losses(rank)))
            for name, value in own.items():
                params[name].copy_(value)


@dataclass(frozen=True)
class Save(Operation):
    tag: str

    def lines(self, setup: Setup) -> list[str]:
        return [f"engine.save_checkpoint(folder, tag={self.tag!r})"]

    def apply(self, loop: Loop) -> None:
        loop.save(self.tag)


@dataclass(frozen=True)
class Load(Operation):
    tag: str

    def lines(self, setup: Setup) -> list[str]:
        return [f"engine.load_checkpoint(folder, tag={self.tag!r})"]

    def apply(self, loop: Loop) -> None:
        loop.load(self.tag)


def indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


# -- programs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    setup: Setup
    operations: tuple[Operation, ...]

    def beginning(self) -> list[str]:
        """The lines that make the engine."""
        setup = self.setup
        seed = "7 + rank" if setup.seed_per_rank else "7"
        lines = [f"model = Net({seed})", *(f"model.{name}.requires_grad_(False)" for name in setup.frozen)]
        groups = []
        for options, modules in setup.group_names:
            listed = " + ".join(f"list(model.{name}.parameters())" for name in modules)
            items = [f'"params": {listed}', *(f"{key!r}: {value!r}" for key, value in options.items())]
            groups.append("{" + ", ".join(items) + "}")
        given = f"[{', '.join(groups)}]"
        if setup.own_optimizer:
            arguments = ", ".join(f"{key}={value!r}" for key, value in setup.arguments.items())
            lines.append(f"optimizer = torch.optim.{setup.optimizer}({given}, {arguments})")
            given = "optimizer=optimizer"
        else:
            given = f"model_parameters={given}"
        return [*lines, f"engine = initialize(model, {setup.config!r}, {given})"]

    def script(self) -> str:
        """The whole program as a script; on two ranks, for torchrun."""
        lines = [
            "import os, tempfile",
            "import torch",
            "from redline import initialize",
            "from tests.plain_loop import Broken, Net, batch, mse",
            'rank, seen, folder = int(os.environ.get("RANK", 0)), [], tempfile.mkdtemp()',
            *self.beginning(),
        ]
        for operation in self.operations:
            lines += operation.lines(self.setup)
        return "\n".join(lines)

    def rehearse(self) -> bool:
        """Whether a script could be so; everything after a refusal is none of it."""
        loop = Loop(self.setup)
        try:
            for place, operation in enumerate(self.operations):
                loop.begin_operation()
                operation.apply(loop)
                if loop.must_refuse:
                    return place == len(self.operations) - 1
        except Impossible:
            return False
        return True


def generate(seed: int, ranks: int) -> Program:
    """The program of this seed."""
    return _Author(random.Random(seed * 2 + ranks)).write(ranks)


class _Author:
    """Writes a program: one operation after another, of those that make sense where the loop stands."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._number = 0

    def setup(self, ranks: int) -> Setup:
        rng = self._rng
        stage = rng.choice((0, 0, 1, 2, 3, 3) if ranks > 1 else (0, 0, 0, 1, 2, 3))
        frozen = rng.choice(((), (), (), ("branch",), ("trunk",), ("a",), ("trunk", "gain", "branch"), (LEFT_OUT,)))
        return Setup(
            ranks=ranks,
            stage=stage,
            precision=rng.choice(("fp32", "bf16")),
            accumulation=rng.choice((1, 1, 2, 3)),
            managed=rng.random() < 0.75,
            clipping=rng.choice((0.0, 0.3)),
            optimizer=rng.choice(("SGD", "AdamW")),
            groups=rng.random() < 0.3,
            own_optimizer=rng.random() < 0.4,
            frozen=frozen,
            seed_per_rank=ranks > 1 and rng.random() < 0.3,
            blocks=stage == 3 and rng.random() < 0.5,
        )

    def write(self, ranks: int) -> Program:
        setup = self.setup(ranks)
        operations: list[Operation] = []
        loop = Loop(setup)
        steps, length = self._rng.randint(2, 5), self._rng.randint(6, 24)
        while loop.steps < steps and len(operations) < length:
            operation = self._operation(loop)
            longer = Program(setup, (*operations, operation))
            state = _try(loop, operation)
            if state is None:
                continue
            loop = state
            operations = list(longer.operations)
            if loop.must_refuse:
                break
        if loop.pending and not loop.must_refuse:
            operations.append(Step())
        return Program(setup, tuple(operations))

    def _operation(self, loop: Loop) -> Operation:
        kinds: dict[Callable[[Loop], Operation], float]
        rare = 0.5
        if loop.pending:
            kinds = {
                self._step: 60, self._backward: 3, self._plain: rare, self._evaluate: 4, self._write: 4,
                self._freeze: 2, self._thaw: 2, self._clear: rare, self._flush: 3, self._save: 2, self._break: 1,
                self._boundary: 1,
            }  # fmt: skip
        else:
            kinds = {
                self._backward: 45, self._twice: 3, self._no_sync: 4, self._plain: 1.5, self._evaluate: 6,
                self._write: 9, self._freeze: 5, self._thaw: 5, self._only: 1.5,
                self._clear: rare if loop.accumulating else 4, self._flush: 3, self._uneven: 4, self._break: 4,
                self._boundary: 2, self._save: 4, self._load: 8 if loop.saved else 0, self._add_group: 3,
                self._add_head: 2,
            }  # fmt: skip
        if loop.plain:  # most scripts clear it
            kinds[self._clear] = 60
        (make,) = self._rng.choices(list(kinds), list(kinds.values()))
        return make(loop)

    def _loss(self, loop: Loop, *, plain: bool = False) -> Loss:
        rng = self._rng
        self._number += 1
        hows = ["engine"] * 5 + ["module"] * 2 + ["method"] * 2
        if not loop.setup.sharded:
            hows.append("weights")
        terms = []
        for _ in range(1 if rng.random() < 0.75 else 2):
            routes = [self._route(loop)] * loop.setup.ranks
            if rng.random() < 0.3 and not (loop.setup.blocks and loop.setup.sharded):
                routes = [self._route(loop) for _ in range(loop.setup.ranks)]
            terms.append((rng.choice(hows), tuple(routes)))
        return Loss(self._number, tuple(terms), 0.5 if rng.random() < 0.1 else 1.0)

    def _route(self, loop: Loop) -> tuple[str, ...]:
        rng = self._rng
        heads = rng.choice((("a",), ("b",), ("a", "b"), ("a", "b")))
        if rng.random() < 0.2:
            heads = (*heads, LEFT_OUT)
        if hasattr(loop.model, "new") and rng.random() < 0.6:
            heads = (*heads, "new")
        return ("branch", *heads) if rng.random() < 0.4 else heads

    def _backward(self, loop: Loop) -> Operation:
        scale = next(iter(loop.scalings)) if loop.scalings else self._rng.random() < 0.8
        if self._rng.random() < 0.05:
            scale = not scale
        return Backward(self._loss(loop), scale)

    def _twice(self, loop: Loop) -> Operation:
        return Twice(self._loss(loop))

    def _no_sync(self, loop: Loop) -> Operation:
        return NoSync(tuple(self._loss(loop) for _ in range(self._rng.choice((1, 2)))), self._loss(loop))

    def _plain(self, loop: Loop) -> Operation:
        return PlainBackward(self._loss(loop))

    def _step(self, loop: Loop) -> Operation:
        return Step()

    def _flush(self, loop: Loop) -> Operation:
        return Flush()

    def _uneven(self, loop: Loop) -> Operation:
        loss = self._loss(loop)
        self._number += 3
        return UnevenFlush(tuple(self._rng.choice((0, 1, 2)) for _ in range(loop.setup.ranks)), loss)

    def _break(self, loop: Loop) -> Operation:
        self._number += 1
        return Breaks(self._rng.choice(("forward", "backward")), self._number, self._route(loop), self._clearer())

    def _clear(self, loop: Loop) -> Operation:
        return Clear(self._clearer())

    def _clearer(self) -> str:
        return self._rng.choice(("engine", "engine.optimizer", "engine.module"))

    def _boundary(self, loop: Loop) -> Operation:
        return Boundary(self._rng.random() < 0.7 if loop.boundary is not False else True)

    def _modules(self, loop: Loop) -> tuple[str, ...]:
        known = [name for name in (*MODULES, "new") if hasattr(loop.model, name)]
        return tuple(self._rng.sample(known, self._rng.choice((1, 1, 2, 3))))

    def _freeze(self, loop: Loop) -> Operation:
        return RequiresGrad(self._modules(loop), False)

    def _thaw(self, loop: Loop) -> Operation:
        return RequiresGrad(self._modules(loop), True)

    def _only(self, loop: Loop) -> Operation:
        return OnlyHead(self._rng.choice(HEADS))

    def _add_group(self, loop: Loop) -> Operation:
        return AddGroup()

    def _add_head(self, loop: Loop) -> Operation:
        return AddHead()

    def _write(self, loop: Loop) -> Operation:
        kind = self._rng.choice(list(_WRITES))
        whole = kind not in _ON_MODULE or self._rng.random() < 0.2
        return Write(kind, "" if whole else self._rng.choice(MODULES))

    def _evaluate(self, loop: Loop) -> Operation:
        mode = self._rng.choice(("no_grad", "inference_mode"))
        return Evaluate(self._loss(loop), mode, ema=bool(loop.snapshot) and self._rng.random() < 0.5)

    def _save(self, loop: Loop) -> Operation:
        return Save(self._rng.choice(("one", "two")))

    def _load(self, loop: Loop) -> Operation:
        return Load(self._rng.choice(sorted(loop.saved)))


def _try(loop: Loop, operation: Operation) -> Loop | None:
    """The loop after an operation, or None where it can't be; the loop itself is then as it was."""
    after = copy.deepcopy(loop)
    after.begin_operation()
    try:
        operation.apply(after)
    except Impossible:
        return None
    return after


# -- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        kind: "right", "refused" (where it may), "wrong" or "crashed".
        why: the operation that was refused; what was wrong; the traceback.
        place: of the operation among the program's; -1 for making the engine.
    """

    kind: str
    why: str = ""
    place: int = 0

    @property
    def failed(self) -> bool:
        return self.kind in ("wrong", "crashed")

    @property
    def symptom(self) -> str:
        """What shorter programs must have in common with this one."""
        last = self.why.strip().splitlines()[-1] if self.why else ""
        known = ("the norm", "differs by", "weights differ", "evaluations", "went on", "not all ranks", "refused")
        return f"{self.kind} {next((word for word in known if word in last), last[:40])}"


class _Together:
    """The ranks that run a program tell each other what came of each operation."""

    def __init__(self, ranks: int) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if ranks > 1 else None
        self.rank = dist.get_rank() if ranks > 1 else 0

    def agree(self, own: Outcome, weights: str = "") -> Outcome:
        """What came of an operation on all ranks; where all is well, by one small collective.

        Args:
            own: on this rank.
            weights: what has to be the same on all ranks.
        """
        if self._group is None:
            return own
        digest = zlib.crc32(weights.encode())
        least = torch.tensor([own.kind == "right", digest, -digest], dtype=torch.int64)
        try:
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(f"the other rank hangs, while this one is {own.kind}: {own.why}") from error
        fine, least_digest, most_digest = least.tolist()
        if fine:
            return own if least_digest == -most_digest else replace(own, kind="wrong", why="the ranks' weights differ")
        every: list[Any] = [own] * dist.get_world_size()
        dist.all_gather_object(every, own, group=self._group)
        failed = [each for each in every if each.failed]
        if failed or all(each.kind == "refused" for each in every):
            first: Outcome = (failed or every)[0]
            return first
        said = "; ".join(f"rank {rank}: {each.kind} {each.why}" for rank, each in enumerate(every))
        return replace(own, kind="wrong", why=f"not all ranks refuse: {said}")


def run(program: Program, folder: Path, together: _Together | None = None) -> Outcome:
    """Run a program on the engine, as one of its ranks, and compare it with the hand-written loop."""
    together = together or _Together(1)
    loop = Loop(program.setup)
    space: dict[str, Any] = {
        "initialize": initialize, "Net": Net, "batch": batch, "mse": mse, "Broken": Broken, "torch": torch,
        "rank": together.rank, "seen": [], "folder": str(folder), "ema": {},
    }  # fmt: skip
    operations: list[Operation | None] = [None, *program.operations]
    for place, operation in enumerate(operations, -1):
        loop.begin_operation()
        steps = loop.steps
        if operation is not None:
            operation.apply(loop)
        lines = program.beginning() if operation is None else operation.lines(program.setup)
        outcome = together.agree(_executed(lines, place, space, loop))
        if outcome.kind != "right":
            return outcome
        engine = space["engine"]
        mine = weights_of(engine)
        why = _difference(mine, space["seen"], loop, together.rank)
        if why is None and loop.steps > steps:
            why = _difference_of_norm(engine.get_global_grad_norm(), loop)
        weights = "" if loop.setup.sharded else str({name: value.tolist() for name, value in mine.items()})
        outcome = together.agree(outcome if why is None else replace(outcome, kind="wrong", why=why), weights)
        if outcome.kind != "right":
            return outcome
    return Outcome("right")


def _executed(lines: list[str], place: int, space: dict[str, Any], loop: Loop) -> Outcome:
    """Run one operation's lines on the engine."""
    try:
        exec(compile("\n".join(lines), "<program>", "exec"), space)
    except EngineError as error:
        reason = loop.must_refuse or loop.may_refuse
        if reason:
            return Outcome("refused", reason, place)
        return Outcome("wrong", f"refused without a reason: {error}", place)
    except Exception:
        return Outcome("crashed", traceback.format_exc(limit=-6), place)
    if loop.must_refuse:
        return Outcome("wrong", f"went on after: {loop.must_refuse}", place)
    return Outcome("right", place=place)


def weights_of(engine: Any) -> dict[str, Tensor]:
    """The model's weights in full, in fp32; a collective at stage 3."""
    found = {}
    for name, param in engine.module.named_parameters():
        found[name] = (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().float()
    return found


def _tolerances(loop: Loop) -> tuple[float, float]:
    """Relative and absolute; in bf16 a last digit that is rounded otherwise moves what comes after it."""
    return (2e-2, 4e-3) if loop.setup.low else (1e-4, 2e-5)


def _difference(mine: dict[str, Tensor], seen: Sequence[float], loop: Loop, rank: int) -> str | None:
    """How the engine's weights and evaluations differ from the loop's; None where they agree."""
    relative, absolute = _tolerances(loop)
    params = loop.params
    if set(mine) != set(params):
        return f"the model has {sorted(mine)} instead of {sorted(params)}"
    faults = []
    for name, value in mine.items():
        want = params[name].detach().float()
        if not torch.allclose(value, want, relative, absolute):
            gap = (value - want).abs().max().item()
            faults.append(f"{name} differs by {gap:.2g} of {want.abs().max().item():.2g}")
    if faults:
        return f"after step {loop.steps}: {'; '.join(faults)}"
    want_seen = loop.seen[rank]
    if len(seen) != len(want_seen) or any(abs(a - b) > relative * abs(b) + absolute for a, b in zip(seen, want_seen)):
        return f"evaluations gave {seen} instead of {want_seen}"
    return None


def _difference_of_norm(norm: float | None, loop: Loop) -> str | None:
    assert loop.norm is not None
    if norm is not None and abs(norm - loop.norm) <= _tolerances(loop)[0] * loop.norm + 1e-6:
        return None
    return f"after step {loop.steps}: the norm is {norm} instead of {loop.norm}"


def run_alone(programs: Sequence[Program]) -> Iterator[Outcome]:
    """Run programs of one rank in this process."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for place, program in enumerate(programs):
            yield run(program, Path(folder) / str(place))


class _quiet:
    """The engine's lines about progress and what it warns of are no part of the comparison."""

    def __enter__(self) -> None:
        self._log = logging.getLogger("redline")
        self._level, self._log.disabled = self._log.level, True

    def __exit__(self, *_: object) -> None:
        self._log.disabled = False


def _rank(programs: Sequence[Program], folder: str) -> None:
    """One of the processes that run programs together; what came of each goes to a file."""
    warnings.simplefilter("ignore")  # other tests see to them; one on one rank would end the other's collective
    dist.init_process_group("gloo", timeout=2 * _PATIENCE)
    try:
        together = _Together(2)
        with _quiet(), open(Path(folder) / f"outcomes{os.environ['RANK']}", "w") as outcomes:
            for place, program in enumerate(programs):
                outcome = run(program, Path(folder) / str(place), together)
                print(json.dumps([outcome.kind, outcome.why, outcome.place]), file=outcomes, flush=True)
    finally:
        dist.destroy_process_group()


def run_together(programs: Sequence[Program]) -> Iterator[Outcome]:
    """Run programs of two ranks in two processes, one after another; a hang or a death ends only its own program."""
    left = list(programs)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            failure = ""
            try:
                run_ranks(_rank, 2, left, folder, timeout=120 + 60 * len(left))
            except RanksFailed as error:
                failure = str(error)
            path = Path(folder) / "outcomes0"
            done = [Outcome(*json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
            yield from done
            left = left[len(done) :]
            if failure and left:
                yield Outcome("crashed", f"a rank hangs or has died: {failure}")
                left = left[1:]


# -- shrinking -----------------------------------------------------------------------------------


def shrink(program: Program, symptom: str, *, seconds: float = 60.0) -> tuple[Program, Outcome | None]:
    """A shorter program with the same symptom, by leaving out and simplifying, and what comes of it."""
    runner = run_alone if program.setup.ranks == 1 else run_together
    found: Outcome | None = None
    end = time.monotonic() + seconds
    again = True
    while again:
        again = False
        for smaller in _smaller(program):
            if time.monotonic() > end:
                return program, found
            if not smaller.rehearse():
                continue
            (outcome,) = runner([smaller])
            if outcome.failed and outcome.symptom == symptom:
                program, found, again = smaller, outcome, True
                break
    return program, found


def _smaller(program: Program) -> Iterator[Program]:
    operations, setup = program.operations, program.setup
    size = len(operations) // 2
    while size:
        for start in range(0, len(operations), size):
            yield replace(program, operations=(*operations[:start], *operations[start + size :]))
        size //= 2
    plain = Setup(ranks=setup.ranks)
    for name in (
        "frozen", "groups", "own_optimizer", "clipping", "precision", "accumulation", "managed", "seed_per_rank",
        "blocks", "optimizer", "stage",
    ):  # fmt: skip
        if getattr(setup, name) != getattr(plain, name):
            yield replace(program, setup=replace(setup, **{name: getattr(plain, name)}))
    for place, operation in enumerate(operations):
        loss = getattr(operation, "loss", None)
        if isinstance(loss, Loss):
            simple = [
                replace(loss, terms=(("engine", (("a",),) * setup.ranks),), factor=1.0),
                replace(loss, terms=loss.terms[:1], factor=1.0),
                replace(loss, terms=tuple(("engine", routes) for _, routes in loss.terms)),
            ]
            for each in simple:
                if each != loss:
                    changed = replace(operation, loss=each)  # type: ignore[type-var]
                    yield replace(program, operations=(*operations[:place], changed, *operations[place + 1 :]))


def report(seed: int, program: Program, outcome: Outcome, *, shorten: bool = True) -> str:
    """A failure as text: what is wrong, and the program as a script, made as short as may be."""
    shorter, again = shrink(program, outcome.symptom) if shorten else (program, None)
    return (
        f"program {seed} on {program.setup.ranks} rank(s): {outcome.kind}: {outcome.why}\n\n{shorter.script()}\n\n"
        f"# {shorter.setup}\n" + (f"# {again.kind}: {again.why}\n" if again is not None else "")
    )


# -- the command ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Run random training programs on the engine and compare.")
    parser.add_argument("--count", type=int, default=200, help="number of programs")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the others follow it")
    parser.add_argument("--seeds", type=int, nargs="+", help="these programs only")
    parser.add_argument("--show", type=int, default=3, help="failures to print, made as short as may be")
    parser.add_argument("--only", default="", help="show only failures whose description contains this")
    arguments = parser.parse_args()
    seeds = arguments.seeds or range(arguments.seed, arguments.seed + arguments.count)
    programs = [generate(seed, arguments.ranks) for seed in seeds]
    counts: Counter[str] = Counter()
    failures = []
    for seed, program, outcome in zip(seeds, programs, (run_alone if arguments.ranks == 1 else run_together)(programs)):
        counts[outcome.kind if outcome.kind != "refused" else f"refused: {outcome.why}"] += 1
        if outcome.failed:
            failures.append((seed, program, outcome))
            print(f"{seed}: {outcome.kind}: {outcome.why.strip().splitlines()[-1]}", flush=True)
    for seed, program, outcome in [each for each in failures if arguments.only in each[2].why][: arguments.show]:
        print("\n" + report(seed, program, outcome))
    print(f"\n{len(programs)} programs on {arguments.ranks} rank(s), from seed {seeds[0]}")
    for kind, count in sorted(counts.items()):
        print(f"{count:6d} {kind}")


if __name__ == "__main__":
    main()
