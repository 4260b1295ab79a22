"""Who hears what: rank zero only, through the application's handlers where it has some."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from redline.log import configure, log

LOGGERS = ("redline", "redline.schedulers")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A call that leaves the loggers as before the first `initialize`, without pytest's handlers above them."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}

    def bare() -> None:
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        for name in LOGGERS:
            monkeypatch.setattr(logging.getLogger(name), "handlers", [])
            monkeypatch.setattr(logging.getLogger(name), "filters", [])
            logging.getLogger(name).setLevel(logging.NOTSET)

    yield bare
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_without_a_handler_messages_go_to_stderr_as_they_are(
    bare: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    bare()
    configure()
    log.info("step=%d", 3)
    logging.getLogger("redline.schedulers").warning("momentum")
    assert capsys.readouterr().err == "step=3\nmomentum\n"


def test_configuring_again_changes_nothing(bare: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    bare()
    configure()
    configure()
    log.info("once")
    assert capsys.readouterr().err == "once\n"
    assert [len(logging.getLogger(name).handlers) for name in LOGGERS] == [1, 0]


def test_an_application_with_handlers_of_its_own_gets_no_other(
    bare: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare()
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    configure()
    assert [logging.getLogger(name).handlers for name in LOGGERS] == [[], []]
    assert log.level == logging.NOTSET


def test_the_other_ranks_are_silent_warnings_included(
    bare: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare()
    configure()
    monkeypatch.setenv("RANK", "1")
    log.warning("heard once is enough")
    logging.getLogger("redline.schedulers").warning("heard once is enough")
    assert capsys.readouterr().err == ""
