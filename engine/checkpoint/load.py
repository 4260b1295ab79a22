"""Loading a checkpoint: find an intact one, check it against the run, read it, and only then change the run.

A checkpoint of Redline's is verified against its manifest; one that is damaged is reported, and the newest intact one
is loaded instead. A checkpoint of DeepSpeed's goes the same way, but has no checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from redline.checkpoint import storage
from redline.checkpoint.deepspeed_files import is_deepspeed
from redline.checkpoint.deepspeed_reader import DeepSpeedCheckpoint
from redline.checkpoint.optimizer_state import OptimizerLoad, listed, plan_schedule
from redline.checkpoint.ranks import RankGroup
from redline.checkpoint.state import Checkpoint
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

__all__ = ["LoadOptions", "load_checkpoint", "open_checkpoint"]

_LOOKS = 20  # at a directory in which another process saves so often that checkpoints are removed while they are read
_SHOWN = 4  # files of one checkpoint that are not intact


@dataclass(frozen=True)
class LoadOptions:
    """What to load: the arguments of `Engine.load_checkpoint`."""

    strict: bool = True
    optimizer: bool = True
    schedule: bool = True
    module_only: bool = False
    custom_load: Callable[..., Any] | None = None

    def __str__(self) -> str:
        values = {**vars(self), "custom_load": self.custom_load is not None}  # a function has another address per rank
        return ", ".join(f"{name}={value}" for name, value in values.items())


def load_checkpoint(
    run: Run, config: EngineConfig, load_dir: str | Path, tag: str | None, options: LoadOptions
) -> tuple[str | None, dict[str, Any] | None]:
    """See :meth:`redline.Engine.load_checkpoint`."""
    ranks = RankGroup("load_checkpoint", run.global_rank, run.world_size)
    parent, tag = Path(load_dir), None if tag is None else str(tag)
    look = _look_together(ranks, parent, tag, options)
    for _ in range(_LOOKS):
        before, problems = look, list(look.problems)
        for candidate in before.candidates:
            checkpoint, found = _open(ranks, parent, candidate)
            if checkpoint is not None and not found:
                load = _Load(run, config, checkpoint, options)
                found = _unique(ranks.run(load.read))
                if not found:
                    if problems:
                        log.warning(
                            "load_checkpoint: %s; %s, the newest that is whole, is loaded instead",
                            "; ".join(problems), candidate,
                        )  # fmt: skip
                    load.apply(ranks)
                    return str(parent / candidate), checkpoint.shared["client_state"]
            problems += found
            # Another process may save here, and remove what was about to be read: then there is a newer one.
            look = _look_together(ranks, parent, tag, options)
            if look != before:
                break
        if look == before:
            break
    if problems:
        others = f"; the tags in {parent} are {', '.join(storage.tags(parent)) or 'none'}" if tag is not None else ""
        raise EngineError(f"load_checkpoint: {'; '.join(problems)}{others}")
    return None, None


# -- finding an intact checkpoint -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What there is to load: the tags to try, best first, when each was saved, and what is wrong already."""

    candidates: list[str]
    times: dict[str, float]
    problems: list[str]


def _look_together(ranks: RankGroup, parent: Path, tag: str | None, options: LoadOptions) -> _Look:
    """What rank 0 sees; EngineError if the ranks were called with different arguments."""
    seen = ranks.run(lambda: (tag, str(options), _look(parent, tag)))
    first = seen[0]
    for rank, (other, text, _) in enumerate(seen):
        if (other, text) != first[:2]:
            raise EngineError(
                f"load_checkpoint: called with tag {first[0]!r} and {first[1]} on rank 0, with tag {other!r} and "
                f"{text} on rank {rank}; expected the same on all ranks"
            )
    look = first[2]
    if not look.candidates and not look.problems:
        found = storage.tags(parent)
        hint = f"; tags that were saved with save_latest=False have to be named: {', '.join(found)}" if found else ""
        log.warning("load_checkpoint: no checkpoint in %s: nothing is loaded%s", parent, hint)
    return look


def _look(parent: Path, tag: str | None) -> _Look:
    if tag is not None:
        try:
            return _Look([tag], {tag: storage.find(parent, tag)[1].time}, [])
        except CorruptCheckpoint:
            return _Look([tag], {}, [])
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
    others = sorted(valid, key=lambda tag: (valid[tag].time, valid[tag].step), reverse=True)
    if others and not any_tag:
        problems = [f"{parent / storage.LATEST} is not there"]
    if others or any_tag:
        others += [tag for tag, each in found.items() if each is None]  # to be named, if nothing else is intact
    candidates = list(dict.fromkeys([*([latest] if latest else []), *others]))
    return _Look(candidates, {tag: each.time for tag, each in valid.items()}, problems)


