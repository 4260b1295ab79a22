"""A checkpoint of DeepSpeed's that looks like one of Redline's.

At stage 0 one file has the model and the optimizer. At stages 1 and 2 each parameter group is one flat vector of fp32
weights, cut into as many equal parts as there were ranks; the last may be padded, and with `parameter_alignment` there
is padding between parameters. At stage 3 each parameter is cut on its own, rounded up, and each rank's file has its
shards of all parameters, one flat vector per subgroup. After `_get_zero_param_shapes` in `deepspeed/runtime/engine.py`,
`state_dict` in `runtime/zero/stage_1_and_2.py`, `stage3.py`, `runtime/bf16_optimizer.py` and
`runtime/fp16/*_optimizer.py`, and after the files that these write.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from redline.checkpoint.deepspeed_files import FlatTensor, MappedFiles
from redline.checkpoint.optimizer_state import UNKNOWN, plain_settings
from redline.checkpoint.state import plain_copy
from redline.checkpoint.storage import CorruptCheckpoint
from redline.checkpoint.tensors import StoredTensor
from redline.config import load_config
from redline.errors import ConfigError, EngineError
from redline.log import log

__all__ = ["DeepSpeedCheckpoint"]

_OPTIMIZER = "optimizer_state_dict"
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum", "max_exp_avg_sq")  # flat as the weights are
_TENSORS = ("module", "optimizer", "frozen_param_fragments")  # where a model's file has its tensors
_WITHOUT = "load with load_optimizer_states=False"

# What DeepSpeed saves next to the script's client_state.
_OWN = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "num_experts", "ds_autoep_layers", "universal_checkpoint_info", "sparse_tensor_module_names",
}  # fmt: skip

# What optimizers keep per parameter, besides the count of steps.
_STATE = {
    "Adam": ("exp_avg", "exp_avg_sq"), "AdamW": ("exp_avg", "exp_avg_sq"), "Lamb": ("exp_avg", "exp_avg_sq"),
    "Lion": ("exp_avg",), "Adagrad": ("sum",), "SGD": ("momentum_buffer",),
}  # fmt: skip
_COUNTING = ("Adam", "AdamW", "Lamb", "Adagrad")
# What of the loss scaler changes in training, by Redline's names; its rules are the config's.
_SCALER = {
    "value": "cur_scale", "_patience": "cur_hysteresis", "_updates": "cur_iter", "_last_overflow": "last_overflow_iter"
}  # fmt: skip

Keys = tuple[Any, ...]  # that lead to a value in a file
Shapes = Mapping[str, torch.Size]  # of parameters, by name


class Slot(NamedTuple):
    """A parameter in DeepSpeed's optimizer."""

    name: str
    weight: StoredTensor | None  # in fp32; None where the optimizer updates the model's own
    moments: Mapping[str, StoredTensor]  # by DeepSpeed's names, which are torch's
    step: float | None  # optimizer steps that the moments have seen; None where the optimizer does not count
    settings: Mapping[str, Any]  # of its group, such as lr and betas


