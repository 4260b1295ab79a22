"""Loading a checkpoint: find an intact one, check it against the run, read it, and only then change the run.

A checkpoint of Redline's is verified against its manifest; one that is damaged is reported, and the newest intact one
is loaded instead. A checkpoint of DeepSpeed's goes the same way, but has no checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from redline.checkpoint import storage
from redline.checkpoint.deepspeed_files import is_deepspeed
from redline.checkpoint.deepspeed_reader import DeepSpeedCheckpoint
from redline.checkpoint.optimizer_state import plan_optimizer, plan_schedule
from redline.checkpoint.ranks import RankGroup
from redline.checkpoint.state import Checkpoint, listed
from redline.checkpoint.storage import CorruptCheckpoint, Manifest
from redline.checkpoint.tensors import is_sharded
from redline.errors import EngineError
from redline.log import log
from redline.random_state import reseed, set_random_state
from redline.run_state import (
    Run,
    RunState,
    aliases_of,
    extra_state_modules,
    load_progress,
    named_buffers,
    named_tensors,
    named_weights,
)  # fmt: skip
from redline.schedulers.schedule import is_built_in

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["AnyCheckpoint", "LoadOptions", "load_checkpoint", "open_checkpoint"]

AnyCheckpoint = Checkpoint | DeepSpeedCheckpoint
Look = tuple[list[tuple[str, float]], list[str]]  # tags to try, with the time of each, and what is wrong already

# Checkpoints that are tried. Next to a process that saves and removes, each that is gone makes place for a newer one.
_TRIES = 1000


@dataclass(frozen=True)
class LoadOptions:
    """What to load: the arguments of `Engine.load_checkpoint`."""

    strict: bool = True
    optimizer: bool = True
    schedule: bool = True
    module_only: bool = False
    custom_load: Callable[..., Any] | None = field(default=None, repr=False)  # its address differs between ranks


def load_checkpoint(
    run: Run, config: EngineConfig, load_dir: str | Path, tag: str | None, options: LoadOptions
) -> tuple[str | None, dict[str, Any] | None]:
    """See :meth:`redline.Engine.load_checkpoint`."""
    ranks = RankGroup("load_checkpoint", run.global_rank, run.world_size)
    parent, tag = Path(load_dir), None if tag is None else str(tag)
    failed: dict[tuple[str, float], str] = {}
    for _ in range(_TRIES):
        # Again after each failure: another process may save here, and remove what was about to be read.
        candidates, problems = _look_together(ranks, parent, tag, options)
        problems += [failed[each] for each in candidates if each in failed]
        candidate = next((each for each in candidates if each not in failed), None)
        if candidate is None:
            break
        checkpoint, problem = _open_together(ranks, parent, candidate[0])
        if checkpoint is not None and not problem:
            load = _Load(run, config, checkpoint, options)
            problem = _joined(ranks.run(load.read))
            if not problem:
                if problems:
                    text = "load_checkpoint: %s; %s, the newest that is whole, is loaded instead"
                    log.warning(text, "; ".join(problems), candidate[0])
                load.apply(ranks)
                return str(parent / candidate[0]), checkpoint.shared["client_state"]
        failed[candidate] = problem
    found = ""
    with suppress(OSError):
        found = ", ".join(sorted(storage.manifests(parent)))
    if problems:
        others = f"; the tags in {parent} are {found or 'none'}" if tag is not None else ""
        raise EngineError(f"load_checkpoint: {'; '.join(problems)}{others}")
    hint = f"; tags that were saved with save_latest=False have to be named: {found}" if found else ""
    log.warning("load_checkpoint: no checkpoint in %s: nothing is loaded%s", parent, hint)
    return None, None


# -- finding an intact checkpoint -----------------------------------------------------------------------


def _look_together(ranks: RankGroup, parent: Path, tag: str | None, options: LoadOptions) -> Look:
    """What rank 0 sees; EngineError if the ranks were called with different arguments."""
    called = f"{options}{'' if options.custom_load is None else ' and a custom_load_fn'}"
    seen = ranks.run(lambda: ((tag, called), _look(parent, tag)))
    first, look = seen[0]
    for rank, (other, _) in enumerate(seen):
        if other != first:
            raise EngineError(
                f"load_checkpoint: called with tag {first[0]!r} and {first[1]} on rank 0, with tag {other[0]!r} and "
                f"{other[1]} on rank {rank}; expected the same on all ranks"
            )
    return look


def _look(parent: Path, tag: str | None) -> Look:
    """What there is to load, best first."""
    if tag is not None:
        try:
            return [(tag, storage.find(parent, tag)[1].time)], []
        except CorruptCheckpoint:
            return [(tag, 0.0)], []
    problems, latest = [], None
    try:
        latest = storage.read_latest(parent)
    except EngineError as error:
        problems = [str(error)]
    found = storage.manifests(parent)
    # Without `latest`, which a process that is killed in its very first save leaves behind, only checkpoints count that
    # were to be the latest.
    any_tag = latest is not None or bool(problems)
    valid = {tag: each for tag, each in found.items() if each is not None and (any_tag or each.latest)}
    tags = sorted(valid, key=lambda tag: (valid[tag].time, valid[tag].step), reverse=True)
    if tags and not any_tag:
        problems = [f"{parent / storage.LATEST} is not there"]
    if tags or any_tag:
        tags += [tag for tag, each in found.items() if each is None]  # to be named, if nothing else is intact
    tags = list(dict.fromkeys([*([latest] if latest else []), *tags]))
    return [(tag, valid[tag].time if tag in valid else 0.0) for tag in tags], problems


def open_checkpoint(
    parent: Path, tag: str, *, rank: int = 0, world_size: int = 1
) -> tuple[AnyCheckpoint, Manifest | None]:
    """A checkpoint, verified as far as that is possible, of which each rank verifies a part of the files.

    Raises:
        CorruptCheckpoint: it is not there, or not intact.
        EngineError: DeepSpeed wrote it, and it cannot be read.
    """
    if is_deepspeed(parent / tag):
        return DeepSpeedCheckpoint(parent / tag), None
    directory, manifest = storage.find(parent, tag)
    if problems := storage.verify_files(directory, manifest, rank=rank, world_size=world_size):
        raise CorruptCheckpoint(listed(problems, separator="; "))
    return Checkpoint(directory, manifest, rank), manifest


def _open_together(ranks: RankGroup, parent: Path, tag: str) -> tuple[AnyCheckpoint | None, str]:
    """A checkpoint, if it is intact on all ranks, and what is wrong."""
    opened: list[AnyCheckpoint] = []

    def open_on_rank() -> tuple[Manifest | None, str]:
        try:
            checkpoint, manifest = open_checkpoint(parent, tag, rank=ranks.rank, world_size=ranks.world_size)
        except CorruptCheckpoint as error:
            return None, str(error)
        opened.append(checkpoint)
        return manifest, ""

    results = ranks.run(open_on_rank)
    problem = _joined(text for _, text in results)
    if not problem and any(manifest != results[0][0] for manifest, _ in results):
        problem = f"{parent / tag} is not the same on all ranks; load_dir has to be one directory for all"
    return (opened[0] if opened else None), problem


def _joined(problems: Iterable[str]) -> str:
    """The problems of all ranks, each once."""
    return "; ".join(dict.fromkeys(problem for problem in problems if problem))


# -- checking, reading, applying ------------------------------------------------------------------------


def match_names(
    model: Iterable[str], saved: Iterable[str], model_aliases: Mapping[str, str], saved_aliases: Mapping[str, str]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Match names of tensors, each in `model` and in `saved` once; a tied one by any of its further names.

    Returns:
        The name in the checkpoint, for each name of the model that it has; names of the model that the checkpoint
        lacks; names of the checkpoint that the model lacks.
    """
    saved = list(saved)
    names = {name: [name] for name in model}
    for alias, name in model_aliases.items():
        names.get(name, []).append(alias)
    stored = {alias: name for alias, name in saved_aliases.items() if name in saved} | {name: name for name in saved}
    sources = {name: stored[each] for name in names for each in reversed(names[name]) if each in stored}
    known = {*sources.values(), *(each for tied in names.values() for each in tied)}
    return sources, [name for name in names if name not in sources], [name for name in saved if name not in known]


