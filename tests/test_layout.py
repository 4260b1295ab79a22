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

import redline
from redline import schedulers

ROOT = Path(__file__).parent.parent
PACKAGES = {"redline": "engine", "redline.schedulers": "schedulers"}  # and their folders
FACE = ROOT / "engine" / "compat"  # on the path of scripts that `redline run` starts

# Who may import whom: each module those on its own level or on one above this line. Data flows the same way.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("redline.schedulers",),
    (
        "redline.callbacks",
        "redline.distributed",
        "redline.compiled",
        "redline.device",
        "redline.errors",
        "redline.log",
        "redline.random_state",
        "redline.distributed.blocks",
    ),
    ("redline.console",),
    ("redline.config", "redline.optimizers", "redline.distributed.failure"),
    ("redline.distributed.process_group",),
    (
        "redline.distributed.call_order",
        "redline.distributed.consistency",
        "redline.data",
        "redline.first_batches",
        "redline.loaders",
        "redline.evaluation",
    ),
    ("redline.gradients", "redline.schedule_state"),
    ("redline.distributed.sharding",),
    ("redline.master_params",),
    ("redline.distributed.strategy",),
    (
        "redline.input_casts",
        "redline.distributed.ddp",
        "redline.precision",
        "redline.run_state",
    ),
    ("redline.checkpoint", "redline.optimizer_step"),
    ("redline.accumulation", "redline.distributed.fsdp_state", "redline.activation_checkpointing"),
    ("redline.distributed.memory_estimate",),
    ("redline.distributed.fsdp",),
    ("redline.step_loop", "redline.resumable"),
    ("redline.engine",),
    ("redline.monitoring", "redline.signals"),
    ("redline.range_test", "redline.reports"),
    ("redline.build",),
    ("redline.reports.schedule", "redline.start"),
    ("redline.tuning",),
    ("redline", "redline.cli", "redline.__main__"),
)


class Import(NamedTuple):
    """One import statement's module, absolute, and whether it stands inside a function."""

    name: str
    lazy: bool


