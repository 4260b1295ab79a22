"""`deepspeed.utils`: logging, access to master weights, gradients and optimizer state, and small helpers."""

from __future__ import annotations

import functools
import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import redline
from deepspeed import comm
from deepspeed._engine import engine_of
from deepspeed.zero import full_tensor, shard_like
from redline.log import log

logger = logging.getLogger("DeepSpeed")


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Log on these ranks; -1 for all, none for none."""
    wanted = list(ranks or [])
    if comm.get_rank() in wanted or -1 in wanted:
        logger.log(level, "[Rank %d] %s", comm.get_rank(), message)


def instrument_w_nvtx(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


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


# -- master weights, gradients, optimizer state -------------------------------------------------------


def _find(param: Tensor, what: str, key: str | None) -> Any:
    """Master weights, gradient or a tensor of the optimizer's state, sharded or full; None where there is none."""
    engine = engine_of(param)
    if what == "grad":
        return engine.gradient_of(param)
    masters = engine.master_params
    updated = param if masters is None else masters.of.get(param, param)
    if what == "fp32_param":
        return updated if param.requires_grad else None  # DeepSpeed has master weights of what trains alone
    return engine.optimizer.state.get(updated, {}).get(key)


def _local(tensor: Any) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor).detach()


def _accessors(what: str) -> Any:
    """Functions that get and set one thing of a parameter, in full (a collective) and of this rank alone."""

    def get(param: Tensor, optim_state_key: str | None, of: Callable[[Any], Tensor]) -> Tensor | None:
        found = _find(param, what, optim_state_key)
        if found is None:
            return None
        scaler = engine_of(param).scaler if what == "grad" else None
        value = of(found).detach().to(torch.float32, copy=True)
        return value if scaler is None else value / scaler.value

    def put(param: Tensor, value: Tensor, optim_state_key: str | None, *, full: bool) -> None:
        target, engine = _find(param, what, optim_state_key), engine_of(param)
        local, value = _local(target), shard_like(value, target) if full else value
        if what == "grad":
            # The engine refuses gradients that others have written into; `data` passes its check.
            local, value = local.data, value if engine.scaler is None else value * engine.scaler.value
        local.copy_(value)
        if what == "fp32_param":
            engine.copy_master_to_model()

    def get_full(param: Tensor, optim_state_key: str | None = None) -> Tensor | None:
        return get(param, optim_state_key, full_tensor)

    def set_full(param: Tensor, value: Tensor, optim_state_key: str | None = None) -> None:
        put(param, value, optim_state_key, full=True)

    def get_local(param: Tensor, optim_state_key: str | None = None) -> Tensor | None:
        return get(param, optim_state_key, _local)

    def set_local(param: Tensor, value: Tensor, optim_state_key: str | None = None) -> None:
        put(param, value, optim_state_key, full=False)

    return get_full, set_full, get_local, set_local


(safe_get_full_fp32_param, safe_set_full_fp32_param,
 safe_get_local_fp32_param, safe_set_local_fp32_param) = _accessors("fp32_param")  # fmt: skip
(safe_get_full_grad, safe_set_full_grad,
 safe_get_local_grad, safe_set_local_grad) = _accessors("grad")  # fmt: skip
(safe_get_full_optimizer_state, safe_set_full_optimizer_state,
 safe_get_local_optimizer_state, safe_set_local_optimizer_state) = _accessors("optimizer_state")  # fmt: skip


