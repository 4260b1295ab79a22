"""The config in force, printed at the start."""

from __future__ import annotations

import logging

import pytest

from engine.config import load_config
from engine.watch.state import dump_state


def test_every_value_is_told_with_its_origin_but_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="engine")
    dump_state(load_config({"train_batch_size": 8, "dump_state": True, "comet": {"api_key": "hush"}}))
    (text,) = caplog.messages
    rows = [line.split(maxsplit=1) for line in text.splitlines()]
    assert text.startswith("config in force: config\n")
    assert ["train_batch_size", "8 (given)"] in rows
    assert ["gradient_accumulation_steps", "1 (derived)"] in rows
    assert ["gradient_clipping", "1.0 (default)"] in rows
    assert ["comet.api_key", "*** (given)"] in rows
    assert "hush" not in text