def source_files() -> dict[str, Path]:
    """The package's modules; what `engine/compat` holds are packages of other names."""
    files = {}
    for package, folder in PACKAGES.items():
        for path in sorted(set((ROOT / folder).rglob("*.py")) - set(FACE.rglob("*"))):
            parts = (package, *path.relative_to(ROOT / folder).with_suffix("").parts)
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
    places = [
        level for level, names in enumerate(LEVELS) for name in names if name != "redline" and is_in(module, name)
    ]
    if module == "redline":
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
    assert sorted(redline.__all__) == [
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
    assert public_names(redline) <= set(redline.__all__)
    assert all(hasattr(redline, name) for name in redline.__all__)


def test_the_schedulers_show_these_names_and_no_others() -> None:
    assert sorted(schedulers.__all__) == [
        "LRRangeTest",
        "OneCycle",
        "Schedule",
        "UnknownScheduleError",
        "WarmupCosineLR",
        "WarmupDecayLR",
        "WarmupLR",
        "WarmupStableDecayLR",
        "known",
        "register",
        "resolve",
    ]
    assert public_names(schedulers) == set(schedulers.__all__)


def test_every_name_that_a_module_lists_as_public_exists() -> None:
    modules = [importlib.import_module(name) for name in MODULES if name != "redline.__main__"]
    assert [f"{each.__name__}.{name}" for each in modules for name in each.__all__ if not hasattr(each, name)] == []


def test_a_name_that_the_engine_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = redline.Engin


# -- who imports whom ----------------------------------------------------------------------------------


def foreign(package: str, allowed: tuple[str, ...], lazily: tuple[str, ...] = ()) -> list[str]:
    """Imports of a package's modules beyond the standard library and these; within functions also beyond `lazily`."""
    return [
        f"{module} imports {name}"
        for module in MODULES
        if is_in(module, package)
        for name, lazy in imports(module)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not any(is_in(name, each) for each in (*allowed, *(lazily if lazy else ())))
    ]


def test_the_schedulers_know_torch_and_themselves_only() -> None:
    assert foreign("redline.schedulers", ("redline.schedulers", "torch")) == []


def test_the_config_language_needs_pydantic_and_the_errors_only() -> None:
    allowed = ("pydantic", "pydantic_core", "redline.console", "redline.errors", "redline.config")
    assert (
        foreign(
            "redline.config",
            allowed,
            ("redline.optimizers", "redline.schedulers", "jsonschema", "referencing", "hjson"),
        )
        == []
    )


def test_no_module_imports_one_above_it() -> None:
    upwards = []
    for module in MODULES:
        ours = {name for name, _ in imports(module) if any(is_in(name, package) for package in PACKAGES)}
        if module == "redline":
            ours -= {"redline"}  # its own lazy names
        upwards += [f"{module} imports {name}" for name in sorted(ours) if level_of(name) > level_of(module)]
    assert upwards == []


def test_the_face_stands_on_the_engine_and_the_engine_does_not_know_it() -> None:
    allowed = ("redline", "torch", "deepspeed")
    for path in FACE.rglob("*.py"):
        for name, _ in _walk(ast.parse(path.read_text(encoding="utf-8")), lazy=False):
            top = name.partition(".")[0]
            assert top in allowed or top in sys.stdlib_module_names, f"{path.name} imports {name}"
    known = [module for module in MODULES for name, _ in imports(module) if is_in(name, "deepspeed")]
    assert known == []


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


def test_an_import_imports_no_more_than_it_must_and_sets_up_nothing() -> None:
    code = """
import json, logging, os, random, sys
import torch, torch.distributed, torch.nn.parallel
environment, state, draws = dict(os.environ), random.getstate(), torch.get_rng_state()
handlers = list(logging.getLogger().handlers)
torchs_own = set(sys.modules)
import redline.schedulers
with_schedulers = [name for name in sys.modules if name.startswith("redline.") and "schedulers" not in name]
extras = "matplotlib plotly plotext sklearn rich jsonschema pydantic tensorboard wandb comet_ml".split()
print(json.dumps({
    "with schedulers": with_schedulers,
    "extras": [name for name in extras if name in set(sys.modules) - torchs_own],
    "environment": dict(os.environ) == environment,
    "process group": torch.distributed.is_initialized(),
    "random": random.getstate() == state and torch.equal(torch.get_rng_state(), draws),
    "handlers": [logging.getLogger(name).handlers for name in ("redline", "redline.schedulers")],
    "root": logging.getLogger().handlers == handlers,
}))
"""
    assert json.loads(fresh_python(code)) == {
        "with schedulers": [],
        "extras": [],
        "environment": True,
        "process group": False,
        "random": True,
        "handlers": [[], []],
        "root": True,
    }


def test_a_training_run_loads_what_training_needs() -> None:
    code = """
import sys
from torch import nn, ones
from redline import initialize
settings = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
engine = initialize(nn.Linear(4, 1), settings, device="cpu")
engine.backward(engine(ones(4, 4)).mean())
engine.step()
print(*sorted(name for name in sys.modules if name.partition(".")[0] == "redline"))
"""
    loaded = fresh_python(code).split()
    assert len(loaded) <= 60, loaded
    parts = {name.split(".")[1] for name in loaded if "." in name}
    assert not parts & {"cli", "compat", "range_test", "reports", "tuning"}
    assert not {"redline.config.explain", "redline.config.report", "redline.checkpoint.deepspeed_reader"} & {*loaded}


# -- what is shipped -----------------------------------------------------------------------------------


def test_the_wheel_holds_every_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    assert sorted(listed) == sorted([*packages, "redline.compat", "redline.compat.deepspeed"])
    assert (ROOT / "engine" / "py.typed").is_file()


def test_the_wheel_holds_every_file_that_is_no_module() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package, folder in PACKAGES.items():
        held = {path for pattern in patterns.get(package, ()) for path in (ROOT / folder).glob(pattern)}
        files = {path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"}
        files -= {*(ROOT / folder / "compat" / "deepspeed").glob("*.py")}  # modules of a package of another name
        assert files - set(MODULES.values()) == {path for path in held if path.is_file() and path.suffix != ".pyc"}


def test_the_readme_names_the_torch_that_the_package_needs_and_the_one_that_scripts_install() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (oldest,) = [each.removeprefix("torch>=") for each in needed if each.startswith("torch>=")]
    installed = (ROOT / "scripts/constraints.txt").read_text().split("torch==")[1].strip()
    readme = (ROOT / "README.md").read_text()
    assert f"torch {oldest} or newer" in readme
    assert f"install torch {installed}." in readme


def test_git_ignores_no_source_file() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = [str(path.relative_to(ROOT)) for folder in ("engine", "schedulers", "tests") for path in
             sorted((ROOT / folder).rglob("*.py"))]  # fmt: skip
    done = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""


def test_the_tests_have_no_packages_that_could_shadow_the_source() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
