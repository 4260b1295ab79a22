"""Configs as people write them for DeepSpeed: they run, or are told what is not built; never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import validate

FOLDER = Path(__file__).parent / "deepspeed"
# Exit code, and what is refused (3) or wrong (1).
EXPECTED = {
    "hf_zero3_offload": (3, ["scheduler.params.total_num_steps", "train_batch_size"]),
    "old_bert_lamb": (3, ["sparse_attention"]),
    "old_cpu_offload": (3, ["optimizer.params.max_grad_norm", "flops_profiler.end_profile_step"]),
    "plain_one_cycle": (0, []),
    "zero_pp_moe": (
        3,
        [
            "zero_optimization.zero_quantized_weights",
            "zero_optimization.zero_quantized_gradients",
            "zero_optimization.offload_optimizer.device",
            "zero_optimization.offload_optimizer.ratio",
            "checkpoint.load_universal",
            "seed",
        ],
    ),
    "refused_by_deepspeed": (
        1,
        ["bf16.loss_scale", "bf16.auto_cast", "fp16.opt_level", "zero_optimization.cpu_offload_params"],
    ),
}


def test_every_config_is_expected() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_comes_back_with_its_code_and_reasons(name: str) -> None:
    report = validate(FOLDER / f"{name}.json")
    code, paths = EXPECTED[name]
    assert report.exit_code == code, report.to_text()
    assert [problem.path for problem in report.errors or report.refusals] == paths
    assert all(problem.line for problem in (*report.errors, *report.refusals))
