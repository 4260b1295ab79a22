"""A tuning's folder: its files, and a summary for the terminal."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from redline.distributed.process_group import World
from redline.errors import RangeTestError
from redline.log import log
from redline.range_test.curve import SMOOTHING
from redline.range_test.result import check_out
from redline.range_test.suggest import Refusal, Suggestion
from redline.reports import write_charts
from redline.reports.html import PAGE_NAME
from redline.reports.model import Report, loss_kind, marks_of, start_of
from redline.reports.terminal import draw_chart
from redline.tuning.result import CONFIG_NAME, CSV_NAME, JSON_NAME, Tuning, is_tuning, save_tuning
from redline.tuning.trials import Candidate, Trial

__all__ = ["prepare_folder", "report_of", "save_progress", "summarize", "write_tuning"]

PICTURE_NAME = "tune.png"
CLEARLY = 0.03  # a setting is clearly better if its lowest loss is lower by this fraction of the second's


def prepare_folder(directory: str | Path | None, world: World, *, force: bool) -> None:
    """Make a tuning's folder; with `force` remove the files of an earlier tuning, which must not outlive this one.

    Raises:
        RangeTestError: A rank that was given a folder cannot write there, or would replace results; on all ranks.
    """
    problem = None
    if directory is not None:
        folder = Path(directory)
        try:
            check_out(folder, force=force)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"\n")
            if is_tuning(folder):
                for name in (CONFIG_NAME, PAGE_NAME, PICTURE_NAME, CSV_NAME, JSON_NAME):
                    (folder / name).unlink(missing_ok=True)
        except RangeTestError as error:
            problem = str(error)
        except OSError as error:
            problem = f"out: {directory}: {error.strerror or error}; give a folder that can be written to"
    if problem := next(filter(None, world.gather(problem)), None):
        raise RangeTestError(problem)


def save_progress(tuning: Tuning, directory: str | Path | None) -> None:
    """Save what is known so far, with a report if the tuning was interrupted; a full disk does not end a tuning."""
    if directory is None:
        return
    folder = Path(directory)
    try:
        # A report exists already if a late step was reported as an interruption; it must not stay behind.
        if tuning.stopped is None and not (folder / PAGE_NAME).exists():
            save_tuning(tuning, folder)
        elif tuning.test.curves or tuning.search:
            write_tuning(tuning, folder, picture=False)  # there may be little time
            if tuning.stopped is not None:
                log.warning("tune: interrupted %s; what is known so far is in %s", tuning.stopped, folder)
    except OSError as error:
        log.warning("tune: cannot write what is known so far to %s: %s", folder, error.strerror or error)


def write_tuning(tuning: Tuning, directory: str | Path, *, beta: float = SMOOTHING, picture: bool = True) -> str:
    """Write JSON, CSV, HTML report, picture and config into a folder.

    `beta` is the weight of the past in the smoothing of the charts. Without matplotlib the picture is left out, and the
    lines name the extra to install.

    Returns:
        Lines for the terminal: what was written, and the next commands to type.
    """
    folder = Path(directory)
    written = save_tuning(tuning, folder)
    charts, lines = write_charts(report_of(tuning, beta=beta), folder, PICTURE_NAME, picture=picture)
    lines.append(f"Written to {directory}: {', '.join(path.name for path in (*written.values(), *charts))}")
    if config := written.get("config"):
        ranks = tuning.target_processes or tuning.test.world_size
        python, world = "python", ""
        if ranks > 1:
            python, world = f"torchrun --nproc-per-node {ranks}", f" --world-size {ranks}"
        lines += [
            f"\nNext:\n  redline validate {config}{world}\n  {python} train.py --config {config}",
            f'where train.py is your script, which calls initialize(model, "{config}").',
        ]
    return "\n".join(lines)


def report_of(tuning: Tuning, *, beta: float = SMOOTHING) -> Report:
    """What the charts and the HTML report draw."""
    test, choice = tuning.test, tuning.choice
    notes = tuple(note for note in tuning.notes() if note not in tuning.left_out)
    answer = replace(tuning.refusal or tuning.answer, notes=notes)
    # The comparison at the config's own batch size is for the table only: it repeats the sweep, but shorter.
    comparisons = [curve for curve in tuning.comparisons if curve.train_batch_size != test.train_batch_size]
    facts = {
        "optimizer": test.optimizer,
        "batch size": f"{test.train_batch_size:,}",
        "ranks": str(test.world_size),
        "planned training": f"{tuning.steps:,} steps",
        "cost": f"{tuning.spent:,} steps, {tuning.spent / tuning.steps:.1%} of the planned, {tuning.seconds:.1f} s",
    }
    facts |= {"chosen": f"{choice.schedule}, {choice.lr:g}"} if isinstance(choice, Candidate) else {}
    facts |= {"interrupted": tuning.stopped} if tuning.stopped is not None else {}
    return Report(
        title="Tuning" if tuning.stopped is None else "Tuning (interrupted)",
        curves=(*test.curves, *comparisons),
        answer=answer,
        train_steps=tuning.steps,
        train_batch_size=test.train_batch_size,
        facts=tuple(facts.items()),
        beta=beta,
        marks=marks_of(test.curves, test.train_batch_size, tuning.answer, beta=beta),
        batches=tuning.batches,
        trials=tuning.trials,
        winner=tuning.verdict.winner,
        search=tuning.search,
        config=tuning.to_config() if isinstance(choice, Candidate) else None,
        config_name=CONFIG_NAME,
        left_out=tuning.left_out,
    )


# -- in words --------------------------------------------------------------------------------------


def summarize(tuning: Tuning, *, beta: float = SMOOTHING, chart: bool = True) -> str:
    """What was found, in lines for the terminal, by default below a chart."""
    has_chart = chart and (tuning.search or any(curve.losses for curve in tuning.test.curves))
    above = [draw_chart(report_of(tuning, beta=beta)), ""] if has_chart else []
    own, cost = tuning.test.train_batch_size, f"{tuning.updates} steps"
    if tuning.updates != tuning.spent:
        cost += f", which cost as much as {tuning.spent} at batch size {own}"
    if tuning.validation_cost:
        cost += f" (validations: {tuning.validation_cost})"
    share = f"{tuning.spent / tuning.steps:.1%} of the planned training, in {tuning.seconds:.1f} s"
    lines = [*above, f"Tuned for {tuning.steps} steps at batch size {own}, with {cost}: {share}", ""]
    for section in (_answer, _peak_trials, _schedule_trials, _comparisons, _chosen):
        if found := "\n".join(section(tuning)).rstrip():
            lines += [found, ""]
    lines += [f"Note: {note}" for note in dict.fromkeys(tuning.notes())]
    return "\n".join(lines).rstrip()


def _answer(tuning: Tuning) -> Iterator[str]:
    answer = tuning.answer
    if isinstance(answer, Refusal):
        yield f"No suggestion. {answer.reason}\n  {answer.remedy}"
        return
    source = "The search finds" if tuning.search else "The tests suggest"
    yield f"{source} a peak of {answer.cycle_max_lr:g}.\n  {answer.reasons.get('cycle_max_lr', '')}".rstrip()


def _peak_trials(tuning: Tuning) -> Iterator[str]:
    if not tuning.search:
        return
    what, start = loss_kind(tuning.search), start_of(tuning.search[0])
    yield f"Search for the peak, by the {what} loss at the end of short trainings ({start:.4g} at the start):"
    for steps in sorted({trial.steps for trial in tuning.search}):
        trials = sorted((trial for trial in tuning.search if trial.steps == steps), key=lambda each: each.lr)
        lowest = min(trials, key=lambda each: (each.diverged, each.loss))
        for trial in trials:
            order = ", another order of the data" if trial.curve.seed else ""
            loss = "diverged" if trial.diverged else f"{trial.loss:.4g}"
            mark = "<- lowest" if trial is lowest and not trial.diverged else ""
            yield f"  {f'{trial.lr:g}':12} {f'{steps} steps':12} {loss:12} {mark}{order}".rstrip()


def _length_of(trials: Sequence[Trial]) -> int:
    return max(len(trial.curve.losses) for trial in trials)


def _schedule_trials(tuning: Tuning) -> Iterator[str]:
    if not tuning.trials:
        return
    kind, verdict = loss_kind(tuning.trials), tuning.verdict
    yield f"Schedule trials of {_length_of(tuning.trials)} steps each, by the {kind} loss at the end:"
    for index, trial in sorted(enumerate(tuning.trials), key=lambda pair: (pair[1].diverged, pair[1].loss)):
        mark = "<- wins" if index == verdict.winner else "   tied" if index in verdict.tied else ""
        loss = "diverged" if trial.diverged else f"{trial.loss:.4g} +- {trial.noise:.1g}"
        yield f"  {trial.curve.name:26} {loss:20} {mark}".rstrip()
    yield f"  {verdict.why}"


def _comparisons(tuning: Tuning) -> Iterator[str]:
    def peak(answer: Suggestion | Refusal) -> str:
        return f"{answer.cycle_max_lr:g}" if isinstance(answer, Suggestion) else "no answer"

    if len(tuning.batches) > 1:
        yield "Batch size   suggested peak, by short tests of one length"
        yield from (f"{size:10}   {peak(answer)}" for size, answer in tuning.batches)
        yield ""
    if tuning.settings:
        yield f"{'Setting':24} suggested peak   lowest training loss"
    for setting in tuning.settings:
        yield f"{f'{setting.name} {setting.value:g}':24} {peak(setting.answer):16} {setting.lowest:.4g}"
    for name in dict.fromkeys(setting.name for setting in tuning.settings):
        first, *rest = sorted((each for each in tuning.settings if each.name == name), key=lambda each: each.lowest)
        if rest and rest[0].lowest - first.lowest > CLEARLY * abs(rest[0].lowest):
            yield f"{name}: {first.value:g} is best. The config keeps its own; set it there and tune again to use it."
        elif rest:
            yield f"{name}: {first.value:g} is lowest, but not clearly so. The config keeps its own."


def _chosen(tuning: Tuning) -> Iterator[str]:
    choice = tuning.choice
    if isinstance(choice, Refusal):
        yield f"No config. {choice.reason} {choice.remedy}"
        return
    untried = ""
    if not tuning.trials:
        what = "with the peak that the search found" if tuning.search else "which was not tried"
        untried = f", {what}: {'the tuning was interrupted' if tuning.stopped else 'there was no room for trials'}"
    yield f"Chosen: {choice.schedule}{untried}"
    config = tuning.to_config()
    reasons = config["_range_test"]["reasons"]
    params = config["scheduler"]["params"] if "scheduler" in config else {"lr": config["_tune"]["lr"]}
    for key, value in params.items():
        yield f"  {key} = {value}  {reasons.get(key, '')}".rstrip()
