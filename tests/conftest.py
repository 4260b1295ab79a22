"""What every test starts from and must leave behind: no torchrun, no process group, no files in the repository."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# On a busy machine anything may take long.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# What runs in the background of a shell without job control has Ctrl-C ignored, and hands that on to its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Scripts first: their whole runs take longest, and none is to be left for the end, when other workers are done."""
    items.sort(key=lambda item: "scripts" not in item.path.parts[len(ROOT.parts) :])  # keeps the order otherwise


def _environment() -> dict[str, str]:
    # pytest's own, and what torch's compiler notes for its workers when an optimizer first touches it.
    return {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST" and not k.startswith("TORCHINDUCTOR_")}


def _files() -> set[str]:
    return {name for name in os.listdir(ROOT) if not name.startswith((".", "__pycache__"))}


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """Hide torchrun's environment from a test, and fail one that leaks."""
    # Not the fixture `monkeypatch`: this one must look after that one has put everything back.
    with pytest.MonkeyPatch.context() as patch:
        for name in _TORCHRUN:
            patch.delenv(name, raising=False)
        environment, files, folder = _environment(), _files(), Path.cwd()
        yield
        leaks = []
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            leaks.append("a process group")
        now = _environment()
        if changed := sorted(name for name in environment | now if environment.get(name) != now.get(name)):
            leaks.append(f"environment variables: {', '.join(changed)}")
            os.environ.clear()
            os.environ.update(environment)
        if Path.cwd() != folder:
            leaks.append(f"the working directory: {Path.cwd()}")
            os.chdir(folder)
        if new := _files() - files:
            leaks.append(f"files in the repository: {', '.join(sorted(new))}")
    if leaks:
        pytest.fail(f"the test leaves behind {'; '.join(leaks)}")
