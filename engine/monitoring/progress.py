"""What a training run prints: progress lines, memory, a bar, the config in force.

The only place in a training run that waits for the device to print something.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from redline.callbacks import Callback
from redline.console import ProgressBar
from redline.device import HostCopy
from redline.engine import Engine
from redline.log import log

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["ProgressLine", "TrainingBar", "log_config", "memory_line"]

_SECRETS = ("comet.api_key",)


class ProgressLine(Callback):
    """Prints one line every ``engine.steps_per_print`` steps, on rank 0.

    The loss is that of the step which the line counts, the mean over its micro-batches and all ranks; learning rate,
    momentum and norm are those it ran with. ``samples/s`` is over all ranks and wall-clock time since the last line,
    the script's own time included.

    Attributes:
        below: further lines. Each is called with the engine and the steps and seconds since the last line, and may
            return "".
    """

    def __init__(self, *, throughput: bool = True) -> None:
        self.below: list[Callable[[Engine, int, float], str]] = []
        self._throughput = throughput
        self._start: float | None = None
        self._steps = 0  # since then; an own count, since the engine's jumps when a checkpoint is loaded

    def on_step(self, engine: Engine) -> None:
        self._steps += 1
        every = engine.steps_per_print or 0
        is_due = every > 0 and engine.global_steps % every == 0
        if is_due:
            self._print(engine)
        # The first step only starts the clock: it allocates, compiles and tunes kernels.
        if is_due or self._start is None:
            self._start, self._steps = time.perf_counter(), 0

    def _print(self, engine: Engine) -> None:
        assert engine.loss is not None
        values: dict[str, Any] = {
            "step": engine.global_steps,
            "skipped": engine.skipped_steps,
            "loss": engine.world.mean(engine.loss),  # on every rank: it is a collective
            "lr": engine.get_lr(),
            "mom": engine.get_mom(),
        }
        if engine.grad_norm is not None:
            values["norm"] = engine.grad_norm
        if engine.loss_scale is not None:
            values["loss_scale"] = engine.loss_scale
        text = ", ".join(f"{name}={_format(value)}" for name, value in values.items())
        # After the loss was read, when the device has done all steps.
        steps, seconds = (0, 0.0) if self._start is None else (self._steps, time.perf_counter() - self._start)
        if self._throughput and steps:
            text += f", samples/s={steps * engine.train_batch_size() / seconds:.0f}"
        log.info("%s", text)
        for further in self.below:
            if text := further(engine, steps, seconds):
                log.info("  %s", text)


def _format(value: Any) -> str:
    """A number to six digits; lists of numbers, one for each parameter group, likewise.

    >>> _format([1 / 3, (1e-9, None)])
    '[0.333333, [1e-09, None]]'
    """
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_format, value)) + "]"
    return str(value) if value is None or isinstance(value, int) else f"{float(value):.6g}"


def memory_line(device: torch.device) -> str:
    """Memory now and at most so far: on CUDA the allocator's, elsewhere the resident set of this process."""
    sizes: dict[str, float] = {}
    if device.type == "cuda":
        sizes = {
            "allocated": torch.cuda.memory_allocated(device),
            "peak": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
        }
    elif sys.platform != "win32":
        import resource  # POSIX only

        if (statm := Path("/proc/self/statm")).exists():
            sizes["resident"] = int(statm.read_text().split()[1]) * resource.getpagesize()
        # ru_maxrss is in bytes on macOS and in KiB on Linux.
        unit = 1 if sys.platform == "darwin" else 1024
        sizes["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return "memory (GiB): " + ", ".join(f"{name}={size / 1024**3:.2f}" for name, size in sizes.items())


class TrainingBar(Callback):
    """A bar on rank 0: for each pass over ``engine.training_dataloader``, or over the steps of any other loop.

    It shows learning rate, this rank's last loss and the samples per second of all ranks. A script that shows a bar of
    tqdm's has no second one.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._in_pass = False  # over the training_dataloader
        self._steps: ProgressBar | None = None  # of another loop
        self._last_loss: Tensor | None = None
        self._arriving: HostCopy | None = None  # loss and lr on their way from the device
        self._values = ""
        self._since: tuple[float, int] | None = None  # time and samples when the values were last shown
        engine.loader_wrappers.append(self._show)

    def on_step(self, engine: Engine) -> None:
        self._last_loss = engine.loss
        if self._in_pass or _shows_tqdm():
            return
        if self._steps is None or not self._steps.is_open:
            self._since = None
            done = 0 if self._steps is None else self._steps.done
            self._steps = ProgressBar(None, show=True, background=True)
            self._steps.done = done
        self._steps.advance(1, "training", self._describe)

    def _show(self, batches: Iterator[Any]) -> Iterator[Any]:
        """A pass over the loader with its bar."""
        if self not in self._engine.callbacks:  # a range test, which has a bar of its own
            yield from batches
            return
        loader = self._engine.training_dataloader
        assert loader is not None
        self._in_pass, self._since = True, None
        try:
            with ProgressBar(loader.num_batches(), unit="batch", show=not _shows_tqdm()) as bar:
                for batch in batches:
                    yield batch
                    bar.advance(1, f"epoch {loader.epoch + 1}", self._describe)
        finally:
            self._in_pass = False

    def _describe(self) -> str:
        """Learning rate, loss and speed, without waiting for the device: the loss may be an earlier step's."""
        optimizer = self._engine.optimizer
        if self._arriving is None and self._last_loss is not None and optimizer is not None:
            lr = optimizer.param_groups[0]["lr"]  # None of an optimizer that finds its own
            self._arriving = HostCopy(self._last_loss.reshape(()), *([] if lr is None else [lr]))
        if self._arriving is not None and self._arriving.has_arrived():
            (loss, *lrs), self._arriving = self._arriving.read(), None
            now, samples = time.perf_counter(), self._engine.global_samples
            if self._since is None or samples > self._since[1]:  # else this was shown already
                self._values = ", ".join([*(f"lr {lr:.4g}" for lr in lrs), f"loss {loss:.4g}"])
                if self._since is not None:
                    self._values += f", {(samples - self._since[1]) / (now - self._since[0]):.0f} samples/s"
                self._since = now, samples
        return self._values


def _shows_tqdm() -> bool:
    """Whether a bar of tqdm's is open."""
    tqdm = sys.modules.get("tqdm")
    return tqdm is not None and len(getattr(tqdm.tqdm, "_instances", ())) > 0


def log_config(config: EngineConfig) -> None:
    """`dump_state`: print every value of a config with its origin: given, derived, auto, or default; but no secret."""
    from redline.config import effective  # here: a run that prints nothing does not need it

    values = dict(effective(config))
    width = max(map(len, values))
    lines = [
        f"  {path:<{width}}  {'*** (given)' if path in _SECRETS and value.value else value}"
        for path, value in values.items()
    ]
    log.info("%s", "\n".join([f"config in force: {config.as_written().source}", *lines]))
