"""What an engine is made of: `build` makes the parts, `engine` drives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from engine.data import Loader
from engine.distributed import World
from engine.parallel import Parallel
from engine.precision import Precision
from engine.schedule_state import ScheduleStart

if TYPE_CHECKING:
    from engine.config import EngineConfig

__all__ = ["Parts", "Recorder", "Schedule"]


class Schedule(Protocol):
    """What the engine needs of a learning rate schedule; torch's and ours are such."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Recorder(Protocol):
    """What is told of every update: its index, the rate it ran at, its loss, and later whether it was skipped."""

    def record(self, step: int, lr: float, loss: Tensor) -> None: ...
    def skip(self, step: int) -> None: ...
    def record_validation(self, step: int, loss: Tensor | float) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """All that an engine is made of."""

    config: EngineConfig
    world: World
    module: nn.Module
    precision: Precision
    parallel: Parallel
    optimizer: Optimizer | None
    lr_scheduler: Schedule | None
    schedule_start: ScheduleStart | None  # None without an optimizer
    training_dataloader: Loader | None
    recorder: Recorder | None
