"""Guards over the whole source: what is public, who imports whom, what an import does, what a wheel holds."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import engine
import schedulers

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "schedulers")

# Who may import whom: each module those on its own level or on one above this line. Data flows the same way.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("schedulers",),
    (
        "engine.arguments",
        "engine.compiled",
        "engine.device",
        "engine.errors",
        "engine.fused",
        "engine.lamb",
        "engine.lean",
        "engine.log",
        "engine.muon",
        "engine.randomness",
        "engine.rendezvous",
        "engine.textplot",
        "engine.skipping",
        "engine.transfer",
    ),
    ("engine.config", "engine.network", "engine.optimizers", "engine.peers"),
    ("engine.distributed",),
    ("engine.accumulation", "engine.agreement", "engine.data", "engine.doubt", "engine.finite", "engine.first_batches"),
    ("engine.gradients", "engine.schedule_state"),
    ("engine.sharding",),
    ("engine.master_params",),
    ("engine.inputs", "engine.parallel", "engine.precision"),
    ("engine.checkpoint", "engine.optimizer_step"),
    ("engine.zero", "engine.recompute"),
    ("engine.parts",),
    ("engine.engine",),
    ("engine.range_test", "engine.sigterm", "engine.watch"),
    ("engine.build", "engine.needs"),
    ("engine.preview", "engine.start"),
    ("engine.tuning",),
    ("engine.cli",),
    ("engine", "engine.__main__"),
)


class Import(NamedTuple):
    """One import statement's module, absolute, and whether it stands inside a function."""

    name: str
    lazy: bool


def source_files() -> dict[str, Path]:
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = source_files()


@cache
def imports(module: str) -> tuple[Import, ...]:
    """What a module imports while it runs: not what only a type checker reads."""
    return tuple(_walk(ast.parse(MODULES[module].read_text(encoding="utf-8")), lazy=False))


def _walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute here"
            assert child.module is not None
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield Import(inner if inner in MODULES else child.module, lazy)
        else:
            yield from _walk(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def level_of(module: str) -> int:
    places = [level for level, names in enumerate(LEVELS) for name in names if name != "engine" and is_in(module, name)]
    if module == "engine":
        return len(LEVELS) - 1
    assert places, f"{module} is on no level; give it its place in LEVELS"
    return max(places)


# -- what is public ------------------------------------------------------------------------------------


def public_names(package: ModuleType) -> set[str]:
    """Names of a package that come from the package itself, modules apart."""
    return {
        name
        for name, value in vars(package).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and is_in(getattr(value, "__module__", None) or "", package.__name__)
    }


def test_the_engine_shows_these_names_and_no_others() -> None:
    assert sorted(engine.__all__) == [
        "ConfigError",
        "Engine",
        "EngineConfig",
        "EngineError",
        "Problem",
        "RangeTestError",
        "RangeTestResult",
        "Tuning",
        "initialize",
        "load_config",
        "run_range_test",
        "tune",
    ]
    assert public_names(engine) <= set(engine.__all__)
    assert all(hasattr(engine, name) for name in engine.__all__)


def test_the_schedulers_show_these_names_and_no_others() -> None:
    assert sorted(schedulers.__all__) == [
        "LRRangeTest",
        "OneCycle",
        "Schedule",
        "UnknownScheduleError",
        "WarmupCosineLR",
        "WarmupDecayLR",
        "WarmupLR",
        "known",
        "register",
        "resolve",
    ]
    assert public_names(schedulers) == set(schedulers.__all__)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "engine.__main__"])
def test_every_name_that_a_module_lists_as_public_exists(name: str) -> None:
    module = importlib.import_module(name)
    assert [each for each in module.__all__ if not hasattr(module, each)] == []


def test_a_name_that_the_engine_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = engine.Engin


# -- who imports whom ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [name for name in MODULES if is_in(name, "schedulers")])
def test_the_schedulers_know_torch_and_themselves_only(module: str) -> None:
    foreign = {name.partition(".")[0] for name, _ in imports(module)} - sys.stdlib_module_names
    assert foreign <= {"schedulers", "torch"}


@pytest.mark.parametrize("module", [name for name in MODULES if is_in(name, "engine.config")])
def test_the_config_language_needs_pydantic_and_the_errors_only(module: str) -> None:
    lazily = ("engine.optimizers", "schedulers", "jsonschema", "referencing")
    for name, lazy in imports(module):
        if name.partition(".")[0] in sys.stdlib_module_names:
            continue
        allowed = ("pydantic", "pydantic_core", "engine.errors", "engine.config", *(lazily if lazy else ()))
        assert any(is_in(name, each) for each in allowed), f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_one_above_it(module: str) -> None:
    ours = {name for name, _ in imports(module) if any(is_in(name, package) for package in PACKAGES)}
    if module == "engine":
        ours -= {"engine"}  # its own lazy names
    assert {name for name in ours if level_of(name) > level_of(module)} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {name for name, lazy in imports(module) if name in MODULES and not lazy and name != module}
        for module in MODULES
    }
    while leaves := {module for module, needed in graph.items() if not needed}:
        graph = {module: needed - leaves for module, needed in graph.items() if module not in leaves}
    assert graph == {}, f"circles among {sorted(graph)}"


# -- what an import does -------------------------------------------------------------------------------


def fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_the_engine_imports_no_extra_and_sets_up_nothing() -> None:
    code = """
import json, logging, os, random, sys
import torch, torch.distributed, torch.nn.parallel
environment, state, draws = dict(os.environ), random.getstate(), torch.get_rng_state()
handlers = list(logging.getLogger().handlers)
torchs_own = set(sys.modules)
import engine, schedulers
extras = ["matplotlib", "sklearn", "tqdm", "jsonschema", "pydantic", "tensorboard", "wandb", "comet_ml"]
print(json.dumps({
    "extras": [name for name in extras if name in set(sys.modules) - torchs_own],
    "environment": dict(os.environ) == environment,
    "process group": torch.distributed.is_initialized(),
    "random": random.getstate() == state and torch.equal(torch.get_rng_state(), draws),
    "handlers": [logging.getLogger(name).handlers for name in ("engine", "schedulers")],
    "root": logging.getLogger().handlers == handlers,
}))
"""
    assert json.loads(fresh_python(code)) == {
        "extras": [],
        "environment": True,
        "process group": False,
        "random": True,
        "handlers": [[], []],
        "root": True,
    }


def test_importing_the_schedulers_does_not_import_the_engine() -> None:
    code = "import sys, schedulers; print([name for name in sys.modules if name.partition('.')[0] == 'engine'])"
    assert fresh_python(code).strip() == "[]"


# -- what is shipped -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "configs").glob("*.json")) if path.name != "schema.json"],
    ids=lambda p: p.name,
)
def test_every_config_here_loads(path: Path) -> None:
    assert engine.load_config(path, world_size=1).train_batch_size >= 1


def test_the_wheel_holds_every_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name, path in MODULES.items() if path.name == "__init__.py")
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_the_wheel_holds_every_file_that_is_no_module() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        held = {path for pattern in patterns[package] for path in (ROOT / package).glob(pattern)}
        files = {path for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert files == held


def test_git_ignores_no_source_file() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = [str(path.relative_to(ROOT)) for folder in ("engine", "schedulers", "tests") for path in
             sorted((ROOT / folder).rglob("*.py"))]  # fmt: skip
    done = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""


def test_the_tests_have_no_packages_that_could_shadow_the_source() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
