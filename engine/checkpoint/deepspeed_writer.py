"""DeepSpeed's files of a checkpoint, next to Redline's own: what `redline.checkpoint.format: "deepspeed"` asks for.

DeepSpeed 0.19 loads them on as many ranks and at the same ZeRO stage, and its zero_to_fp32 reads them. They are made of
the checkpoint's own files, by one process. `deepspeed_reader` says how they are laid out; after `state_dict` in
`deepspeed/runtime/zero/stage_1_and_2.py` and `stage3.py`, and `_save_checkpoint` in `runtime/engine.py`.
"""

from __future__ import annotations

import math
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from redline.checkpoint import storage
from redline.checkpoint.deepspeed_files import SCALERS
from redline.checkpoint.state import Checkpoint
from redline.errors import EngineError

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["write_deepspeed"]

_VERSION = "0.19.8"
_ALIGNMENT = 2  # the flat vectors of stages 1 and 2 have a multiple of so many elements per rank


def write_deepspeed(directory: Path, checkpoint: Checkpoint, config: EngineConfig) -> list[str]:
    """Write DeepSpeed's files into the directory of a checkpoint; returns their names.

    Needs memory for the model and its optimizer's state, as full tensors.

    Raises:
        EngineError: the optimizer's state has no place in DeepSpeed's files.
    """
    files = _Files(checkpoint, config).contents()
    for name, content in files.items():
        storage.write_file(directory / name, partial(torch.save, content, pickle_module=_PICKLE))
    return list(files)


_PurePython: Any = vars(pickle)["_Pickler"]  # the one in C looks classes up before it writes their names


