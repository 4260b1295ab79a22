"""What a range test answers: the values of a 1Cycle schedule, each with its reason, or why there are none."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context

__all__ = ["CYCLE_RATIO", "RISING_SHARE", "Refusal", "Suggestion", "cycle_at", "round_down"]

CYCLE_RATIO = 30.0  # cycle_max_lr / cycle_min_lr, at least: the cycle ends at its minimum, and must end low
RISING_SHARE = 0.2  # share of the planned updates in which the LR rises


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Values for a ``OneCycle`` block, each with its reason.

    Attributes:
        cycle_min_lr: LR at both ends of the cycle.
        cycle_max_lr: LR at its peak.
        cycle_first_step_size: updates in which the LR rises.
        cycle_second_step_size: updates in which it falls.
        reasons: one sentence for each key of `params`.
        low_lr, high_lr: the range in which the best maximum probably lies.
        curve: name of the test that set the maximum, or of the two that bracket it.
        diverged_at_lr: lowest LR at which a test diverged; None if none did.
        notes: what to know before trusting the numbers, one sentence or two each.
    """

    cycle_min_lr: float
    cycle_max_lr: float
    cycle_first_step_size: int
    cycle_second_step_size: int
    reasons: dict[str, str]
    curve: str
    low_lr: float
    high_lr: float
    diverged_at_lr: float | None = None
    notes: tuple[str, ...] = ()

    def params(self) -> dict[str, float | int]:
        """The ``params`` of the config's ``OneCycle`` block."""
        return {
            "cycle_min_lr": self.cycle_min_lr,
            "cycle_max_lr": self.cycle_max_lr,
            "cycle_first_step_size": self.cycle_first_step_size,
            "cycle_second_step_size": self.cycle_second_step_size,
        }


@dataclass(frozen=True, slots=True)
class Refusal:
    """No suggestion: one sentence on why, one on what to do, and notes as in `Suggestion`."""

    reason: str
    remedy: str
    notes: tuple[str, ...] = ()


def cycle_at(
    max_lr: float,
    why: str,
    *,
    train_steps: int,
    low_lr: float,
    high_lr: float,
    curve: str,
    diverged_at_lr: float | None,
) -> Suggestion:
    """A cycle around a maximum that was found in another way than by `suggest`.

    Args:
        max_lr: its maximum.
        why: where that comes from, in a sentence.
        train_steps: planned length of the training run, in updates; at least 2.
        low_lr, high_lr, curve, diverged_at_lr: see :class:`Suggestion`.
    """
    first = max(1, round(RISING_SHARE * train_steps))
    return Suggestion(
        cycle_min_lr=round_down(max_lr / CYCLE_RATIO),
        cycle_max_lr=max_lr,
        cycle_first_step_size=first,
        cycle_second_step_size=train_steps - first,
        reasons={
            "cycle_min_lr": f"1/{CYCLE_RATIO:.0f} of the maximum: the cycle ends here, and must end low.",
            "cycle_max_lr": why,
            "cycle_first_step_size": f"{first / train_steps:.0%} of {train_steps} planned updates.",
            "cycle_second_step_size": f"The rest of {train_steps} planned updates: the run ends at the minimum.",
        },
        curve=curve,
        low_lr=low_lr,
        high_lr=high_lr,
        diverged_at_lr=diverged_at_lr,
    )


def round_down(value: float) -> float:
    """Two significant digits, downwards, so that a bound stays a bound."""
    return float(Context(prec=2, rounding=ROUND_FLOOR).create_decimal(repr(value)))
