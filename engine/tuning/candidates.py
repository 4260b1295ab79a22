"""The schedules that are tried, each as the `scheduler` section that a config would have.

One function makes the section for a trial of fifty updates and for the training of fifty thousand, so that what was
tried is what is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.range_test.curve import Kind
from engine.range_test.suggestion import Suggestion

__all__ = ["PREFERENCE", "Candidate", "Schedule", "candidates_of"]

Schedule = Literal["OneCycle", "WarmupDecayLR", "fixed"]

# Which schedule wins a tie, first to last.
PREFERENCE: tuple[Schedule, ...] = ("WarmupDecayLR", "OneCycle", "fixed")

WARMUP_SHARE = 0.02  # of a linear decay's updates
FIXED_SHARES = (0.3, 1.0)  # fixed rates that are tried, as shares of the suggested maximum
NEAR = 1.5  # a fixed rate within this factor of another one is not tried again

KINDS: dict[Schedule, Kind] = {"OneCycle": "cycle", "WarmupDecayLR": "decay", "fixed": "fixed"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule to train with.

    Attributes:
        schedule: its name in a config, or "fixed".
        lr: its highest rate (first parameter group).
        why: where the rate comes from, in a sentence.
        suggestion: what the tests say, for the shape of a cycle.
    """

    schedule: Schedule
    lr: float
    why: str
    suggestion: Suggestion

    @property
    def name(self) -> str:
        return f"{self.schedule} {self.lr:g}"

    @property
    def kind(self) -> Kind:
        return KINDS[self.schedule]

    def section(self, steps: int, ratios: Sequence[float] = (1.0,)) -> dict[str, Any] | None:
        """The `scheduler` section for a training of `steps` updates; None for a fixed rate.

        Args:
            steps: at least 2.
            ratios: each group's rate as a multiple of the first one's.
        """
        if self.schedule == "fixed":
            return None
        if self.schedule == "OneCycle":
            first = min(steps - 1, max(1, round(self._rising_share * steps)))
            params: dict[str, Any] = {
                "cycle_min_lr": _per_group(self._cycle_min_lr, ratios),
                "cycle_max_lr": _per_group(self.lr, ratios),
                "cycle_first_step_size": first,
                "cycle_second_step_size": steps - first,
            }
        else:
            params = {
                "warmup_min_lr": 0.0,
                "warmup_max_lr": _per_group(self.lr, ratios),
                "warmup_num_steps": min(steps, max(2, round(WARMUP_SHARE * steps))),
                "warmup_type": "linear",
                "total_num_steps": steps,
            }
        return {"type": self.schedule, "params": params}

    def reasons(self, steps: int) -> dict[str, str]:
        """A sentence for each number of `section`."""
        if self.schedule == "fixed":
            return {"lr": self.why}
        if self.schedule == "OneCycle":
            return self._reasons_of_cycle(steps)
        return {
            "warmup_max_lr": self.why,
            "warmup_num_steps": f"{WARMUP_SHARE:.0%} of {steps} planned updates, 2 at the least.",
            "total_num_steps": "The planned updates: the rate is zero at the end.",
        }

    def _reasons_of_cycle(self, steps: int) -> dict[str, str]:
        suggestion = self.suggestion
        reasons = {key: why for key, why in suggestion.reasons.items() if key in suggestion.params()}
        if self.lr != suggestion.cycle_max_lr:
            reasons["cycle_min_lr"] = (
                f"As far below the maximum as {suggestion.cycle_min_lr:g} is below {suggestion.cycle_max_lr:g}, as the "
                "tests suggest."
            )
        if steps != suggestion.cycle_first_step_size + suggestion.cycle_second_step_size:
            reasons["cycle_first_step_size"] = f"{self._rising_share:.0%} of {steps} updates, as the tests suggest."
            reasons["cycle_second_step_size"] = f"The rest of {steps} updates: the run ends at the minimum."
        return reasons | {"cycle_max_lr": self.why}

    @property
    def _cycle_min_lr(self) -> float:
        # A peak that was lowered for another batch keeps its distance from the foot.
        return float(f"{self.suggestion.cycle_min_lr * self.lr / self.suggestion.cycle_max_lr:.2g}")

    @property
    def _rising_share(self) -> float:
        first = self.suggestion.cycle_first_step_size
        return first / (first + self.suggestion.cycle_second_step_size)


def candidates_of(suggestion: Suggestion, own_lr: float | None) -> list[Candidate]:
    """What is worth a trial, the most promising first.

    Args:
        suggestion: the tests'.
        own_lr: the rate that the config names; None if it names none.
    """
    cycle = Candidate("OneCycle", suggestion.cycle_max_lr, suggestion.reasons.get("cycle_max_lr", ""), suggestion)
    found = [Candidate("WarmupDecayLR", suggestion.cycle_max_lr, cycle.why, suggestion), cycle]
    if own_lr is not None:
        found.append(Candidate("fixed", own_lr, "The rate that the config names.", suggestion))
    for share in FIXED_SHARES:
        lr = float(f"{share * suggestion.cycle_max_lr:.2g}")
        if not any(lr / NEAR <= other.lr <= lr * NEAR for other in found if other.schedule == "fixed"):
            found.append(Candidate("fixed", lr, f"{share:g} times the maximum that the tests suggest.", suggestion))
    return found


def _per_group(lr: float, ratios: Sequence[float]) -> float | list[float]:
    if all(ratio == 1 for ratio in ratios):
        return lr
    return [float(f"{lr * ratio:.6g}") for ratio in ratios]
