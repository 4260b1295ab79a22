"""A DeepSpeed config as scripts have it: what DeepSpeed ignores in it is left out, with one warning each."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import nn

from deepspeed import comm
from redline.errors import ConfigError, EngineError
from redline.log import log

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["DeepSpeedConfig", "raises_as_deepspeed", "round_weights", "settings_of"]

P = ParamSpec("P")
R = TypeVar("R")


# -- reading ----------------------------------------------------------------------------------------------

# Where scripts keep what "auto" stands for, as Hugging Face's and others name their arguments.
_ARGUMENTS = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", "micro_batch_size", "batch_size"),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("max_grad_norm", "gradient_clipping"),
    "optimizer.params.lr": ("learning_rate", "lr"),
    "optimizer.params.weight_decay": ("weight_decay",),
    "optimizer.params.eps": ("adam_epsilon",),
    "scheduler.params.warmup_max_lr": ("learning_rate", "lr"),
    "scheduler.params.warmup_num_steps": ("warmup_steps", "num_warmup_steps"),
    "scheduler.params.total_num_steps": ("max_train_steps", "max_steps", "num_training_steps"),
    "fp16.enabled": ("fp16",),
    "bf16.enabled": ("bf16",),
}


def settings_of(config: Any, args: Any = None) -> tuple[dict[str, Any], Any]:
    """The settings of a file's path or a dict, as Redline takes them, and what `load_config` is to read.

    Args:
        config: may have what DeepSpeed ignores; each such key is left out with a warning.
        args: the script's arguments, which may tell what "auto" stands for.

    Raises:
        AssertionError: there is no config, as DeepSpeed raises it.
    """
    assert config is not None, "DeepSpeed requires --deepspeed_config to specify configuration file"
    if isinstance(config, DeepSpeedConfig):
        return config._param_dict, config.source
    from redline.config.document import copy_document, read
    from redline.config.schema import whole_schema

    if isinstance(config, Mapping):
        document = raises_as_deepspeed(copy_document)(config)
    else:
        document = raises_as_deepspeed(read)(Path(config))
    value = _known(document.value, whole_schema(), "", args)
    _sum_in_fp32(value)
    mistakes = {route: text for route, text in document.mistakes.items() if not route or route[0] in value}
    document = replace(document, value=value, mistakes=mistakes)
    return document.settings, replace(document, value=_with_deepspeeds_resumes(value))


def _known(section: dict[str, Any], schema: dict[str, Any], path: str, args: Any) -> dict[str, Any]:
    """A section without what DeepSpeed ignores in it, and with a script's arguments for "auto"."""
    from redline.config.components import COMPONENTS
    from redline.config.schema import section_of

    known = {}
    for key, value in section.items():
        place, found = path + key, schema["properties"].get(schema.get("aliases", {}).get(key, key))
        if found is None and not key.startswith(("_", "$", "//")) and schema.get("loose"):
            log.warning("%s: DeepSpeed ignores this unknown key, and so does Redline", place)
            continue
        if place == "scheduler.params.warmup_type" and value not in ("log", "linear", "auto"):
            log.warning("%s: got %r, taken as 'log', as DeepSpeed does", place, value)
            value = "log"
        if value == "auto":
            value = _argument(args, place)
        inner = section_of(found) if found is not None else None
        if isinstance(value, dict) and (inner or path[:-1] in COMPONENTS):
            value = _known(value, inner or {"properties": {}}, f"{place}.", args)
        known[key] = value
    return known


def _argument(args: Any, place: str) -> Any:
    """A script's argument for a key, if it has one that tells anything: 0 and less stand for none."""
    for name in _ARGUMENTS.get(place, ()):
        given = getattr(args, name, None)
        if isinstance(given, (int, float)) and (isinstance(given, bool) or given > 0):
            log.info("%s: got 'auto'; the script's argument %s is %r", place, name, given)
            return given
    return "auto"


def _section(settings: Any, name: str) -> Any:
    """A section that is one; a mistake in its place is reported when the config is loaded."""
    return settings[name] if isinstance(settings.get(name), Mapping) else {}


def _sum_in_fp32(settings: dict[str, Any]) -> None:
    """Leave out a dtype for sums of gradients that is less exact than those in which Redline adds up."""
    types, stage = _section(settings, "data_types"), _section(settings, "zero_optimization").get("stage")
    asked = types.get("grad_accum_dtype")
    if stage and asked in ("fp16", "bf16") and (stage == 3 or not _section(settings, asked).get("enabled")):
        log.warning("data_types.grad_accum_dtype: got %r; gradients add up more exactly here, in fp32", asked)
        settings["data_types"] = {key: each for key, each in types.items() if key != "grad_accum_dtype"}


def _with_deepspeeds_resumes(settings: dict[str, Any]) -> dict[str, Any]:
    """The config with a checkpoint's step for a schedule that has changed, unless it says otherwise."""
    ours = settings.get("redline", {})
    if not isinstance(ours, dict) or not isinstance(ours.get("checkpoint", {}), dict):  # a mistake
        return settings
    return {**settings, "redline": {**ours, "checkpoint": {"override_schedule": True, **ours.get("checkpoint", {})}}}


