"""A tuning's folder: all of its files, and the lines that tell a person what they say."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from engine.errors import RangeTestError
from engine.log import log
from engine.range_test.chart import chart_of
from engine.range_test.contents import Contents, marks_of
from engine.range_test.page import PAGE_NAME, write_page
from engine.range_test.picture import draw_range_test
from engine.range_test.smoothing import SMOOTHING
from engine.tuning.result import Tuning, tries_of
from engine.tuning.store import CONFIG_NAME, CSV_NAME, JSON_NAME, is_tuning, save_tuning
from engine.tuning.summary import next_steps, summarize

__all__ = ["PICTURE_NAME", "contents_of", "prepare_folder", "show_tuning", "write_tuning"]

PICTURE_NAME = "tune.png"


def prepare_folder(directory: str | Path) -> None:
    """Make a tuning's folder, or clear it of an earlier tuning, which a new one that fails early would not replace.

    Raises:
        RangeTestError: nothing can be written there.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\n")
        if is_tuning(directory):
            log.info("%s holds an earlier tuning; this one begins anew and replaces it", directory)
            for name in (CONFIG_NAME, PAGE_NAME, PICTURE_NAME, CSV_NAME, JSON_NAME):
                (Path(directory) / name).unlink(missing_ok=True)
    except OSError as error:
        raise RangeTestError(
            f"out: {directory}: {error.strerror or error}; give a folder that can be written to"
        ) from None


def write_tuning(tuning: Tuning, directory: str | Path, *, beta: float = SMOOTHING, picture: bool = True) -> str:
    """Write JSON, CSV, page, picture and config into a folder.

    A missing matplotlib costs the picture only, and is said.

    Args:
        tuning: what to report.
        directory: the folder; made if it is not there.
        beta: weight of the past in the smoothing of what is drawn, in [0, 1).
        picture: draw one; matplotlib takes its time.

    Returns:
        What was found, where it lies and what to do next, in lines for a person.
    """
    folder = Path(directory)
    written = save_tuning(tuning, folder)
    lines = [summarize(tuning)]
    contents = contents_of(tuning, beta=beta)
    written["page"] = write_page(contents, folder / PAGE_NAME)
    try:
        if picture:
            written["picture"] = draw_range_test(contents, folder / PICTURE_NAME)
    except RangeTestError as error:
        lines.append(f"No picture: {error}.")
    lines.append(f"Written to {directory}: {', '.join(path.name for path in written.values())}")
    if "config" in written:
        lines += ["", *next_steps(tuning, folder / CONFIG_NAME)]
    return "\n".join(lines)


def show_tuning(tuning: Tuning, said: str | None = None, *, beta: float = SMOOTHING) -> str:
    """Lines for a person below a chart for the terminal.

    Args:
        tuning: what to show.
        said: what `write_tuning` returned; None where nothing could be written: then the config is shown, too.
        beta: as in `write_tuning`.
    """
    if said is None:
        config = [] if tuning.refusal is not None else ["", json.dumps(tuning.to_config(), indent=2)]
        said = "\n".join([summarize(tuning), *config])
    if not any(curve.losses for curve in tuning.test.curves):
        return said
    return f"{chart_of(contents_of(tuning, beta=beta))}\n\n{said}"


def contents_of(tuning: Tuning, *, beta: float = SMOOTHING) -> Contents:
    """A tuning in the form that page and picture draw."""
    test = tuning.test
    refusal = tuning.refusal
    # That at the config's own batch size is for the table: among the longer tests its line would only confuse.
    beside = [curve for curve in tuning.comparisons if curve.train_batch_size != test.train_batch_size]
    facts = {
        "optimizer": test.optimizer,
        "batch size": f"{test.train_batch_size:,}",
        "processes": str(test.world_size),
        "planned training": f"{tuning.steps:,} updates",
        "cost": f"{tuning.spent:,} updates, {tuning.spent / tuning.steps:.1%} of the planned, {tuning.seconds:.1f} s",
    }
    if tuning.choice is not None:
        facts["chosen"] = f"{tuning.choice.schedule}, {tuning.choice.lr:g}"
    if tuning.stopped is not None:
        facts["interrupted"] = tuning.stopped
    return Contents(
        title="Tuning" if tuning.stopped is None else "Tuning (interrupted)",
        curves=(*test.curves, *beside),
        answer=tuning.answer,
        train_steps=tuning.steps,
        train_batch_size=test.train_batch_size,
        facts=tuple(facts.items()),
        beta=beta,
        marks=marks_of(test.curves, test.train_batch_size, tuning.answer, beta=beta),
        batches=tuning.batches,
        trials=tuning.trials,
        winner=tuning.verdict.winner,
        search=tuple((trial, came.loss) for trial, came in zip(tuning.search, tries_of(tuning.search))),
        config=tuning.to_config() if refusal is None else None,
        config_name=CONFIG_NAME,
        left_out=tuning.left_out,
    )