def safe_update_full_grad_vectorized(
    param_list: Iterable[Tensor], update_func: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Replace gradients by ``update_func(gradient, parameter)``."""
    for param in param_list:
        if (grad := safe_get_full_grad(param)) is not None:
            safe_set_full_grad(param, update_func(grad, param))


MIN_SWAPPABLE_BYTES = 1024**2  # of tensors that DeepSpeed would swap


# -- ZeRO stage 3's leaf modules: marks that nothing here needs ----------------------------------------


def _mark_leaves(
    model: nn.Module, wanted: Iterable[Any], matches: Callable[[str, nn.Module, Any], bool], flag: bool, strict: bool
) -> tuple[list[nn.Module], list[Any]]:
    """Mark the modules that one of these matches; returns them, and those of `wanted` that match none."""
    named, wanted = list(model.named_modules()), list(wanted)
    found = [module for name, module in named if any(matches(name, module, each) for each in wanted)]
    missing = [each for each in wanted if not any(matches(name, module, each) for name, module in named)]
    for each in found:
        set_z3_leaf_module(each, flag)
    if strict and missing and (not found or matches is not _of_class):
        raise ValueError(f"No modules of type or name {missing} found in model {type(model).__name__}")
    return found, missing


def _of_class(name: str, module: nn.Module, wanted: Any) -> bool:
    cls = type(module)
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    return wanted in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark modules whose parameters DeepSpeed gathers as one."""
    return _mark_leaves(model, leaf_module_classes, _of_class, True, raise_if_not_found)[0]


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Undo :func:`set_z3_leaf_modules`."""
    return _mark_leaves(model, leaf_module_classes, _of_class, False, raise_if_not_found)[0]


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark by names in the model; returns the modules, and the names that it does not have."""
    return _mark_leaves(model, module_names, lambda name, _, wanted: name == wanted, True, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, name_suffixes: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark by how names end; returns the modules, and the endings that none has."""
    return _mark_leaves(model, name_suffixes, lambda name, _, end: name.endswith(end), True, raise_if_not_found)


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if z3_leaf_module(each)]


def z3_leaf_module(model: nn.Module) -> bool:
    return bool(getattr(model, "_z3_leaf", False))


def z3_leaf_parameter(param: Tensor) -> bool:
    return False


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    model._z3_leaf = flag  # type: ignore[assignment]


# -- checkpoints ---------------------------------------------------------------------------------------


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path, tag: str | None = None, **_: Any
) -> dict[str, Tensor]:
    """The full fp32 weights of a checkpoint, Redline's or DeepSpeed's."""
    import tempfile

    from redline.checkpoint.model_file import consolidate

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        consolidate(Path(checkpoint_dir) / tag if tag else Path(checkpoint_dir), path)
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """Load a checkpoint's weights into a model, and move it to the CPU."""
    if any(param.device.type != "cpu" for param in model.parameters()):
        model.cpu()  # within `zero.GatheredParameters` it can't be moved
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path, output_dir: str | Path, tag: str | None = None, **_: Any
) -> None:
    """Write a checkpoint's weights as one ``pytorch_model.bin``."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    torch.save(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), Path(output_dir) / "pytorch_model.bin")


def env_report(*args: Any, **kwargs: Any) -> None:
    """Print the versions in use."""
    print(f"deepspeed {version} by redline {redline.__version__}, torch {torch.__version__}")


def _estimate(elements: Any, stage: int, num_gpus_per_node: int, num_nodes: int) -> None:
    from redline.distributed.memory_estimate import Bytes, estimate, shown

    ranks = num_gpus_per_node * num_nodes
    held = estimate(elements, Bytes(computed=2), ranks)[stage]
    print(f"ZeRO stage {stage} on {ranks} ranks, bf16 with Adam: {shown(held.most)} per rank, without activations")


def _needs(stage: int) -> Any:
    """Functions that print how much memory a stage needs, for a model and for numbers of parameters."""

    def live(model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, *_: Any, **__: Any) -> None:
        from redline.distributed.blocks import find_blocks
        from redline.distributed.memory_estimate import count

        _estimate(count(model, find_blocks(model), low=True), stage, num_gpus_per_node, num_nodes)

    def cold(
        total_params: int, *largest_layer_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, **_: Any
    ) -> None:
        from redline.distributed.memory_estimate import Elements

        largest = largest_layer_params[0] if largest_layer_params else 0
        _estimate(Elements(total_params, rest=largest, largest=largest), stage, num_gpus_per_node, num_nodes)

    return live, cold


estimate_zero2_model_states_mem_needs_all_live, estimate_zero2_model_states_mem_needs_all_cold = _needs(2)
estimate_zero3_model_states_mem_needs_all_live, estimate_zero3_model_states_mem_needs_all_cold = _needs(3)


def recursive_getattr(model: Any, module_name: str) -> Any:
    """What a dotted name stands for."""
    return functools.reduce(getattr, module_name.split("."), model)


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    owner, _, name = module_name.rpartition(".")
    setattr(recursive_getattr(model, owner) if owner else model, name, module)


def move_to_device(item: Any, device: Any, criterion_func: Callable[[Any], bool] | None = None) -> Any:
    """A batch of tensors in lists, tuples and dicts, on a device."""
    return tree_map(lambda each: each.to(device) if isinstance(each, Tensor) else each, item)


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


def memory_status(message: str, *args: Any, **kwargs: Any) -> None:
    see_memory_usage(message, force=True)


def warning_once(message: str, *args: Any) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message, *args)


def set_log_level_from_string(level: str, custom_logger: Any = None) -> None:
    (custom_logger or logger).setLevel(level.upper())


_warned: set[str] = set()
TORCH_DISTRIBUTED_DEFAULT_PORT = 29500


def see_memory_usage(message: str, force: bool = False) -> None:
    if force and torch.cuda.is_available():
        log.info("%s: %.2f GiB allocated", message, torch.cuda.memory_allocated() / 2**30)


# -- single functions and values of odd places ----------------------------------------------------------

DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"  # which Accelerate's launcher imports
version = "0.19.8"
installed_ops: dict[str, bool] = {}
compatible_ops: dict[str, bool] = {}
torch_info = {
    "version": ".".join(torch.__version__.split(".")[:2]),
    "cuda_version": torch.version.cuda or "0.0",
    "nccl_version": "0.0",
    "hip_version": "0.0",
    "bf16_support": True,
}


def required_torch_version(min_version: float | None = None, max_version: float | None = None) -> bool:
    """Whether torch is of these versions."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    here = (major, minor)

    def pair(number: float) -> tuple[int, int]:
        whole, _, rest = str(number).partition(".")
        return int(whole), int(rest or 0)

    return (min_version is None or here >= pair(min_version)) and (max_version is None or here <= pair(max_version))


def clone_tensors_for_torch_save(item: Any, device: Any = "cpu") -> Any:
    """A copy whose tensors have memory of their own, so that torch.save writes no more than them."""
    if isinstance(item, Tensor):
        return item.detach().clone().to(device)
    if isinstance(item, (list, tuple)):
        return type(item)(clone_tensors_for_torch_save(each, device) for each in item)
    if isinstance(item, dict):
        return type(item)({key: clone_tensors_for_torch_save(each, device) for key, each in item.items()})
    return item


# -- of mixtures of experts, which no model here has: what scripts ask of any model ----------------------


def split_params_into_different_moe_groups_for_optimizer(param_groups: Any, *args: Any, **kwargs: Any) -> list[Any]:
    return [param_groups] if isinstance(param_groups, dict) else list(param_groups)


def is_moe_param(param: Tensor) -> bool:
    return False


def has_moe_layers(module: nn.Module) -> tuple[bool, int]:
    return False, 0