class _Load:
    """One checkpoint on its way into one run: `read`, and `apply`, which alone changes the run."""

    def __init__(self, run: Run, config: EngineConfig, checkpoint: AnyCheckpoint, options: LoadOptions) -> None:
        self._run, self._config, self._checkpoint, self._options = run, config, checkpoint, options
        self._shared, self._entries = checkpoint.shared, checkpoint.entries
        self._saved = [key.removeprefix("model.") for key in checkpoint.entries if key.startswith("model.")]
        self._sources: dict[str, str] = {}  # the name in the checkpoint, for each of the model's
        self._own_buffers: dict[str, Tensor] = {}  # values that only this rank had
        self._targets: dict[str, Tensor] = {}  # what is read, by key
        self._steps: list[Callable[[], None]] = []  # what then changes the run
        schedule, optimizer = run.lr_scheduler, run.optimizer
        self._calls_script = (
            options.custom_load is not None
            or any(extra_state_modules(run.module))
            or (schedule is not None and not is_built_in(schedule))
            or (optimizer is not None and type(optimizer).state_dict is not Optimizer.state_dict)
        )

    def read(self) -> str:
        """Check it against the run, and read all tensors into new memory; what is wrong with the files, if anything.

        Raises:
            EngineError: it does not match the run.
        """
        checkpoint = self._checkpoint
        try:
            self._plan()
            for key, target in self._targets.items():
                self._entries[key].read_into(target)
            return "" if checkpoint.is_unchanged() else f"{checkpoint.directory}: it was replaced while it was read"
        except CorruptCheckpoint as error:
            return str(error)
        except (LookupError, TypeError, AttributeError) as error:
            return f"{checkpoint.directory}: it does not contain what a checkpoint does: {error!r}"

    def _plan(self) -> None:
        """Find out whether it matches the run, what to read, and what to do then."""
        run, options, shared, checkpoint = self._run, self._options, self._shared, self._checkpoint
        run.reshard()
        self._steps = [self._load_extra_state, run.drop_update]
        if options.custom_load is None:
            self._plan_model()
        elif any(map(is_sharded, run.module.parameters())):
            raise EngineError(
                "custom_load_fn: it gets full tensors, and the model's parameters are sharded over ranks; load without "
                "it, or use a lower ZeRO stage"
            )
        else:
            for key in (f"model.{name}" for name in self._saved):
                self._targets[key] = torch.empty(self._entries[key].shape, dtype=self._entries[key].dtype)
            self._steps.append(self._load_custom)
        if checkpoint.has_own_state and checkpoint.world_size == run.world_size:
            own, buffers = checkpoint.rank_state.get("buffers", {}).items(), named_buffers(run.module)
            self._own_buffers = {key: each for key, each in own if key in buffers and each.shape == buffers[key].shape}
        if self._calls_script:
            self._steps.append(self._copy_model)
        if options.module_only:
            return
        has_settings = False
        if options.optimizer and run.optimizer is not None:
            weights = named_weights(run)
            if (saved := checkpoint.optimizer_state(run.optimizer, weights)) is None:
                log.warning("load_checkpoint: the checkpoint has no optimizer state; the optimizer starts anew")
            else:
                scheduled = run.lr_scheduler is not None or shared["schedule"] is not None
                targets, load_optimizer = plan_optimizer(
                    run.optimizer, weights, saved, self._entries, strict=options.strict, scheduled=scheduled
                )
                self._targets |= targets
                self._steps.append(load_optimizer)
                has_settings = any(group["settings"] for group in saved["groups"])
        self._steps += plan_schedule(run, self._config, shared, states=options.schedule, settings=has_settings)
        if checkpoint.rank_state:  # DeepSpeed saves no position in the data either
            self._check_data(run.training_dataloader, shared["data"])
        self._steps += [lambda: load_progress(run, shared), self._load_random_state]

    def _plan_model(self) -> None:
        checkpoint, tensors = self._checkpoint, named_tensors(self._run)
        aliases = aliases_of(self._run.module)
        self._sources, missing, unexpected = match_names(tensors, self._saved, aliases, checkpoint.aliases)
        excluded = [name for name in missing if name in checkpoint.left_out]
        absent = [name for name in missing if name not in excluded]
        texts = {
            f"was saved with exclude_frozen_parameters, without {listed(excluded)}": excluded,
            f"lacks {listed(absent)}, which the model has": absent,
            f"has {listed(unexpected)}, which the model lacks": unexpected,
        }
        if missing or unexpected:
            text = f"{checkpoint.directory}: " + "; ".join(f"it {text}" for text, names in texts.items() if names)
            if self._options.strict:
                raise EngineError(
                    f"{text}; build the model that was saved, or load what both have: load_module_strict=False"
                )
            log.warning("load_checkpoint: %s; what both have is loaded", text)
        wrong = []
        for name, source in self._sources.items():
            now, then = tensors[name], self._entries[f"model.{source}"]
            if now.shape != then.shape:
                wrong.append(f"{name} is {list(then.shape)} in the checkpoint, {list(now.shape)} in the model")
            # Not the model's own, so that a file that cannot be read leaves it as it was. For a moment this takes as
            # much memory as gradients will take.
            self._targets[f"model.{source}"] = torch.empty_like(now.detach())
        if wrong:
            raise EngineError(
                f"{checkpoint.directory}: {listed(wrong, separator='; ')}; build the model that was saved"
            )

    def _check_data(self, loader: Any, saved: Mapping[str, Any] | None) -> None:
        if (loader is None) != (saved is None) and self._shared["counters"]["global_steps"]:
            has, lacks = ("engine", "checkpoint") if saved is None else ("checkpoint", "engine")
            log.warning(
                "load_checkpoint: the %s has a position in training_data, and the %s has none; the data start from the "
                "beginning", has, lacks,
            )  # fmt: skip
        if loader is not None and saved is not None and loader.state_dict().keys() - saved.keys():
            raise EngineError(
                f"{self._checkpoint.directory}: its position in the data is of another kind of dataset: "
                f"{listed(sorted(saved))}; give initialize a dataset of that kind, not one with "
                f"{listed(sorted(loader.state_dict()))}; or load without it: load_module_only=True"
            )

    def apply(self, ranks: RankGroup) -> None:
        """Change the run on all ranks, or on none: code of the script may fail on one."""
        run, directory = self._run, self._checkpoint.directory
        before = RunState(run, data=[run.training_dataloader], model=self._calls_script)
        try:
            ranks.run(self._apply)
        except EngineError as error:
            before.restore()
            raise EngineError(f"{error}; {directory} is not loaded, the engine is as it was") from error
        if not self._calls_script:  # last, and nothing can fail any more: so no copy of the old tensors is needed
            self._copy_model()
        self._targets.clear()
        run.copy_master_to_model()  # may be a collective
        log.info("load_checkpoint: %s, %s", directory, self._checkpoint.description)

    @torch.no_grad()
    def _apply(self) -> None:
        for step in self._steps:
            step()

    @torch.no_grad()
    def _copy_model(self) -> None:
        tensors = named_tensors(self._run)
        for name, source in self._sources.items():
            tensors[name].copy_(self._targets[f"model.{source}"])
        for name, value in self._own_buffers.items():
            tensors[name].copy_(value)

    def _load_extra_state(self) -> None:
        for name, module in extra_state_modules(self._run.module):
            if name in self._shared["extra_state"]:
                module.set_extra_state(self._shared["extra_state"][name])

    def _load_custom(self) -> None:
        source = {name: self._targets.pop(f"model.{name}") for name in self._saved}
        source |= {alias: source[name] for alias, name in self._checkpoint.aliases.items() if name in source}
        assert self._options.custom_load is not None
        self._options.custom_load(src=source, dst=self._run.module)
        if self._run.master_params is not None:
            self._run.master_params.copy_from_model()

    def _load_random_state(self) -> None:
        if self._checkpoint.has_own_state:
            set_random_state(self._checkpoint.rank_state["random"])
        elif self._checkpoint.rank_state:
            reseed(self._checkpoint.rank_state["random"], self._run.global_rank)
