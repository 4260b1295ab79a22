"""A range test's folder: all of its files, and the lines that tell a person what they say."""

from __future__ import annotations

from pathlib import Path

from engine.errors import RangeTestError
from engine.range_test.contents import contents_of
from engine.range_test.page import PAGE_NAME, write_page
from engine.range_test.result import RangeTestResult

__all__ = ["PICTURE_NAME", "write_report"]

PICTURE_NAME = "range_test.png"


def write_report(result: RangeTestResult, directory: str | Path) -> str:
    """Write JSON, CSV, page, picture and suggested config into a folder.

    A missing matplotlib costs the picture only, and is said.

    Returns:
        What was found and where it lies, in lines for a person.
    """
    folder = Path(directory)
    written = result.save(folder)
    lines = [result.summary()]
    written["page"] = write_page(contents_of(result), folder / PAGE_NAME)
    try:
        written["picture"] = result.plot(folder / PICTURE_NAME)
    except RangeTestError as error:
        lines.append(f"No picture: {error}.")
    names = ", ".join(path.name for path in written.values())
    return "\n".join([*lines, f"Written to {folder}: {names}"])
