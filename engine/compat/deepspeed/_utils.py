"""`deepspeed.utils`, and the small functions and values of other modules of DeepSpeed's."""

from __future__ import annotations

import functools
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import redline
from deepspeed import comm
from deepspeed._leaf_modules import *  # noqa: F403
from deepspeed._tensor_fragment import *  # noqa: F403
from redline.log import log

version = "0.19.8"
git_hash = git_branch = "redline"
installed_ops: dict[str, bool] = {}
compatible_ops: dict[str, bool] = {}
torch_info = {
    "version": ".".join(torch.__version__.split(".")[:2]),
    "cuda_version": torch.version.cuda or "0.0",
    "nccl_version": "0.0",
    "hip_version": "0.0",
    "bf16_support": True,
}
TORCH_DISTRIBUTED_DEFAULT_PORT, default_pg_timeout = 29500, comm.DEFAULT_TIMEOUT
DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"  # which Accelerate's launcher imports
MIN_SWAPPABLE_BYTES = 1024**2  # of tensors that DeepSpeed would swap


# -- logging ------------------------------------------------------------------------------------------------

logger = logging.getLogger("DeepSpeed")


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Log on these ranks; -1 for all, none for none."""
    if {comm.get_rank(), -1} & set(ranks or ()):
        logger.log(level, "[Rank %d] %s", comm.get_rank(), message)


log_dist_once = print_dist = log_dist


@functools.cache
def warning_once(message: str, *args: Any) -> None:
    logger.warning(message, *args)


def set_log_level_from_string(level: str, custom_logger: Any = None) -> None:
    (custom_logger or logger).setLevel(level.upper())


def see_memory_usage(message: str, force: bool = False) -> None:
    if force and torch.cuda.is_available():
        log.info("%s: %.2f GiB allocated", message, torch.cuda.memory_allocated() / 2**30)


def memory_status(message: str, *args: Any, **kwargs: Any) -> None:
    see_memory_usage(message, force=True)


def env_report(*args: Any, **kwargs: Any) -> None:
    """Print the versions in use."""
    print(f"deepspeed {version} by redline {redline.__version__}, torch {torch.__version__}")


main = cli_main = env_report  # of deepspeed.env_report


# -- models and batches -------------------------------------------------------------------------------------


class RepeatingLoader:
    """Iterates over a loader again and again."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._iterator = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __len__(self) -> int:
        return len(self.loader)

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.loader)
            return next(self._iterator)


@contextmanager
def OnDevice(dtype: torch.dtype, device: str = "meta", enabled: bool = True) -> Iterator[None]:
    """A context in which a model is made in a dtype, on a device."""
    if not enabled:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def recursive_getattr(model: Any, module_name: str) -> Any:
    """What a dotted name stands for."""
    return functools.reduce(getattr, module_name.split("."), model)


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    owner, _, name = module_name.rpartition(".")
    setattr(recursive_getattr(model, owner) if owner else model, name, module)


def move_to_device(item: Any, device: Any, criterion_func: Callable[[Any], bool] | None = None) -> Any:
    """A batch of tensors in lists, tuples and dicts, on a device."""
    return tree_map(lambda each: each.to(device) if isinstance(each, Tensor) else each, item)


def clone_tensors_for_torch_save(item: Any, device: Any = "cpu") -> Any:
    """A copy whose tensors have memory of their own, so that torch.save writes no more than them."""
    return tree_map(lambda each: each.detach().clone().to(device) if isinstance(each, Tensor) else each, item)


def set_random_seed(seed: int) -> None:
    """Seed random, numpy and torch."""
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2, mpu: Any = None) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)


def noop_decorator(function: Any) -> Any:
    return function


instrument_w_nvtx = noop_decorator


def required_torch_version(min_version: float | None = None, max_version: float | None = None) -> bool:
    """Whether torch is of these versions."""

    def pair(version: Any) -> tuple[int, ...]:
        return tuple(int(part) for part in str(version).split(".")[:2])

    here = pair(torch.__version__)
    return (min_version is None or here >= pair(min_version)) and (max_version is None or here <= pair(max_version))


# What scripts ask of any model about mixtures of experts, which no model here has.


def split_params_into_different_moe_groups_for_optimizer(param_groups: Any, *args: Any, **kwargs: Any) -> list[Any]:
    return [param_groups] if isinstance(param_groups, dict) else list(param_groups)


def is_moe_param(param: Tensor) -> bool:
    return False


def has_moe_layers(module: nn.Module) -> tuple[bool, int]:
    return False, 0


# -- the weights of a checkpoint, Redline's or DeepSpeed's ------------------------------------------------------


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path, tag: str | None = None, **_: Any
) -> dict[str, Tensor]:
    """The full fp32 weights."""
    from redline.checkpoint.model_file import consolidate

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        consolidate(checkpoint_dir, path, tag=tag)
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """Load the weights into a model, and move it to the CPU."""
    if any(param.device.type != "cpu" for param in model.parameters()):
        model.cpu()  # within `zero.GatheredParameters` it can't be moved
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path, output_dir: str | Path, tag: str | None = None, **_: Any
) -> None:
    """Write the weights as one ``pytorch_model.bin``."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    torch.save(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), Path(output_dir) / "pytorch_model.bin")
