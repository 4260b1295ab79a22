"""What a tuning has spent so far, the notes of the run under way, and the progress that people see."""

from __future__ import annotations

import time

from engine.distributed import World
from engine.log import log
from engine.range_test.curve import Curve
from engine.range_test.progress import Progress
from engine.range_test.rig import Run
from engine.tuning.plan import cost_of
from engine.tuning.stop import Stop

__all__ = ["Meter"]


class Meter(Progress):
    """Progress over a whole tuning, which also counts what it costs and looks for the wish to stop.

    Args:
        total: the budget, in updates of the config's batch size.
        batch_size: samples of one of these.
        show: as in :class:`Progress`; False on all ranks but one.
        stop: the wish.
    """

    def __init__(self, total: int, batch_size: int, show: bool | None, stop: Stop) -> None:
        super().__init__(total, show)
        self.updates = 0  # made, at whatever batch size
        self._batch_size = batch_size
        self._stop = stop
        self._world: World | None = None
        self._run: Run | None = None
        self._notes: list[tuple[float, float]] = []
        self._closed = 0  # cost of the runs before this one
        self._stage = ""
        self._start = time.monotonic()
        self._told = 0

    @property
    def spent(self) -> int:
        """Cost so far, in updates of the config's batch size."""
        return self._closed + self._cost()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def begin(self, stage: str, run: Run, world: World) -> None:
        """A run is about to be made."""
        self._stage, self._run, self._world = stage, run, world

    def end(self) -> None:
        """The run is whole, and whoever made it has its record."""
        self._closed += self._cost()
        self._run, self._notes = None, []

    def update(self, run: str, step: int, lr: float, loss: float) -> None:
        """One update is done; ends the tuning if a signal has asked for it."""
        before = self.spent
        self.updates += 1
        self._notes.append((lr, loss))
        self._show(f"{self._stage} {run}", self.spent - before, step, lr, loss)
        self.look()

    def look(self) -> None:
        """End the tuning if a signal has asked for it."""
        assert self._world is not None
        self._stop.look(self._world)

    def skip(self, steps: int) -> None:
        """These updates will not come; the stages after have them."""

    def partial(self) -> Curve | None:
        """The run under way as far as it has come; None if there is nothing of it."""
        run = self._run
        if run is None or not self._notes:
            return None
        lrs, losses = zip(*self._notes)
        return Curve(
            f"{run.name} (broken off)",
            run.rate,
            tuple(range(len(lrs))),
            lrs,
            losses,
            kind=run.kind,
            seed=run.seed,
            train_batch_size=run.train_batch_size,
            settings=tuple(run.settings.items()),
        )

    def _cost(self) -> int:
        size = self._batch_size if self._run is None else self._run.train_batch_size or self._batch_size
        return cost_of(len(self._notes), size, self._batch_size)

    def _show(self, what: str, cost: int, step: int, lr: float, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_description(what, refresh=False)
            self._bar.set_postfix_str(f"lr {lr:.3g}, loss {loss:.4g}", refresh=False)
            self._bar.update(cost)
        elif self._lines and self.spent - self._told >= max(1, self._total // 10):
            self._told = self.spent
            left = self.seconds / self.spent * max(0, self._total - self.spent)
            log.info(
                "%3.0f%%  %s, step %d, lr %.3g, loss %.4g; about %s left",
                100 * self.spent / self._total, what, step, lr, loss, _duration(left),
            )  # fmt: skip


def _duration(seconds: float) -> str:
    """As people say it.

    >>> _duration(7.4), _duration(200), _duration(9000)
    ('7 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
