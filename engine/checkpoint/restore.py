"""From a checkpoint into an engine: first all that may not fit, then the tensors beside, then everything at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.checkpoint.compare import listed, match_names
from engine.checkpoint.moments import Moments
from engine.checkpoint.opened import Opened
from engine.checkpoint.pace import Pace
from engine.checkpoint.plain import tensors_in, unpack
from engine.checkpoint.state import aliases_of, buffers_of, extra_states_of, model_tensors
from engine.errors import EngineError
from engine.log import log
from engine.randomness import reseed, set_random_state

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["Restore", "Wanted"]


@dataclass(frozen=True)
class Wanted:
    """What of a checkpoint is wanted: the arguments of `load_checkpoint`."""

    strict: bool = True
    optimizer: bool = True
    schedule: bool = True
    module_only: bool = False
    custom_load: Callable[..., Any] | None = None

    @property
    def flags(self) -> str:
        """In words, to be compared."""
        return (
            f"load_module_strict={self.strict}, load_optimizer_states={self.optimizer}, "
            f"load_lr_scheduler_states={self.schedule}, load_module_only={self.module_only}, "
            f"custom_load_fn {'given' if self.custom_load else 'not given'}"
        )


class Restore:
    """One checkpoint on its way into one engine.

    Made, it has been found to fit. Then `read`, which touches nothing in the engine and may fail, then `install`.

    Raises:
        EngineError: it does not fit the engine.
    """

    def __init__(self, engine: Engine, opened: Opened, wanted: Wanted) -> None:
        engine.put_away()
        self._engine, self._opened, self._wanted = engine, opened, wanted
        self._shared = opened.shared
        self._saved = {key.removeprefix("model."): entry for key, entry in opened.entries.items()
                       if key.startswith("model.")}  # fmt: skip
        self._targets: dict[str, Tensor] = {}
        self._sources: dict[str, str] = {}
        packed: list[Any] = [self._shared["client_state"], self._shared["extra_state"]]
        if wanted.custom_load is None:
            self._plan_model()
        else:
            self._plan_custom()
        self._moments: Moments | None = None
        self._pace: Pace | None = None
        if not wanted.module_only:
            settings = wanted.optimizer and engine.optimizer is not None and self._shared["optimizer"] is not None
            self._pace = Pace(engine, self._shared, states=wanted.schedule, settings=settings)
            if wanted.optimizer and engine.optimizer is not None:
                self._moments = Moments(engine, self._shared, strict=wanted.strict)
                self._targets |= self._moments.targets(opened.entries)
            packed += [self._shared[key] for key in ("optimizer", "schedule", "loss_scale", "data")]
            self._check_data()
        for key in tensors_in(packed):
            if key not in self._targets:
                entry = opened.entries[key]
                self._targets[key] = torch.empty(entry.size, dtype=entry.properties.dtype)

    @property
    def folder(self) -> Path:
        """The checkpoint's."""
        return self._opened.found.folder

    # -- what may not fit ------------------------------------------------------------------------

    def _plan_model(self) -> None:
        module = self._engine.module
        tensors = model_tensors(self._engine)
        names = match_names(tensors, self._saved, aliases_of(module), self._shared["aliases"])
        if names.missing or names.unexpected:
            self._judge(names.missing, names.unexpected)
        wrong = [
            f"{name} is {list(self._saved[source].size)} in the checkpoint, {list(tensors[name].shape)} in the model"
            for name, source in names.sources.items()
            if self._saved[source].size != tensors[name].shape
        ]
        if wrong:
            raise EngineError(f"{self.folder}: {listed(wrong, sign='; ')}; build the model that was saved")
        self._sources = names.sources
        # Beside the engine's own, so that a file that cannot be read leaves it as it is: for a moment this takes the
        # memory that gradients will take.
        for name, source in names.sources.items():
            self._targets[f"model.{source}"] = torch.empty_like(tensors[name].detach())

    def _judge(self, missing: list[str], unexpected: list[str]) -> None:
        left_out = set(self._shared["left_out"])
        said = []
        if excluded := [name for name in missing if name in left_out]:
            said.append(f"it was saved with exclude_frozen_parameters, without {listed(excluded)}")
        if absent := [name for name in missing if name not in left_out]:
            said.append(f"it lacks {listed(absent)}, which the model has")
        if unexpected:
            said.append(f"it has {listed(unexpected)}, which the model lacks")
        text = f"{self.folder}: {'; '.join(said)}"
        if self._wanted.strict:
            raise EngineError(
                f"{text}; build the model that was saved, or load what both have: load_module_strict=False"
            )
        log.warning("load_checkpoint: %s; what both have is loaded", text)

    def _plan_custom(self) -> None:
        if any(hasattr(tensor, "placements") for tensor in self._engine.module.parameters()):
            raise EngineError(
                "custom_load_fn: it is given whole weights, and this model is shared out among processes; load without "
                "it, or change the names of the weights before the checkpoint is saved"
            )
        for name, entry in self._saved.items():
            self._targets[f"model.{name}"] = torch.empty(entry.size, dtype=entry.properties.dtype)

    def _check_data(self) -> None:
        loader, saved = self._engine.training_dataloader, self._shared["data"]
        if (loader is None) != (saved is None) and self._shared["counters"]["global_steps"]:
            log.warning(
                "load_checkpoint: %s; the data begin anew",
                "the checkpoint has no place in the data, and the engine has training_data" if saved is None
                else "the checkpoint has a place in the data, and the engine has no training_data of its own",
            )  # fmt: skip
        if loader is not None and saved is not None and loader.state_dict().keys() - saved.keys():
            raise EngineError(
                f"{self.folder}: its place in the data is of another kind of dataset: {listed(sorted(saved))}; give "
                f"initialize a dataset of that kind, which has {listed(sorted(loader.state_dict()))}; or load without "
                "it: load_module_only=True"
            )

    # -- what comes then -------------------------------------------------------------------------

    def read(self) -> None:
        """Read all tensors, beside what the engine has.

        Raises:
            Broken: a file holds anything but the tensors it should.
        """
        from engine.checkpoint.tensors import read  # see there

        read(self.folder, self._opened.metadata, self._targets)

    @torch.no_grad()
    def install(self) -> dict[str, Any]:
        """Put everything into the engine; the script's `client_state`."""
        engine, shared = self._engine, self._shared
        client_state: dict[str, Any] = unpack(shared["client_state"], self._targets)
        for name, module in extra_states_of(engine.module):
            if name in shared["extra_state"]:
                module.set_extra_state(unpack(shared["extra_state"][name], self._targets))
        manifest = self._opened.found.manifest
        engine.drop_update()
        self._install_model()
        if not self._wanted.module_only:
            if self._moments is not None:
                self._moments.install(self._targets)
            if self._pace is not None:
                self._pace.install(self._targets)
            self._install_counters()
            if self._opened.is_own:
                set_random_state(self._opened.own["random"])
            else:
                reseed(self._opened.own["random"], engine.global_rank)
        log.info(
            "load_checkpoint: %s, after update %d, saved by %d process%s",
            self.folder, manifest.step, manifest.world_size, "es" if manifest.world_size > 1 else "",
        )  # fmt: skip
        return client_state

    def _install_model(self) -> None:
        engine = self._engine
        if self._wanted.custom_load is not None:
            source = {name: self._targets.pop(f"model.{name}") for name in self._saved}
            self._wanted.custom_load(src=source, dst=engine.module)
            if engine._masters is not None:
                engine._masters.copy_from_model()
        else:
            tensors = model_tensors(engine)
            for name, source_name in self._sources.items():
                tensors[name].copy_(self._targets[f"model.{source_name}"])
            for key in {f"model.{source_name}" for source_name in self._sources.values()}:
                del self._targets[key]
        if engine._precision.publish is not None:
            engine._precision.publish()
        if self._opened.is_own and self._opened.found.manifest.world_size == engine.world_size:
            buffers = buffers_of(engine.module)
            for name, value in self._opened.own.get("buffers", {}).items():
                if name in buffers and buffers[name].shape == value.shape:
                    buffers[name].copy_(value)

    def _install_counters(self) -> None:
        engine, counters = self._engine, self._shared["counters"]
        engine.global_steps = counters["global_steps"]
        engine.global_samples = counters["global_samples"]
        engine.micro_steps = counters["micro_steps"]
        accumulation = engine.gradient_accumulation_steps()
        if self._shared["batch"]["gradient_accumulation_steps"] != accumulation:
            engine.micro_steps = engine.global_steps * accumulation  # scripts divide one by the other
        engine._skipped = counters["skipped_steps"]
        engine._last_loss = engine._optimizer_step.grad_norm = None
        if engine.scaler is not None and self._shared["loss_scale"] is not None:
            state = unpack(self._shared["loss_scale"], self._targets)
            if not engine.scaler.dynamic:
                state["value"] = engine.scaler.value  # the config's
            engine.scaler.load_state_dict(state)
        loader = engine.training_dataloader
        if loader is not None and self._shared["data"] is not None:
            loader.load_state_dict(unpack(self._shared["data"], self._targets))
            engine._settled_position = loader.position
