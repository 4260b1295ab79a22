"""A DeepSpeed config as scripts have it: what DeepSpeed ignores in it is left out, with one warning each."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspeed import comm
from redline.errors import ConfigError, EngineError
from redline.log import log

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["DeepSpeedConfig", "Settings", "settings_of"]

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
        return config.settings, config.source
    from redline.config.document import copy_document, read
    from redline.config.schema import whole_schema

    with deepspeeds_errors():
        document = copy_document(config) if isinstance(config, Mapping) else read(Path(config))
    value = _known(document.value, whole_schema(), "", args)
    _add_up_exactly(value)
    mistakes = {route: text for route, text in document.mistakes.items() if not route or route[0] in value}
    document = replace(document, value=value, mistakes=mistakes)
    return document.settings, replace(document, value=_with_deepspeeds_resumes(value))


def _add_up_exactly(config: dict[str, Any]) -> None:
    """Leave out a dtype for sums of gradients that is less exact than those in which Redline adds up."""
    names = ("data_types", "zero_optimization", "fp16", "bf16")
    types, zero, *low = (config[name] if isinstance(config.get(name), dict) else {} for name in names)
    asked, stage = types.get("grad_accum_dtype"), zero.get("stage")
    own = [name for name, section in zip(names[2:], low) if section.get("enabled")]
    if stage and asked in ("fp16", "bf16") and (asked not in own or stage == 3):
        log.warning("data_types.grad_accum_dtype: got %r; gradients add up more exactly here, in fp32", asked)
        config["data_types"] = {key: each for key, each in types.items() if key != "grad_accum_dtype"}


def _with_deepspeeds_resumes(value: dict[str, Any]) -> dict[str, Any]:
    """The config with a checkpoint's step for a schedule that has changed, unless it says otherwise."""
    ours = value.get("redline", {})
    saving = ours.get("checkpoint", {}) if isinstance(ours, dict) else None
    if not isinstance(saving, dict):  # a mistake, which is reported
        return value
    return {**value, "redline": {**ours, "checkpoint": {"override_schedule": True, **saving}}}


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
            value = _argument(args, place, value)
        inner = section_of(found) if found is not None else None
        if isinstance(value, dict) and (inner or path[:-1] in COMPONENTS):
            value = _known(value, inner or {"properties": {}}, f"{place}.", args)
        known[key] = value
    return known


def _argument(args: Any, place: str, value: Any) -> Any:
    """A script's argument for a key, if it has one that tells anything: 0 and less stand for none."""
    for name in _ARGUMENTS.get(place, ()):
        given = getattr(args, name, None)
        if isinstance(given, (int, float)) and (isinstance(given, bool) or given > 0):
            log.info("%s: got 'auto'; the script's argument %s is %r", place, name, given)
            return given
    return value


DEEPSPEED_OPTIMIZERS = ["adagrad", "adam", "adamw", "lamb", "lion", "muon"]
ADAGRAD_OPTIMIZER, ADAM_OPTIMIZER, ADAMW_OPTIMIZER, LAMB_OPTIMIZER, LION_OPTIMIZER, MUON_OPTIMIZER = (
    DEEPSPEED_OPTIMIZERS
)
ONEBIT_ADAM_OPTIMIZER, ONEBIT_LAMB_OPTIMIZER, ZERO_ONE_ADAM_OPTIMIZER = "onebitadam", "onebitlamb", "zerooneadam"


class DeepSpeedConfigError(ConfigError, AssertionError):
    """A config that cannot be obeyed, as a ValueError and as an AssertionError: DeepSpeed raises either."""


class DeepSpeedError(EngineError, AssertionError, ValueError):
    """What the engine refuses, as DeepSpeed raises it: as an AssertionError or a ValueError."""


class NotBuiltError(DeepSpeedConfigError, NotImplementedError):
    """A config that DeepSpeed obeys and Redline does not."""


def as_deepspeed(error: EngineError) -> EngineError:
    """The error as DeepSpeed raises it, with the same message and problems."""
    if isinstance(error, ConfigError):
        from redline.config.load import UnsupportedConfigError

        cls = NotBuiltError if isinstance(error, UnsupportedConfigError) else DeepSpeedConfigError
        return cls(list(error.problems), error.source)
    return DeepSpeedError(*error.args) if type(error) is EngineError else error


@contextmanager
def deepspeeds_errors() -> Iterator[None]:
    """Raises the engine's errors as DeepSpeed does."""
    try:
        yield
    except EngineError as error:
        raise as_deepspeed(error) from None


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


class _SectionView:
    """A section of a config by DeepSpeed's attribute names, which leave out ``stage3_``."""

    def __init__(self, section: Any) -> None:
        self._section = section

    def __getattr__(self, name: str) -> Any:
        for each in (name, f"stage3_{name}"):
            if not name.startswith("_") and hasattr(self._section, each):
                return getattr(self._section, each)
        raise AttributeError(name)


def _section(key: str, settings: Mapping[str, Any]) -> Any:
    from redline.config import load_config

    with deepspeeds_errors():
        config = load_config({"train_batch_size": 1, key: dict(settings)}, world_size=1)
    return _SectionView(getattr(config, key))


def DeepSpeedZeroConfig(**settings: Any) -> Any:
    return _section("zero_optimization", settings)


def DeepSpeedFP16Config(**settings: Any) -> Any:
    return _section("fp16", settings)


def get_bfloat16_config(settings: Mapping[str, Any]) -> Any:
    return _section("bf16", settings.get("bf16", settings.get("bfloat16", {})))


class Settings(dict[str, Any]):
    """A config's settings as the dict that scripts read, with Redline's config as its attributes.

    Args:
        settings: as they were given.
        loaded: the config in force.
    """

    def __init__(self, settings: Mapping[str, Any], loaded: EngineConfig) -> None:
        super().__init__(settings)
        self._loaded = loaded
        vars(self).update({name: getattr(loaded, name) for name in type(loaded).model_fields})

    def __getattr__(self, name: str) -> Any:
        if name == "_loaded":
            raise AttributeError(name)
        return getattr(self._loaded, name)


class DeepSpeedConfig:
    """A config in force, under the attribute names that scripts read of DeepSpeed's.

    Args:
        config: a file's path or a dict.
        mpu: a script's model parallelism, all of whose sizes are 1.
        mesh_device: not used.
    """

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        self.settings, self.source = settings_of(config)
        self._param_dict = self.settings
        with suppress(NotBuiltError):  # which only matters where it is trained with
            self.loaded  # noqa: B018  reports mistakes

    @cached_property
    def loaded(self) -> EngineConfig:
        from redline.config import load_config

        with deepspeeds_errors():
            return load_config(self.source, world_size=comm.get_world_size())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("settings", "source"):
            raise AttributeError(name)
        section, _, key = name.partition("_")
        for owner, field in ((self.loaded, name), (getattr(self.loaded, section, None), key)):
            if owner is not None and hasattr(owner, field):
                return getattr(owner, field)
        raise AttributeError(f"DeepSpeedConfig has no {name!r}")
