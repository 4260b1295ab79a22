"""`flops_profiler`: the operations of one update, counted by torch module by module, and how fast they ran.

Update `profile_step` (so many are done before it) is counted under `torch.utils.flop_counter.FlopCounterMode`, which
slows it down; the next one is timed. What has no matrix product, convolution or attention in it counts as nothing, as
in torch. DeepSpeed counts the forward and takes twice that for the backward; here both are counted.
"""

from __future__ import annotations

import atexit
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.engine import Engine
from engine.log import log
from engine.watch.stopwatch import Stopwatch
from engine.watch.table import table
from engine.watch.timings import surround

if TYPE_CHECKING:
    from engine.config.sections.records import FlopsProfilerConfig

__all__ = ["FlopsProfiler", "ModuleFlops", "Profile"]


class ModuleFlops(NamedTuple):
    """One module in a profile.

    Attributes:
        name: its path in the model; "" for the model.
        kind: its class.
        parameters: elements of its parameters, those of modules in it included.
        flops: operations in the update, forward and backward.
    """

    name: str
    kind: str
    parameters: int
    flops: int

    @property
    def depth(self) -> int:
        return self.name.count(".") + 1 if self.name else 0


class Profile(NamedTuple):
    """What one update comes to on one process.

    Attributes:
        step: the updates that were done before the one that was counted.
        micro_batch: samples of one forward.
        micro_batches: forwards of the update.
        forward: operations of the forwards.
        backward: operations of the backwards, forwards that they repeat included.
        ms: time of fwd, bwd and step, in the next update; empty if there was none.
        modules: the model and all modules in it.
    """

    step: int
    micro_batch: int
    micro_batches: int
    forward: int
    backward: int
    ms: dict[str, float]
    modules: list[ModuleFlops]


class FlopsProfiler:
    """Counts one update, times the next, reports once."""

    def __init__(self, engine: Engine, config: FlopsProfilerConfig) -> None:
        self._engine = engine
        self._config = config
        self._counter: FlopCounterMode | None = None
        self._counts: dict[str, int] = {}
        self._flops = {"fwd": 0, "bwd": 0}
        self._watch = Stopwatch()
        self._left = 2  # updates to look at: one to count, one to time
        surround(engine, self._profiled)

    def updated(self, engine: Engine) -> None:
        if self._left == 1:
            self._watch.end("step", engine.device)
            self._report()
        elif self._left == 2 and self._counts:
            self._left = 1
            atexit.register(self._report)  # without times, if there is no other update

    def _profiled(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        engine = self._engine

        def profiled(*args: Any, **kwargs: Any) -> Any:
            if self._left == 1:
                return self._timed(name, call, *args, **kwargs)
            if self._left == 2 and engine.global_steps == self._config.profile_step:
                return self._counted(name, call, *args, **kwargs)
            return call(*args, **kwargs)

        return profiled

    def _counted(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == "step":
            if self._counter is not None and self._engine.is_gradient_accumulation_boundary():
                self._counts = {key: sum(ops.values()) for key, ops in self._counter.get_flop_counts().items()}
                self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self._counter = None
            return call(*args, **kwargs)
        if self._counter is None:
            # Open until the update's last backward: which module an operation of the backward belongs to is known
            # from hooks that the forward has laid.
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]
        before = self._counter.get_total_flops()
        try:
            return call(*args, **kwargs)
        finally:
            self._flops[name] += self._counter.get_total_flops() - before

    def _timed(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._watch.begin(name, self._engine.device)
        try:
            return call(*args, **kwargs)
        finally:
            self._watch.end(name, self._engine.device)

    def _report(self) -> None:
        self._left = 0
        atexit.unregister(self._report)
        text = report(self._profile(), self._config)
        if self._config.output_file is None:
            log.info("%s", text)
            return
        path = Path(self._config.output_file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
            log.info("flops_profiler: written to %s", path)
        except OSError as error:  # no reason to end a training
            log.warning("flops_profiler: could not write %s: %s", path, error.strerror or error)

    def _profile(self) -> Profile:
        return Profile(
            self._config.profile_step,
            self._engine.train_micro_batch_size_per_gpu(),
            self._engine.gradient_accumulation_steps(),
            self._flops["fwd"],
            self._flops["bwd"],
            {str(name): span.ms for name, span in self._watch.totals().items()},
            list(_modules(self._engine.module, self._counts)),
        )


def _modules(module: nn.Module, counts: dict[str, int]) -> Iterator[ModuleFlops]:
    """Each module with its count; torch names it after the class that it was first seen under."""
    roots = (type(module).__name__, "DistributedDataParallel.module", "Engine.module")
    flops: dict[str, int] = defaultdict(int)
    for key, count in counts.items():
        for root in roots:
            if key == root or key.startswith(f"{root}."):
                flops[key[len(root) + 1 :]] += count
                break
    for name, each in module.named_modules():
        parameters = sum(parameter.numel() for parameter in each.parameters())
        yield ModuleFlops(name, type(each).__name__, parameters, flops[name])


# -- the report ------------------------------------------------------------------------------------------


def report(profile: Profile, config: FlopsProfilerConfig) -> str:
    """A profile as text: the sums, the largest modules of each depth, and, if `detailed`, the tree of modules."""
    deepest = max(each.depth for each in profile.modules)
    depth = deepest if config.module_depth < 0 else min(config.module_depth, deepest)
    lines = [
        f"FLOPs of update {profile.step + 1} on process 0: {profile.micro_batches} x {profile.micro_batch} samples",
        *table(("", "FLOPs", "ms", "FLOPS/s"), list(_sums(profile, config.recompute_fwd_factor))),
        *_largest(profile, depth, config.top_modules),
    ]
    if config.detailed:
        total = max(1, profile.forward + profile.backward)
        rows = [
            ("  " * each.depth + f"{each.name.rpartition('.')[2] or 'model'} ({each.kind})",
             _short(each.parameters), _short(each.flops), f"{100 * each.flops / total:.1f} %")
            for each in profile.modules if each.depth <= depth
        ]  # fmt: skip
        lines += table(("module", "parameters", "FLOPs", "share"), rows)
    return "\n".join(lines)


def _sums(profile: Profile, repeated: float) -> Iterator[tuple[str, ...]]:
    def row(name: str, flops: float, ms: float | None) -> tuple[str, ...]:
        timed = ("-", "-") if not ms else (f"{ms:.2f}", _short(flops / ms * 1e3))
        return name, _short(flops), *timed

    total = profile.forward + profile.backward
    whole = sum(profile.ms.values()) or None
    yield row("forward", profile.forward, profile.ms.get("fwd"))
    yield row("backward", profile.backward, profile.ms.get("bwd"))
    if profile.ms:
        yield "step", "", f"{profile.ms.get('step', 0.0):.2f}", ""
    yield row("update", total, whole)
    if repeated:
        yield row("without repeated forwards", total - repeated * profile.forward, whole)


def _largest(profile: Profile, depth: int, count: int) -> Iterator[str]:
    total = max(1, profile.forward + profile.backward)
    for level in range(1, depth + 1):
        found = sorted((each for each in profile.modules if each.depth == level), key=lambda each: -each.flops)
        named = ", ".join(f"{each.name} ({each.kind}) {100 * each.flops / total:.1f} %" for each in found[:count])
        if named:
            yield f"  most at depth {level}: {named}"


def _short(number: float) -> str:
    """A count to four digits with its unit: 1.234 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"
