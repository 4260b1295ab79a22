"""How to import another checkout's package in a new process, whatever its import name."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["ROOT", "environment_of"]

ROOT = Path(__file__).resolve().parents[2]


def environment_of(checkout: Path, folder: Path, tests: Path = ROOT) -> dict[str, str]:
    """The environment in which a new process imports a checkout's package, and nothing else of it.

    Args:
        checkout: whose ``engine`` and ``schedulers`` are meant, by the import name that its ``pyproject.toml`` gives.
        folder: where the package gets that name; it is made.
        tests: the checkout whose tests and scripts are imported.
    """
    checkout = checkout.resolve()
    package = "redline" if "package-dir" in (checkout / "pyproject.toml").read_text() else "engine"
    folder.mkdir(parents=True)
    if package == "engine":
        for name in ("engine", "schedulers"):
            (folder / name).symlink_to(checkout / name)
    else:
        (folder / package).mkdir()
        for path in (checkout / "engine").iterdir():
            (folder / package / path.name).symlink_to(path)
        (folder / package / "schedulers").symlink_to(checkout / "schedulers")
    own = {"PYTHONPATH": f"{folder}{os.pathsep}{tests}", "REDLINE_PACKAGE": package, "OMP_NUM_THREADS": "1"}
    return os.environ | own