def open_checkpoint(
    parent: Path, tag: str, *, rank: int = 0, world_size: int = 1
) -> tuple[Checkpoint | DeepSpeedCheckpoint, Manifest | None]:
    """A checkpoint, verified as far as that is possible, of which each rank verifies a part of the files.

    Raises:
        CorruptCheckpoint: it is not there, or not intact.
        EngineError: DeepSpeed wrote it, and it cannot be read.
    """
    if is_deepspeed(parent / tag):
        return DeepSpeedCheckpoint(parent / tag), None
    directory, manifest = storage.find(parent, tag)
    if problems := storage.verify_files(directory, manifest, rank=rank, world_size=world_size):
        more = f"; {len(problems) - _SHOWN} more such files" if len(problems) > _SHOWN else ""
        raise CorruptCheckpoint("; ".join(problems[:_SHOWN]) + more)
    return Checkpoint(directory, manifest, rank), manifest


def _open(ranks: RankGroup, parent: Path, tag: str) -> tuple[Checkpoint | DeepSpeedCheckpoint | None, list[str]]:
    """A checkpoint, if it is intact on all ranks, and what is wrong."""
    opened: list[Checkpoint | DeepSpeedCheckpoint] = []

    def open_on_rank() -> tuple[Manifest | None, str]:
        try:
            checkpoint, manifest = open_checkpoint(parent, tag, rank=ranks.rank, world_size=ranks.world_size)
        except CorruptCheckpoint as error:
            return None, str(error)
        opened.append(checkpoint)
        return manifest, ""

    results = ranks.run(open_on_rank)
    problems = _unique(problem for _, problem in results)
    if not problems and any(manifest != results[0][0] for manifest, _ in results):
        problems = [f"{parent / tag} is not the same on all ranks; load_dir has to be one directory for all"]
    return (opened[0] if opened else None), problems


def _unique(problems: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(problem for problem in problems if problem))


# -- checking, reading, applying ------------------------------------------------------------------------


