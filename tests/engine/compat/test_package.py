"""The face's other modules: what can be imported, what works without an engine, and what is not built."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.face import FACE, face


@pytest.fixture(scope="module")
def deepspeed() -> Iterator[Any]:
    with face() as package:
        yield package


def test_it_is_found_as_a_package_of_that_version(deepspeed: Any) -> None:
    assert deepspeed.__redline__ and deepspeed.__version__ == "0.19.8"
    assert importlib.metadata.version("deepspeed") == "0.19.8"


def test_a_process_without_the_path_has_no_deepspeed_of_ours() -> None:
    code = "import sys, redline, redline.start; assert 'deepspeed' not in sys.modules and {!r} not in sys.path"
    subprocess.run([sys.executable, "-c", code.format(str(FACE))], check=True)


IMPORTS = {
    "deepspeed": "initialize init_distributed add_config_arguments DeepSpeedEngine DeepSpeedConfig comm zero ops utils",
    "deepspeed.accelerator": "get_accelerator",
    "deepspeed.comm": "all_reduce barrier get_rank get_world_size init_distributed ReduceOp",
    "deepspeed.ops.adam": "FusedAdam DeepSpeedCPUAdam",
    "deepspeed.ops.lamb": "FusedLamb",
    "deepspeed.ops.lion": "FusedLion DeepSpeedCPULion",
    "deepspeed.ops.adagrad": "DeepSpeedCPUAdagrad",
    "deepspeed.ops.op_builder": "CPUAdamBuilder",
    "deepspeed.runtime.engine": "DeepSpeedEngine",
    "deepspeed.runtime.config": "DeepSpeedConfig DeepSpeedConfigError",
    "deepspeed.runtime.lr_schedules": "WarmupLR OneCycle LRRangeTest VALID_LR_SCHEDULES CYCLE_MIN_LR",
    "deepspeed.runtime.utils": "see_memory_usage move_to_device set_random_seed memory_status",
    "deepspeed.runtime.zero.stage3": "estimate_zero3_model_states_mem_needs_all_live DeepSpeedZeroOptimizer_Stage3",
    "deepspeed.constants": "TORCH_DISTRIBUTED_DEFAULT_PORT default_pg_timeout",
    "deepspeed.launcher.runner": "fetch_hostfile",
    "deepspeed.sequence.layer": "DistributedAttention",
    "deepspeed.runtime.zero": "GatheredParameters Init",
    "deepspeed.runtime.zero.config": "DeepSpeedZeroConfig ZeroStageEnum",
    "deepspeed.runtime.zero.offload_config": "OffloadDeviceEnum OffloadStateTypeEnum",
    "deepspeed.runtime.zero.partition_parameters": "ZeroParamStatus GatheredParameters",
    "deepspeed.runtime.activation_checkpointing.checkpointing": "checkpoint configure get_cuda_rng_tracker",
    "deepspeed.runtime.dataloader": "RepeatingLoader",
    "deepspeed.utils": "logger log_dist groups RepeatingLoader safe_get_full_fp32_param set_z3_leaf_modules",
    "deepspeed.utils.logging": "logger log_dist",
    "deepspeed.utils.zero_to_fp32": "get_fp32_state_dict_from_zero_checkpoint",
    "deepspeed.checkpoint.utils": "clone_tensors_for_torch_save",
}


@pytest.mark.parametrize("module", IMPORTS)
def test_scripts_import_these_names(module: str, deepspeed: Any) -> None:
    found = importlib.import_module(module)
    assert [name for name in IMPORTS[module].split() if not hasattr(found, name)] == []
    path = importlib.import_module("deepspeed.utils")
    assert path.logging.logger is path.logger, "the module of that name, not Python's"


@pytest.mark.parametrize(
    ("module", "name", "instead"),
    [
        ("deepspeed.pipe", "PipelineModule", "zero_optimization"),
        ("deepspeed.moe.layer", "MoE", "experts in torch"),
        ("deepspeed", "init_inference", "vLLM"),
        ("deepspeed.compression.compress", "init_compression", "torch.ao.quantization"),
        ("deepspeed.ops.sparse_attention", "SparseSelfAttention", "flex_attention"),
        ("deepspeed.profiling.flops_profiler", "get_model_profile", "flops_profiler"),
        ("deepspeed.ops.transformer", "DeepSpeedTransformerLayer", "scaled_dot_product_attention"),
        ("deepspeed.runtime.zero.tiling", "TiledLinear", "torch.nn.Linear"),
    ],
)
def test_what_is_not_built_can_be_imported_and_says_what_to_use(
    module: str, name: str, instead: str, deepspeed: Any
) -> None:
    found = getattr(importlib.import_module(module), name)
    with pytest.raises(NotImplementedError, match=f"{name}: Redline does not build it; .*{instead}"):
        found(nn.Linear(1, 1))
    assert not isinstance(nn.Linear(1, 1), found), "scripts ask this of a model"
    uses = (list, len, float, lambda cls: cls > 0, lambda cls: 1 - cls, lambda cls: cls.inner())
    for use in (*uses, lambda cls: type("Sub", (cls,), {})()):
        with pytest.raises(NotImplementedError, match=instead):
            use(found)


def test_zero_has_the_modules_of_its_path(deepspeed: Any) -> None:
    assert deepspeed.zero.partition_parameters.ZeroParamStatus is deepspeed.zero.ZeroParamStatus
    assert deepspeed.zero.config.ZeroStageEnum.weights == 3
    with pytest.raises(NotImplementedError, match="TiledLinear: Redline does not build it"):
        deepspeed.zero.TiledLinear(4, 4)


def test_exceptions_that_are_not_built_can_be_caught(deepspeed: Any) -> None:
    from deepspeed.runtime.zero.utils import ZeRORuntimeException  # type: ignore[import-not-found]

    assert ZeRORuntimeException is deepspeed.runtime.zero.utils.ZeRORuntimeException
    with pytest.raises(ValueError, match="another"):
        try:
            raise ValueError("another")
        except ZeRORuntimeException:
            pass


@pytest.mark.parametrize("name", ["accelerator", "compression.zstd", "utils", "moe.layer"])
def test_a_missing_module_of_the_same_name_is_still_missing(name: str, deepspeed: Any) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_small_helpers_do_what_scripts_use_them_for(deepspeed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from deepspeed.compression.helper import recursive_getattr, recursive_setattr  # type: ignore[import-not-found]
    from deepspeed.runtime.utils import move_to_device  # type: ignore[import-not-found]
    from deepspeed.runtime.zero import stage3, stage_1_and_2  # type: ignore[import-not-found]
    from deepspeed.utils import groups  # type: ignore[import-not-found]

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    recursive_setattr(model, "0.0", nn.Identity())
    assert isinstance(recursive_getattr(model, "0.0"), nn.Identity)
    moved = move_to_device({"x": [torch.zeros(1)], "name": "a"}, torch.device("cpu"))
    assert moved["name"] == "a" and moved["x"][0].device.type == "cpu"
    stage3.estimate_zero3_model_states_mem_needs_all_live(nn.Linear(1000, 1000), num_gpus_per_node=2)
    stage_1_and_2.estimate_zero2_model_states_mem_needs_all_cold(total_params=1_000_000, num_nodes=2)
    assert capsys.readouterr().out.count("2 ranks, bf16 with Adam: ") == 2
    assert groups._get_sequence_parallel_world_size() == groups.get_data_parallel_world_size() == 1


def test_collectives_work_without_a_group(deepspeed: Any) -> None:
    comm = importlib.import_module("deepspeed.comm")
    assert (comm.get_rank(), comm.get_world_size(), comm.is_initialized()) == (0, 1, False)
    value = torch.tensor([3.0])
    comm.all_reduce(value)
    comm.barrier()
    gathered = [torch.zeros(1)]
    comm.all_gather(gathered, value)
    objects = [None]
    comm.all_gather_object(objects, {"a": 1})
    assert gathered[0].item() == 3.0 and objects == [{"a": 1}]


def test_arguments_of_a_script(deepspeed: Any) -> None:
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    options = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"])
    assert options.deepspeed and options.deepspeed_config == "ds.json"


def test_the_accelerator_of_a_cpu(deepspeed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = type(deepspeed.get_accelerator())("cpu")
    assert accelerator.device_name() == accelerator.current_device_name() == "cpu"
    assert accelerator.communication_backend_name() == "gloo" and accelerator.is_bf16_supported()
    accelerator.empty_cache()
    assert accelerator.memory_allocated() == 0 and accelerator.total_memory() > accelerator.available_memory() > 0
    with accelerator.stream(accelerator.current_stream()):
        accelerator.synchronize()
    with pytest.raises(AttributeError, match="the cpu accelerator has no 'nothing'"):
        _ = accelerator.nothing


def test_optimizers_by_deepspeeds_names(deepspeed: Any) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam  # type: ignore[import-not-found]

    model = nn.Linear(2, 2)
    assert FusedAdam(model.parameters()).param_groups[0]["decoupled_weight_decay"]
    classic = DeepSpeedCPUAdam(model.parameters(), adamw_mode=False)
    assert not classic.param_groups[0]["decoupled_weight_decay"]
    assert isinstance(torch.optim.AdamW(model.parameters()), FusedAdam)
    with pytest.raises(RuntimeError, match="AMSGrad"):
        FusedAdam(model.parameters(), amsgrad=True)


def test_scripts_may_ask_for_any_operation(deepspeed: Any) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder  # type: ignore[import-not-found]

    ops = deepspeed.ops.__compatible_ops__
    assert (ops[CPUAdamBuilder.NAME], ops[AsyncIOBuilder.NAME], AsyncIOBuilder.NAME) == (True, False, "async_io")


def test_activation_checkpointing_gives_the_same_gradients(deepspeed: Any) -> None:
    deepspeed.checkpointing.configure(None, deepspeed_config={})
    assert deepspeed.checkpointing.is_configured()
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    deepspeed.checkpointing.checkpoint(layer, x).sum().backward()
    (expected,) = torch.autograd.grad(layer(x).sum(), [x])
    assert torch.equal(x.grad, expected)  # type: ignore[arg-type]


def test_the_tracker_of_random_states_draws_apart(deepspeed: Any) -> None:
    tracker = deepspeed.checkpointing.get_cuda_rng_tracker()
    deepspeed.checkpointing.model_parallel_cuda_manual_seed(1)
    outside = torch.rand(1)
    with tracker.fork():
        inside = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), outside) and not torch.equal(inside, outside)


def test_leaf_modules_are_marked(deepspeed: Any) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    utils = deepspeed.utils
    assert utils.set_z3_leaf_modules(model, [nn.Linear]) == [model[0]] == utils.get_z3_leaf_modules(model)
    utils.unset_z3_leaf_modules(model, ["Linear"])
    assert utils.get_z3_leaf_modules(model) == []
    assert utils.set_z3_leaf_modules_by_name(model, ["1", "2"], raise_if_not_found=False) == ([model[1]], ["2"])
    assert utils.set_z3_leaf_modules_by_suffix(model, ["0"]) == ([model[0]], [])
    with pytest.raises(ValueError, match="No modules of type"):
        utils.set_z3_leaf_modules(model, [nn.Conv2d])