class DeepSpeedCheckpoint:
    """The directory of one tag; has the attributes of :class:`redline.checkpoint.state.Checkpoint`, and `stage`.

    Raises:
        EngineError: it cannot be read; names the file and the reason.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.left_out = directory, list[str]()
        self.rank_state, self.has_own_state = dict[str, Any](), False
        self._files = MappedFiles(directory)
        try:
            self._read()
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CorruptCheckpoint(f"{directory}: it is not as DeepSpeed 0.19 writes it: {error!r}") from error
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        self.source = f"DeepSpeed's, of ZeRO stage {self.stage} on {ranks}"
        self.description = (
            f"{self.source}; the position in the data and random numbers stay: DeepSpeed does not save them"
        )

    def _read(self) -> None:
        files = self._files
        content = files.content(files.model[0])
        # Without its tensors: as long as one is referenced, the whole file stays mapped.
        state = {key: value for key, value in content.items() if key not in _TENSORS}
        self.world_size = int(state["dp_world_size"])
        self.buffers: list[str] = list(state["buffer_names"])
        self._shapes = [
            {name: torch.Size(shape) for name, shape in group.items()} for group in state["param_shapes"] or ()
        ]
        is_zero = bool(files.optimizer) or state["param_shapes"] is not None
        has_shards = files.model[0].name.startswith("zero_pp_rank_")
        for paths, what in ((files.optimizer if is_zero else None, "optimizer states"),
                            (files.model if has_shards else None, "the model")):  # fmt: skip
            if paths is not None and len(paths) != self.world_size:
                raise EngineError(
                    f"{self.directory}: it was written by {self.world_size} ranks, and there are {len(paths)} files of "
                    f"{what}; copy those of all hosts into the directory"
                )
        optimizer = self._optimizer_states if is_zero else {}
        stage = optimizer.get("zero_stage", 1 if is_zero else 0)  # BF16_Optimizer writes no stage; it is stage 1
        self.stage = int(getattr(stage, "arguments", [stage])[0])
        if state.get("num_experts") or "ds_zero_partition_groups" in optimizer:
            raise EngineError(f"{self.directory}: it is of an MoE model with sharded experts, which is not supported")
        module = {name: value for name, value in content["module"].items() if isinstance(value, Tensor)}
        self.aliases = self._find_aliases(state.get("shared_params"), module)
        self.entries = self._model(module, state.get("frozen_param_shapes"))
        self.shared = self._plain_state(state)

    def is_unchanged(self) -> bool:
        """True: its files have no checksums."""
        return True

    # -- the model -------------------------------------------------------------------------------

    def _find_aliases(self, shared: Mapping[str, str] | None, module: Mapping[str, Tensor]) -> dict[str, str]:
        if shared is not None:
            return dict(shared)
        first: dict[Any, str] = {}
        aliases = {}
        for name, tensor in module.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if name not in self.buffers and tensor.numel() and first.setdefault(place, name) != name:
                aliases[name] = first[place]
        return aliases

    def _model(self, module: Mapping[str, Tensor], frozen: Shapes | None) -> dict[str, StoredTensor]:
        """The model's tensors by key, fp32 weights where the optimizer has them; `optimizer_state` adds its own."""
        files = self._files
        weights = {slot.name: slot.weight for slot in self.slots() if slot.weight is not None}
        if self.stage == 3:  # no optimizer has these, and each rank has a shard of them
            for name, shape in (frozen or {}).items():
                keys = ("frozen_param_fragments", name)
                weights[name] = FlatTensor(files, files.model, keys, torch.Size(shape), sharded=True)
        tensors: dict[str, StoredTensor] = {}
        for name, value in module.items():
            if name not in self.aliases:
                if name not in weights and self.stage == 3 and name not in self.buffers:
                    raise EngineError(f"{self.directory}: {name} is in none of the files; it was not saved")
                tensors[name] = weights.get(name) or FlatTensor(files, files.model[:1], ("module", name), value.shape)
        # A parameter that was left out of the state dict may still be in the optimizer.
        tensors |= {name: weight for name, weight in weights.items() if name not in tensors}
        sizes = [each.shape.numel() * each.dtype.itemsize for each in tensors.values()]
        files.release_bytes = max([files.release_bytes, *sizes])
        return {f"model.{name}": stored for name, stored in tensors.items()}

    # -- the optimizer ---------------------------------------------------------------------------

    def slots(self, order: Sequence[Shapes] = ()) -> list[Slot]:
        """The optimizer's parameters; `order` has those of this run's groups, which stage 0 does not save by name."""
        if self.stage == 3:
            return list(self._slots_at_3())
        return list(self._slots_at_1() if self.stage else self._slots_at_0(order))

    @property
    def _optimizer_states(self) -> dict[str, Any]:
        states: dict[str, Any] = self._files.content(self._files.optimizer[0])[_OPTIMIZER]
        return states

    def _slots_at_1(self) -> Iterator[Slot]:
        states = self._optimizer_states
        base = states["base_optimizer_state"]
        is_elastic = isinstance(base, list)  # one state per group, and no settings
        paddings = states.get("param_alignment_paddings") or [[0] * len(shapes) for shapes in self._shapes]
        counts = [{"step": states[key]} for key in ("base_optimizer_state_step",) if key in states]
        for index, shapes in enumerate(self._shapes):
            weight = (_OPTIMIZER, "single_partition_of_fp32_groups", index)
            state = (_OPTIMIZER, "base_optimizer_state", *(() if is_elastic else ("state",)), index)
            settings = {} if is_elastic else base["param_groups"][index]
            sizes = [shape.numel() + padding for shape, padding in zip(shapes.values(), paddings[index])]
            yield from self._slots(shapes, sizes, weight, state, settings, counts)

    def _slots_at_3(self) -> Iterator[Slot]:
        for settings in self._optimizer_states[_OPTIMIZER]["param_groups"]:
            for subgroup in settings["params"]:
                shapes = self._shapes[subgroup]
                sizes = [math.ceil(shape.numel() / self.world_size) for shape in shapes.values()]
                weight = (_OPTIMIZER, "fp32_flat_groups", subgroup)
                yield from self._slots(shapes, sizes, weight, (_OPTIMIZER, _OPTIMIZER, "state", subgroup), settings)

    def _slots_at_0(self, order: Sequence[Shapes]) -> Iterator[Slot]:
        """The model's file has the state dict of torch's optimizer (fp32) or of DeepSpeed's wrapper (fp16, bf16)."""
        path = self._files.model[0]
        outer = self._files.content(path).get("optimizer") or {}
        keys: Keys = ("optimizer", _OPTIMIZER) if _OPTIMIZER in outer else ("optimizer",)
        inner = outer.get(_OPTIMIZER, outer)
        if not inner or not order:
            return
        sizes = [len(group["params"]) for group in inner["param_groups"]]
        is_flat = "fp32_groups_flat" in outer  # one vector per group
        if len(order) != len(sizes) or (not is_flat and [len(group) for group in order] != sizes):
            raise EngineError(
                f"{path}: its optimizer has parameter groups of {'flat vectors' if is_flat else sizes}, this one of "
                f"{[len(group) for group in order]}; give initialize the same parameters in the same order"
            )
        for group, (shapes, settings) in enumerate(zip(order, inner["param_groups"])):
            # DeepSpeed's fused optimizers count in the state of the last parameter only.
            counts = [inner["state"].get(index, {}) for index in settings["params"]]
            if is_flat:
                weight, state = ("optimizer", "fp32_groups_flat", group), (*keys, "state", settings["params"][0])
                lengths = [shape.numel() for shape in shapes.values()]
                yield from self._slots(shapes, lengths, weight, state, settings, counts)
                continue
            for place, (index, (name, shape)) in enumerate(zip(settings["params"], shapes.items())):
                own = ("optimizer", "fp32_groups", group, place) if "fp32_groups" in outer else None
                yield from self._slots({name: shape}, [0], own, (*keys, "state", index), settings, counts)

    def _slots(
        self, shapes: Shapes, sizes: Iterable[int], weight: Keys | None, state: Keys, settings: Mapping[str, Any],
        counts: Iterable[Mapping[str, Any]] = (),
    ) -> Iterator[Slot]:  # fmt: skip
        """Parameters one after the other in a vector of weights and in one of each moment; `sizes` count the padding.

        `weight` and `state` are the keys of the weights and of the optimizer's state; `counts` may count its steps.
        """
        files = self._files
        paths = files.optimizer if self.stage else files.model
        found = files.find(paths[0], state) or {}
        places = {key: (*state, key) for key in _MOMENTS if key in found}
        if weight is not None:
            places["weight"] = weight
        steps = [float(each["step"]) for each in (found, settings, *counts) if "step" in each]
        step = float(found["step"]) if isinstance(found.get("step"), Tensor) else max(steps, default=None)
        for (name, shape), start in zip(shapes.items(), accumulate(sizes, initial=0)):
            stored: dict[str, StoredTensor] = {
                key: FlatTensor(files, paths, keys, shape, start, sharded=self.stage == 3)
                for key, keys in places.items()
            }
            yield Slot(name, stored.pop("weight", None), stored, step, settings)

    def optimizer_state(self, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> Any:
        """DeepSpeed's state for an optimizer, converted to what Redline saves; adds its tensors to `entries`."""
        names = {id(weight): name for name, weight in weights.items()}
        own = [[names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups]
        slots = {slot.name: slot for slot in self.slots([{name: weights[name].shape for name in each} for each in own])}
        if self.stage == 0:  # only the optimizer has fp32 weights, and no names
            self._take_weights(slots.values())
        kind = next((each.__name__ for each in type(optimizer).__mro__ if each.__name__ in _STATE), None)
        if kind is None:
            raise EngineError(
                f"optimizer {type(optimizer).__name__}: it is not known how its state corresponds to DeepSpeed's; "
                f"{_WITHOUT}"
            )
        groups: list[dict[str, Any]] = []
        states: dict[str, Any] = {}
        missing = []
        for group, members in zip(optimizer.param_groups, own):
            settings: Mapping[str, Any] = {}
            for name in members:
                slot = slots.get(name) or slots.get(self.aliases.get(name, ""))
                if slot is None:
                    missing.append(name)
                    continue
                settings = settings or slot.settings
                if slot.moments:
                    states[name] = self._count_of(slot, kind, group, weights[name].device)
                    for key, stored in slot.moments.items():
                        self.entries[f"optimizer.{name}.{key}"] = stored
                        states[name][key] = {"$tensor": f"optimizer.{name}.{key}"}
            known = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in settings.items()
                if key in group and key not in ("params", "step")
            }
            groups.append({"weights": members, "settings": plain_settings(known)})
        if missing:
            log.warning(
                "load_checkpoint: %s has no optimizer state for %s; it starts anew", self.directory, ", ".join(missing)
            )
        return {
            "type": type(optimizer).__name__, "defaults": {}, "on_cpu": [], "groups": groups, "state": states,
        }  # fmt: skip

    def _take_weights(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            if slot.weight is None:
                continue
            model = self.entries.get(f"model.{slot.name}")  # which is the weight, rounded
            if model is not None and not torch.equal(slot.weight.read_full().to(model.dtype), model.read_full()):
                raise EngineError(
                    f"{self.directory}: the optimizer's weight for {slot.name} is not the model's; give initialize the "
                    f"same parameters in the same order as DeepSpeed had them, or {_WITHOUT}"
                )
            self.entries[f"model.{slot.name}"] = slot.weight

    def _count_of(self, slot: Slot, kind: str, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """What an optimizer keeps besides moments, which have to be those that it needs: the count of steps."""
        needed = set() if kind == "SGD" and not group["momentum"] else set(_STATE[kind])
        if group.get("amsgrad"):
            needed.add("max_exp_avg_sq")
        if needed != slot.moments.keys() or (kind in _COUNTING and slot.step is None):
            raise EngineError(
                f"{self.directory}: its optimizer has {', '.join(slot.moments)} of step {slot.step} for {slot.name}, "
                f"and {kind} needs {', '.join(sorted(needed)) or 'nothing'}; give the config the optimizer that it was "
                f"saved with, or {_WITHOUT}"
            )
        if kind not in _COUNTING:
            return {}
        if kind == "Lamb":
            return {"step": int(slot.step or 0)}
        where = device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        return {"step": torch.tensor(slot.step, dtype=torch.float32, device=where)}

    # -- plain state -----------------------------------------------------------------------------

    def _plain_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What there is of a run's state besides tensors, as Redline saves it."""
        config = state.get("ds_config")
        config = config if isinstance(config, Mapping) else {}
        steps = int(state["global_steps"])
        samples = state.get("global_samples", steps * int(config.get("train_batch_size") or 0))
        if self.stage:
            scaler = getattr(self._optimizer_states.get("loss_scaler"), "__dict__", {})
        else:
            scaler = self._files.content(self._files.model[0]).get("optimizer") or {}
        moving = {name: scaler[theirs] for name, theirs in _SCALER.items() if scaler.get(theirs) is not None}
        return {
            "counters": {
                "global_steps": steps, "global_samples": int(samples), "micro_steps": 0,
                "skipped_steps": int(state["skipped_steps"]),
            },
            "gradient_accumulation_steps": None,  # micro_steps follow from global_steps
            "schedule": _schedule(state.get("lr_scheduler"), config.get("scheduler")),
            "loss_scale": moving if "_updates" in moving else None,
            "data": None,
            "extra_state": {},
            # Copied: a tensor in it is mapped from the file.
            "client_state": copy.deepcopy({key: value for key, value in state.items() if key not in _OWN}),
        }  # fmt: skip


def _schedule(state: Any, section: Any) -> dict[str, Any] | None:
    """The schedule as Redline saves it: its type and parameters are in DeepSpeed's config."""
    if state is None:
        return None
    found: dict[str, Any] = {"type": UNKNOWN, "told_by": "nothing", "parameters": {}}
    if isinstance(section, Mapping) and section.get("type"):
        try:
            scheduler = load_config({"train_micro_batch_size_per_gpu": 1, "scheduler": section}).scheduler
        except ConfigError:  # what this engine refuses is compared as it is
            scheduler = None
        parameters = plain_copy(dict(scheduler.arguments() if scheduler else section.get("params") or {}), "scheduler")
        parameters["redline.schedules"] = "deepspeed"
        found = {"type": section["type"], "told_by": "config", "parameters": parameters}
    return {**found, "state": plain_copy(dict(state), "lr_scheduler")}