def match_names(
    model: Iterable[str], saved: Iterable[str], model_aliases: Mapping[str, str], saved_aliases: Mapping[str, str]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Match names of tensors, each in `model` and in `saved` once; a tied one by any of its further names.

    Returns:
        The name in the checkpoint, for each name of the model that it has; names of the model that the checkpoint
        lacks; names of the checkpoint that the model lacks.
    """
    model, saved = list(model), list(saved)
    stored = {name: name for name in saved}
    stored = {alias: name for alias, name in saved_aliases.items() if name in stored} | stored
    names = {name: name for name in model} | dict(model_aliases)
    sources = {name: stored[name] for name in model if name in stored}
    for alias, name in model_aliases.items():
        if name in names and alias in stored:
            sources.setdefault(name, stored[alias])
    known = {*names, *sources.values()}
    missing = [name for name in model if name not in sources]
    return sources, missing, [name for name in saved if name not in known]


class _Load:
    """One checkpoint on its way into one run: `read`, and `apply`, which alone changes the run."""

    def __init__(
        self, run: Run, config: EngineConfig, checkpoint: Checkpoint | DeepSpeedCheckpoint, options: LoadOptions
    ) -> None:
        self._run, self._config, self._checkpoint, self._options = run, config, checkpoint, options
        self._shared, self._entries = checkpoint.shared, checkpoint.entries
        self._saved = [key.removeprefix("model.") for key in checkpoint.entries if key.startswith("model.")]
        self._sources: dict[str, str] = {}
        self._targets: dict[str, Tensor] = {}
        self._optimizer: OptimizerLoad | None = None
        self._own_buffers: dict[str, Tensor] = {}  # values that only this rank had
        self._place_schedule: Callable[[], None] = lambda: None

    def read(self) -> str:
        """Check it against the run, and read all tensors into new memory; what is wrong with the files, if anything.

        Raises:
            EngineError: it does not match the run.
        """
        checkpoint = self._checkpoint
        try:
            self._check()
            for key, target in self._targets.items():
                self._entries[key].read_into(target)
            if not checkpoint.is_unchanged():
                return f"{checkpoint.directory}: it was replaced while it was read"
        except CorruptCheckpoint as error:
            return str(error)
        except (LookupError, TypeError, AttributeError) as error:
            return f"{checkpoint.directory}: it does not contain what a checkpoint does: {error!r}"
        return ""

    def _check(self) -> None:
        """Find out whether it matches the run; EngineError if it does not."""
        run, options, shared = self._run, self._options, self._shared
        run.reshard()
        if options.custom_load is None:
            self._check_model()
        elif any(map(is_sharded, run.module.parameters())):
            raise EngineError(
                "custom_load_fn: it gets full tensors, and the model's parameters are sharded over ranks; load without "
                "it, or use a lower ZeRO stage"
            )
        else:
            for key in (f"model.{name}" for name in self._saved):
                self._targets[key] = torch.empty(self._entries[key].shape, dtype=self._entries[key].dtype)
        checkpoint, buffers = self._checkpoint, named_buffers(run.module)
        if checkpoint.has_own_state and checkpoint.world_size == run.world_size:
            own = checkpoint.rank_state.get("buffers", {}).items()
            self._own_buffers = {key: each for key, each in own if key in buffers and each.shape == buffers[key].shape}
        if options.module_only:
            return
        if options.optimizer and run.optimizer is not None:
            weights = named_weights(run)
            saved = self._checkpoint.optimizer_state(run.optimizer, weights)
            scheduled = run.lr_scheduler is not None or shared["schedule"] is not None
            if saved is None:
                log.warning("load_checkpoint: the checkpoint has no optimizer state; the optimizer starts anew")
            else:
                self._optimizer = OptimizerLoad(
                    run.optimizer, weights, saved, strict=options.strict, scheduled=scheduled
                )
                self._targets |= self._optimizer.targets(self._entries)
        settings = self._optimizer is not None and self._optimizer.has_settings
        self._place_schedule = plan_schedule(run, self._config, shared, states=options.schedule, settings=settings)
        if checkpoint.rank_state:  # DeepSpeed saves no position in the data either
            self._check_data(run.training_dataloader, shared["data"])

    def _check_model(self) -> None:
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
        run, schedule, optimizer = self._run, self._run.lr_scheduler, self._run.optimizer
        calls_script = (
            self._options.custom_load is not None
            or any(extra_state_modules(run.module))
            or (schedule is not None and not is_built_in(schedule))
            or (optimizer is not None and type(optimizer).state_dict is not Optimizer.state_dict)
        )
        before = RunState(run, data=[run.training_dataloader], model=calls_script)
        try:
            ranks.run(lambda: self._apply(tensors=calls_script))
        except EngineError as error:
            before.restore()
            raise EngineError(
                f"{error}; {self._checkpoint.directory} is not loaded, the engine is as it was"
            ) from error
        if not calls_script:  # last, and nothing can fail any more: so no copy of the old tensors is needed
            self._copy_tensors()
        self._targets.clear()
        run.copy_master_to_model()  # may be a collective
        log.info("load_checkpoint: %s, %s", self._checkpoint.directory, self._checkpoint.description)

    @torch.no_grad()
    def _copy_tensors(self) -> None:
        tensors = named_tensors(self._run)
        for name, source in self._sources.items():
            tensors[name].copy_(self._targets[f"model.{source}"])
        for name, value in self._own_buffers.items():
            tensors[name].copy_(value)

    @torch.no_grad()
    def _apply(self, *, tensors: bool) -> None:
        run, checkpoint = self._run, self._checkpoint
        for name, module in extra_state_modules(run.module):
            if name in self._shared["extra_state"]:
                module.set_extra_state(self._shared["extra_state"][name])
        run.drop_update()
        if self._options.custom_load is not None:
            source = {name: self._targets.pop(f"model.{name}") for name in self._saved}
            source |= {alias: source[name] for alias, name in checkpoint.aliases.items() if name in source}
            self._options.custom_load(src=source, dst=run.module)
            if run.master_params is not None:
                run.master_params.copy_from_model()
        if tensors:
            self._copy_tensors()
        if self._options.module_only:
            return
        if self._optimizer is not None:
            self._optimizer.apply(self._targets)
        self._place_schedule()
        load_progress(run, self._shared)
        if checkpoint.has_own_state:
            set_random_state(checkpoint.rank_state["random"])
        elif checkpoint.rank_state:
            reseed(checkpoint.rank_state["random"], run.global_rank)
