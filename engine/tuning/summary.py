"""A tuning in words: what was found, how sure it is, and what to type next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from engine.range_test.suggestion import Refusal, Suggestion
from engine.tuning.result import Tuning, tries_of
from engine.tuning.trials import Trial

__all__ = ["next_steps", "summarize"]

CLEARLY = 0.03  # a setting is clearly better if its lowest loss is lower by this share of the second's


def summarize(tuning: Tuning) -> str:
    """What was found, in lines for a person."""
    share = tuning.spent / tuning.steps
    own = tuning.test.train_batch_size
    cost = f"{tuning.updates} updates"
    if tuning.updates != tuning.spent:
        cost += f", which cost as much as {tuning.spent} at batch size {own}"
    cost += f": {share:.1%} of what is planned, in {tuning.seconds:.1f} s"
    lines = [f"Tuned for {tuning.steps} updates at batch size {own}, with {cost}", ""]
    for block in (_answer, _search, _trials, _batches, _settings, _chosen):
        told = list(block(tuning))
        lines += [*told, ""] if told else []
    lines += [f"Note: {note}" for note in dict.fromkeys(tuning.notes())]
    return "\n".join(lines).rstrip()


def _answer(tuning: Tuning) -> Iterator[str]:
    answer = tuning.answer
    if isinstance(answer, Refusal):
        yield f"The tests: no suggestion. {answer.reason}"
        yield f"  {answer.remedy}"
        return
    who = "The search finds" if tuning.search else "The tests suggest"
    yield (
        f"{who} a peak of {answer.cycle_max_lr:g}; the best one probably lies between {answer.low_lr:.2g} and "
        f"{answer.high_lr:.2g}."
    )
    yield f"  {answer.reasons.get('cycle_max_lr', '')}".rstrip()


def _search(tuning: Tuning) -> Iterator[str]:
    if not tuning.search:
        return
    length = max(len(trial.curve.losses) for trial in tuning.search)
    validates = any(trial.curve.validation for trial in tuning.search)
    what = f"{'validation' if validates else 'later training'} loss, from where it began"
    yield f"Search by short trainings of {length} updates each, by {what}:"
    tries = sorted(tries_of(tuning.search), key=lambda one: one.lr)
    lowest = min(one.loss for one in tries)
    for one in tries:
        came_to = f"{one.loss:+.4g}" if math.isfinite(one.loss) else "diverged"
        yield f"  {one.lr:<24g} {came_to:20} {'<- lowest' if one.loss == lowest < 0 else ''}".rstrip()


def _trials(tuning: Tuning) -> Iterator[str]:
    if not tuning.trials:
        return
    what = "validation loss" if any(trial.curve.validation for trial in tuning.trials) else "training loss"
    length = max(len(trial.curve.losses) for trial in tuning.trials)
    yield f"Trials of {length} updates each, by {what} at the end:"
    verdict = tuning.verdict
    for index, trial in _ranked(tuning):
        mark = "<- wins" if index == verdict.winner else "   tied" if index in verdict.tied else ""
        came_to = "diverged" if trial.diverged else f"{trial.loss:.4g} +- {trial.noise:.1g}"
        yield f"  {trial.curve.name:24} {came_to:20} {mark}".rstrip()
    yield f"  {verdict.why}"


def _ranked(tuning: Tuning) -> list[tuple[int, Trial]]:
    return sorted(enumerate(tuning.trials), key=lambda pair: (pair[1].diverged, pair[1].loss))


def _batches(tuning: Tuning) -> Iterator[str]:
    if len(tuning.batches) < 2:
        return
    yield "Batch size   suggested maximum, by short tests of one length"
    for size, answer in tuning.batches:
        yield f"{size:10}   {_maximum(answer)}"


def _settings(tuning: Tuning) -> Iterator[str]:
    if not tuning.settings:
        return
    yield f"{'Setting':24} suggested maximum   lowest training loss"
    for setting in tuning.settings:
        yield f"{f'{setting.name} {setting.value:g}':24} {_maximum(setting.answer):19} {setting.lowest:.4g}"
    for name in dict.fromkeys(setting.name for setting in tuning.settings):
        ranked = sorted((each for each in tuning.settings if each.name == name), key=lambda each: each.lowest)
        if len(ranked) < 2:
            continue
        first, second = ranked[0], ranked[1]
        if second.lowest - first.lowest > CLEARLY * abs(second.lowest):
            yield f"{name}: {first.value:g} is best. The config keeps its own; set it there and tune again to use it."
        else:
            yield f"{name}: {first.value:g} is lowest, but not clearly so. The config keeps its own."


def _maximum(answer: Suggestion | Refusal) -> str:
    return f"{answer.cycle_max_lr:g}" if isinstance(answer, Suggestion) else "no answer"


def _chosen(tuning: Tuning) -> Iterator[str]:
    choice, refusal = tuning.choice, tuning.refusal
    if choice is None:
        assert refusal is not None
        yield f"No config. {refusal.reason} {refusal.remedy}"
        return
    config = tuning.to_config()
    section = config.get("scheduler")
    yield f"Chosen: {choice.schedule}{_untried(tuning)}"
    reasons = config["_range_test"]["reasons"]
    params = {"lr": config["_tune"]["lr"]} if section is None else section["params"]
    for key, value in params.items():
        yield f"  {key} = {value}  {reasons.get(key, '')}".rstrip()


def _untried(tuning: Tuning) -> str:
    if tuning.trials:
        return ""
    tried = "with the peak that the search found" if len(tuning.search) > 2 else "which was not tried"
    return f", {tried}: {'it was broken off' if tuning.stopped else 'there was no room for trials'}"


def next_steps(tuning: Tuning, config: Path) -> Iterator[str]:
    """What to type next, a line each."""
    processes = tuning.target_processes or tuning.test.world_size
    yield "Next:"
    if processes == 1:
        yield f"  redline validate {config}"
        yield f"  python train.py --config {config}"
    else:
        yield f"  redline validate {config} --world-size {processes}"
        yield f"  torchrun --nproc-per-node {processes} train.py --config {config}"
    yield f'where train.py is your script: it calls initialize(model, "{config}") and makes the updates.'
