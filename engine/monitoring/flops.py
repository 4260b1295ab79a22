"""`flops_profiler`: the FLOPs of one optimizer step, counted by torch module by module, and how fast they ran.

Step `profile_step`, counted from 0, runs under `torch.utils.flop_counter.FlopCounterMode`, which slows it down; the
next one is timed. As in torch, what has no matrix product, convolution or attention in it counts as 0. DeepSpeed counts
the forward and takes twice that for the backward; here both are counted.
"""

from __future__ import annotations

import atexit
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.flop_counter import FlopCounterMode

from redline.callbacks import Callback
from redline.console import rows_as_text
from redline.engine import Engine
from redline.log import log
from redline.monitoring.timing import Stopwatch, wrap_calls

if TYPE_CHECKING:
    from redline.config.sections import FlopsProfilerConfig

__all__ = ["FlopsProfiler"]


class FlopsProfiler(Callback):
    """Counts one step, times the next, reports once.

    Attributes:
        flops: of the forwards ("fwd") and of the backwards ("bwd"), forwards that these recompute included.
    """

    def __init__(self, engine: Engine, config: FlopsProfilerConfig) -> None:
        self.flops = {"fwd": 0, "bwd": 0}
        self._engine, self._config = engine, config
        self._counter: FlopCounterMode | None = None
        self._by_module: dict[str, int] = {}  # as the counter names them
        self._stopwatch = Stopwatch(engine.device)
        self._steps_left = 2  # one to count, one to time
        wrap_calls(engine, self, self._observe)

    def on_step(self, engine: Engine) -> None:
        if self._steps_left == 1:
            self._stopwatch.end("step")
            self._report()
        elif self._steps_left == 2 and self._by_module:
            self._steps_left = 1
            atexit.register(self._report)  # without times, if there is no other step

    def _observe(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._steps_left == 1:
            return self._stopwatch.measure(name, call, *args, **kwargs)
        if self._steps_left == 2 and self._engine.global_steps == self._config.profile_step:
            return self._count(name, call, *args, **kwargs)
        return call(*args, **kwargs)

    def _count(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == "step":
            if self._counter is not None and self._engine.is_gradient_accumulation_boundary():
                self._by_module = {key: sum(ops.values()) for key, ops in self._counter.get_flop_counts().items()}
                self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self._counter = None
            return call(*args, **kwargs)
        if self._counter is None:
            # Open until the step's last backward: hooks that the forward has set tell which module an operation of
            # the backward belongs to.
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]
        before = self._counter.get_total_flops()
        try:
            return call(*args, **kwargs)
        finally:
            self.flops[name] += self._counter.get_total_flops() - before

    def modules(self) -> dict[str, int]:
        """FLOPs of each module, submodules included, by its path in the model; "" is the model."""
        # The counter names a module after the class of the outermost one that it saw.
        roots = (type(self._engine.module).__name__, "DistributedDataParallel.module", "Engine.module")
        counts: dict[str, int] = defaultdict(int)
        for key, count in self._by_module.items():
            root = next((root for root in roots if key == root or key.startswith(f"{root}.")), None)
            if root is not None:
                counts[key[len(root) + 1 :]] += count
        return {name: counts[name] for name, _ in self._engine.module.named_modules()}

    # -- the report --------------------------------------------------------------------------------

    def _report(self) -> None:
        self._steps_left = 0
        atexit.unregister(self._report)
        text = "\n".join([*self._sums(), *self._tables()])
        if self._config.output_file is None:
            log.info("%s", text)
            return
        path = Path(self._config.output_file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
            log.info("flops_profiler: written to %s", path)
        except OSError as error:  # no reason to end a training run
            log.warning("flops_profiler: could not write %s: %s", path, error.strerror or error)

    def _sums(self) -> Iterator[str]:
        engine, config, total = self._engine, self._config, sum(self.flops.values())
        ms = {name: span.ms for name, span in self._stopwatch.totals().items()}  # empty if no step was timed

        def row(name: str, flops: float, ms: float | None) -> tuple[str, ...]:
            return name, _with_unit(flops), *((f"{ms:.2f}", _with_unit(flops / ms * 1e3)) if ms else ("-", "-"))

        rows = [row("forward", self.flops["fwd"], ms.get("fwd")), row("backward", self.flops["bwd"], ms.get("bwd"))]
        if ms:
            rows.append(("step", "", f"{ms.get('step', 0.0):.2f}", ""))
        rows.append(row("total", total, sum(ms.values())))
        if recomputed := config.recompute_fwd_factor * self.flops["fwd"]:
            rows.append(row("without recomputed forwards", total - recomputed, sum(ms.values())))
        samples = f"{engine.gradient_accumulation_steps()} x {engine.train_micro_batch_size_per_gpu()} samples"
        yield f"FLOPs of step {config.profile_step + 1} on rank 0: {samples}"
        yield from rows_as_text(rows, ("", "FLOPs", "ms", "FLOPS/s"), numbers=True)

    def _tables(self) -> Iterator[str]:
        """The largest modules of each depth, and, if `detailed`, the tree of modules."""
        config, counts, total = self._config, self.modules(), max(1, sum(self.flops.values()))
        depths = {name: name.count(".") + 1 if name else 0 for name in counts}
        deepest = max(depths.values()) if config.module_depth < 0 else config.module_depth
        titles, rows = {}, []
        for name, module in self._engine.module.named_modules():
            kind, share = type(module).__name__, f"{100 * counts[name] / total:.1f} %"
            titles[name] = f"{name} ({kind}) {share}"
            if depths[name] <= deepest:
                label = "  " * depths[name] + f"{name.rpartition('.')[2] or 'model'} ({kind})"
                size = sum(param.numel() for param in module.parameters())
                rows.append((label, _with_unit(size), _with_unit(counts[name]), share))
        for level in range(1, deepest + 1):
            largest = sorted((name for name in titles if depths[name] == level), key=lambda name: -counts[name])
            if shown := [titles[name] for name in largest[: config.top_modules]]:
                yield f"  most at depth {level}: {', '.join(shown)}"
        if config.detailed:
            yield from rows_as_text(rows, ("module", "parameters", "FLOPs", "share"), numbers=True)


def _with_unit(number: float) -> str:
    """A number to four digits with its unit: 1.234 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"