class _Pickler(_PurePython):  # type: ignore[misc]
    """Writes stand-ins under DeepSpeed's names, whether it is installed or not."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj not in SCALERS:
            super().save_global(obj, name)
            return
        self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__qualname__}\n".encode())
        self.memoize(obj)


_PICKLE = SimpleNamespace(__name__="pickle", Pickler=_Pickler)  # as torch.save takes a module


class _Files:
    """What DeepSpeed would have written for a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self._checkpoint, self._config, self._shared = checkpoint, config, checkpoint.shared
        self._ranks, zero = checkpoint.world_size, config.zero_optimization
        self._stage = 0 if zero is None else zero.stage
        bf16, fp16 = config.bf16 is not None and config.bf16.enabled, config.fp16 is not None and config.fp16.enabled
        self._dtype = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
        saved = self._shared["optimizer"] or {"groups": [], "state": {}}
        if "whole" in saved:
            raise EngineError(f"optimizer {saved['type']}: its state is one object, for which DeepSpeed has no place")
        self._states: dict[str, dict[str, Any]] = saved["state"]
        frozen = set(self._shared["frozen"])
        self._groups = [
            (dict(group["settings"]), names)
            for group in saved["groups"]
            if (names := [name for name in group["weights"] if name not in frozen])
        ]

    def contents(self) -> dict[str, Any]:
        """By the name of the file."""
        if self._stage == 0:
            return {"mp_rank_00_model_states.pt": self._model(0, self._optimizers()[0] if self._groups else None)}
        prefix = "bf16_" if self._dtype is torch.bfloat16 else ""
        files: dict[str, Any] = {}
        for rank, state in enumerate(self._optimizers()):
            content = {"optimizer_state_dict": state, "ds_config": self._config.document(), "ds_version": _VERSION}
            files[f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = content
        for rank in range(self._ranks if self._stage == 3 else 1):
            name = f"zero_pp_rank_{rank}_" if self._stage == 3 else ""
            files[f"{name}mp_rank_00_model_states.pt"] = self._model(rank, None)
        return files

    # -- the model

    def _model(self, rank: int, optimizer: Any) -> dict[str, Any]:
        shared, buffers, aliases = self._shared, self._checkpoint.buffers, dict(self._checkpoint.aliases)
        zero, empty = self._stage > 0, torch.empty(0, dtype=self._dtype)
        frozen = [name for name in shared["frozen"] if name in shared["weights"]]
        fragments = {name: self._param(name) for name in frozen}
        if self._stage == 3:  # the other weights are in the optimizers' files
            fragments = {name: self._split([value])[rank] for name, value in fragments.items()}
        module = {name: empty if self._stage == 3 else self._param(name) for name in shared["weights"]}
        module |= {name: self._full(f"model.{name}") for name in buffers}
        return {
            "module": {**module, **{alias: module[name] for alias, name in aliases.items()}},
            "buffer_names": list(buffers),
            "optimizer": optimizer,
            "param_shapes": [self._shapes(names) for _, names in self._vectors()] if zero else None,
            "frozen_param_shapes": self._shapes(frozen) if zero else None,
            "shared_params": aliases if zero else None,
            "frozen_param_fragments": fragments if zero else None,
            "lr_scheduler": shared["schedule"] and shared["schedule"]["state"],
            "data_sampler": None,
            "random_ltd": None,
            **{key: shared["counters"][key] for key in ("skipped_steps", "global_steps", "global_samples")},
            "dp_world_size": self._ranks,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_config": self._config.document(),
            "ds_version": _VERSION,
            **shared["client_state"],
        }

    def _param(self, name: str) -> Tensor:
        value = self._full(f"model.{name}")
        return value.to(self._dtype) if value.is_floating_point() else value

    def _full(self, key: str) -> Tensor:
        return self._checkpoint.entries[key].read_full()

    def _shapes(self, names: list[str]) -> dict[str, torch.Size]:
        return {name: self._checkpoint.entries[f"model.{name}"].shape for name in names}

    # -- the optimizer

    def _vectors(self) -> list[tuple[int, list[str]]]:
        """Groups and names of the parameters in each vector: at stage 0 one, else a group, at stage 3 a part of one."""
        zero, found = self._config.zero_optimization, list[tuple[int, list[str]]]()
        limit = 0 if zero is None or self._stage == 0 else zero.sub_group_size if self._stage == 3 else math.inf
        for group, (_, names) in enumerate(self._groups):
            sizes = [math.ceil(shape.numel() / self._ranks) for shape in self._shapes(names).values()]
            part, size = list[str](), 0
            for name, own in zip(names, sizes):
                part, size = [*part, name], size + own
                if name == names[-1] or (size >= limit and sum(sizes) > limit):
                    found.append((group, part))
                    part, size = [], 0
        return found

    def _split(self, tensors: list[Tensor]) -> list[Tensor]:
        """A vector's shards by rank, the last of which are padded; at stage 0 the tensor itself."""
        if self._stage == 0:
            return tensors
        # At stage 3 each tensor is cut, before the vector of them is as a whole.
        unit = self._ranks * (1 if self._stage == 3 else _ALIGNMENT)
        whole = tensors if self._stage == 3 else [torch.cat([each.reshape(-1) for each in tensors])]
        padded = [pad(each.reshape(-1), (0, -each.numel() % unit)) for each in whole]
        shards = zip(*(each.chunk(self._ranks) for each in padded))
        return [torch.cat(parts) for parts in shards]

    def _optimizers(self) -> list[dict[str, Any]]:
        """The optimizer's state by rank."""
        vectors = self._vectors()
        weights = [self._split([self._full(f"model.{name}").float() for name in names]) for _, names in vectors]
        states = {place: self._state(names) for place, (_, names) in enumerate(vectors)}
        groups = []
        for group, (settings, _) in enumerate(self._groups):
            theirs = {"bias_correction": True} if "betas" in settings else {}  # which torch's Adam does not have
            members = [place for place, (owner, _) in enumerate(vectors) if owner == group]
            groups.append({**theirs, **settings, "params": members})
        found = []
        for rank in range(self._ranks):
            state = {
                place: {key: each[rank] for key, each in parts.items()} for place, parts in states.items() if parts
            }
            inner: dict[str, Any] = {"state": state, "param_groups": groups}
            if self._stage == 0:
                return [inner]
            vector = [parts[rank] for parts in weights]
            own = self._at_1(inner, vector, rank) if self._stage != 3 else {
                "optimizer_state_dict": inner, "fp32_flat_groups": vector, "partition_count": self._ranks
            }  # fmt: skip
            found.append({"zero_stage": self._stage, "overflow": False, **self._scaler(), **own})
        return found

    def _at_1(self, inner: dict[str, Any], weights: list[Tensor], rank: int) -> dict[str, Any]:
        """What only stages 1 and 2 have; the weights are without padding, the moments with it."""
        sizes = [sum(shape.numel() for shape in self._shapes(names).values()) for _, names in self._groups]
        paddings = [min(max((rank + 1) * len(own) - size, 0), len(own)) for own, size in zip(weights, sizes)]
        return {
            "base_optimizer_state": inner,
            "single_partition_of_fp32_groups": [own[: len(own) - end].clone() for own, end in zip(weights, paddings)],
            "group_paddings": paddings,
            "param_alignment_paddings": [[0] * len(names) for _, names in self._groups],
            "partition_count": [self._ranks] * len(self._groups),
            "clip_grad": self._config.gradient_clipping,
            "ds_version": _VERSION,
        }

    def _state(self, names: list[str]) -> dict[str, list[Any]]:
        """What the optimizer keeps of a vector's elements, by rank, and the count of steps."""
        kept = [{key: self._plain(value) for key, value in self._states.get(name, {}).items()} for name in names]
        steps = {float(each.pop("step")) for each in kept if "step" in each}
        if len(steps) > 1 or not all(isinstance(value, Tensor) for each in kept for value in each.values()):
            raise EngineError(f"DeepSpeed has one number of steps, and no other number, for all of {', '.join(names)}")
        found: dict[str, list[Any]] = {}
        for key in dict.fromkeys(key for each in kept for key in each):
            shapes = self._shapes(names).values()
            found[key] = self._split([each.get(key, torch.zeros(shape)).float() for each, shape in zip(kept, shapes)])
        own = self._config.optimizer
        deepspeeds = own is not None and own.type in ("Adam", "AdamW", "Lamb") and not own.arguments().get("torch_adam")
        for step in steps:  # torch's optimizers count in tensors
            found["step"] = [int(step) if deepspeeds else torch.tensor(step)] * self._ranks
        return found

    def _plain(self, value: Any) -> Any:
        return self._full(value["$tensor"]) if isinstance(value, dict) else value

    def _scaler(self) -> dict[str, Any]:
        fp16, saved = self._config.fp16, self._shared["loss_scale"]
        scaled = fp16 is not None and fp16.enabled
        moves = scaled and fp16 is not None and fp16.loss_scale == 0
        scaler = object.__new__(SCALERS[moves])
        vars(scaler).update(cur_scale=saved["value"] if scaled else 1.0, dynamic=moves)
        if moves and fp16 is not None:
            vars(scaler).update(
                cur_iter=saved["_updates"], last_overflow_iter=saved["_last_overflow"], scale_factor=2.0,
                scale_window=fp16.loss_scale_window, min_scale=fp16.min_loss_scale, delayed_shift=fp16.hysteresis,
                cur_hysteresis=saved["_patience"], consecutive_hysteresis=fp16.consecutive_hysteresis,
                raise_error_at_min_scale=True, dtype=torch.float16,
            )  # fmt: skip
        return {"loss_scaler": scaler, "dynamic_loss_scale": moves}
