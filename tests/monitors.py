"""The packages behind the monitors, kept off the network, and what they wrote, read back."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

__all__ = ["offline_comet", "offline_wandb", "read_comet", "read_tensorboard"]


def read_tensorboard(folder: Path) -> Any:
    """The events of a folder, TensorBoard's `EventAccumulator`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def offline_wandb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package wandb, which writes into a folder; skips a test where it is not installed."""
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_SERVICE", "")  # wandb sets it, and leaves it
    monkeypatch.delenv("WANDB_SERVICE")
    return wandb


def offline_comet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Comet write into a folder; skips a test where it is not installed."""
    pytest.importorskip("comet_ml", reason="the extra `comet` is not installed")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(folder))
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")


def read_comet(folder: Path) -> list[dict[str, Any]]:
    """The metrics of the one experiment in a folder, in order."""
    (archive,) = folder.glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        messages = [json.loads(line) for line in opened.read("messages.json").splitlines()]
    return [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