@torch.no_grad()
def round_weights(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """DeepSpeed casts the model before it makes master weights from it, so that these start from rounded values."""
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16)):
        if _section(settings, name).get("enabled") is True:
            for param in model.parameters():
                if param.dtype is torch.float32 and not param.is_meta:
                    param.copy_(param.to(dtype))


# -- errors -----------------------------------------------------------------------------------------------


class DeepSpeedConfigError(ConfigError, AssertionError):
    """A config that cannot be obeyed, as a ValueError and as an AssertionError: DeepSpeed raises either."""


class DeepSpeedError(EngineError, AssertionError, ValueError):
    """What the engine refuses, as DeepSpeed raises it: as an AssertionError or a ValueError."""


class NotBuiltError(DeepSpeedConfigError, NotImplementedError):
    """A config that DeepSpeed obeys and Redline does not."""


def raises_as_deepspeed(function: Callable[P, R]) -> Callable[P, R]:
    """The function with its errors as DeepSpeed raises them, with the same message and problems."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ConfigError as error:
            from redline.config.load import UnsupportedConfigError

            cls = NotBuiltError if isinstance(error, UnsupportedConfigError) else DeepSpeedConfigError
            raise cls(list(error.problems), error.source) from None
        except EngineError as error:
            if type(error) is EngineError:
                raise DeepSpeedError(*error.args) from error.__cause__
            raise

    return call


# -- what scripts read of a config --------------------------------------------------------------------------


@raises_as_deepspeed
def _load(source: Any, world_size: int) -> EngineConfig:
    from redline.config import load_config

    return load_config(source, world_size=world_size)


class DeepSpeedConfig(dict[str, Any]):
    """A config's settings, as they were given, as the dict that scripts read; the config in force as attributes.

    Args:
        config: a file's path or a dict.
        mpu: a script's model parallelism, all of whose sizes are 1.
        mesh_device: not used.
        loaded: the config in force, where `config` has been read already.
    """

    def __init__(
        self, config: Any, mpu: Any = None, mesh_device: Any = None, *, loaded: EngineConfig | None = None
    ) -> None:
        settings, source = (config, _with_deepspeeds_resumes(config)) if loaded else settings_of(config)
        super().__init__(settings)
        self._param_dict, self.source, self._loaded = settings, source, loaded
        with suppress(NotBuiltError):  # which only matters where it is trained with
            vars(self).update(self.loaded)

    @property
    def loaded(self) -> EngineConfig:
        self._loaded = self._loaded or _load(self.source, comm.get_world_size())
        return self._loaded

    def __getattr__(self, name: str) -> Any:
        section, _, key = name.partition("_")
        if not name.startswith("_"):  # else of a copy that is being made
            for owner, field in ((self.loaded, name), (getattr(self.loaded, section, None), key)):
                if hasattr(owner, field):
                    return getattr(owner, field)
        raise AttributeError(f"DeepSpeedConfig has no {name!r}")


class _SectionView:
    """A section of a config by DeepSpeed's attribute names, which leave out ``stage3_``."""

    def __init__(self, key: str, settings: Mapping[str, Any]) -> None:
        self._section = getattr(_load({"train_batch_size": 1, key: dict(settings)}, 1), key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._section, name if hasattr(self._section, name) else f"stage3_{name}")


def DeepSpeedZeroConfig(**settings: Any) -> Any:
    return _SectionView("zero_optimization", settings)


def DeepSpeedFP16Config(**settings: Any) -> Any:
    return _SectionView("fp16", settings)


def get_bfloat16_config(settings: Mapping[str, Any]) -> Any:
    return _SectionView("bf16", settings.get("bf16", settings.get("bfloat16", {})))


class OffloadDeviceEnum(str, enum.Enum):
    """Where optimizer state or parameters are offloaded to."""

    none, cpu, nvme = "none", "cpu", "nvme"


class OffloadStateTypeEnum(str, enum.Enum):
    """What `engine.offload_states` is asked to move."""

    optim_states, hp_params, lp_params = "optim_states", "hp_params", "lp_params"
    lp_grads, contiguous_grad_buffer = "lp_grads", "contiguous_grad_buffer"


class ZeroStageEnum(int, enum.Enum):
    """Stages of ZeRO."""

    disabled, optimizer_states, gradients, weights = 0, 1, 2, 3
    max_stage = 3


DEEPSPEED_OPTIMIZERS = ["adagrad", "adam", "adamw", "lamb", "lion", "muon"]
ADAGRAD_OPTIMIZER, ADAM_OPTIMIZER, ADAMW_OPTIMIZER, LAMB_OPTIMIZER, LION_OPTIMIZER, MUON_OPTIMIZER = (
    DEEPSPEED_OPTIMIZERS
)
ONEBIT_ADAM_OPTIMIZER, ONEBIT_LAMB_OPTIMIZER, ZERO_ONE_ADAM_OPTIMIZER = "onebitadam", "onebitlamb", "zerooneadam"
