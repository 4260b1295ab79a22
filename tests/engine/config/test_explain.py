"""What is known of every key: complete, with one status; and `redline explain`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from redline.cli import main
from redline.config.explain import catalog, explain, top_keys
from redline.config.section import HONOURED, NO_EFFECT, REFUSED
from redline.errors import EngineError

DEEPSPEED = json.loads((Path(__file__).parents[2] / "golden" / "deepspeed_keys.json").read_text())
OLDER = {
    "fp32_allreduce", "aio.thread_count", "activation_checkpointing.partitioned_activations",
    *(f"compile.{name}" for name in ("enabled", "disable", "backend", "kwargs")),
}  # fmt: skip
TORCHS = {
    "foreach", "fused", "momentum", "dampening", "nesterov", "maximize", "differentiable", "lr_decay",
    "initial_accumulator_value", "eps_inside_sqrt", "max_coeff", "min_coeff", "muon_lr", "adam_lr", "ns_method",
    "per_head_muon",
}  # fmt: skip


def test_no_key_of_deepspeed_is_missing_and_others_are_torchs_or_redlines() -> None:
    top, nested = set(DEEPSPEED["top"]), set(DEEPSPEED["nested"])
    assert {key.path for key in top_keys()} == top | {"redline", "fp32_allreduce"}
    ours = {entry.key for entry in catalog().values()} | {"optimizer.params", "scheduler.params"}
    assert nested <= ours
    known = top | nested | OLDER | {key.rpartition(".")[0] for key in nested}
    others = {key for key in ours - known if not key.startswith("redline")}
    assert others == {f"optimizer.params.{name}" for name in TORCHS} - known | {"scheduler.params.decay_num_steps"}


def test_every_key_has_a_meaning_values_a_status_and_a_reason_where_it_is_refused() -> None:
    for entry in catalog().values():
        assert entry.meaning.endswith(".") and entry.values, entry.path
        assert entry.status in (HONOURED, NO_EFFECT) or (entry.status == REFUSED and entry.note), entry.path
    assert all("DeepSpeed has removed it" in catalog()[path].note for path in DEEPSPEED["removed"])


def test_a_key_has_meaning_values_default_auto_and_status_and_the_stages_a_table() -> None:
    lines = explain("zero_optimization.stage").splitlines()
    assert lines[0] == "zero_optimization.stage"
    assert [line.split()[0] for line in lines[2:6]] == ["values", "default", '"auto"', "status"]
    assert "0, 1, 2 or 3" in lines[2] and "honoured: 1 is 2 here" in lines[5]
    assert "reshard_after_forward" in lines[7] and [line.split()[0] for line in lines[8:11]] == ["0", "1,", "3"]
    assert "N ranks;" in lines[14] and max(map(len, lines[14:])) <= 120


def test_the_last_part_is_enough_and_names_every_type() -> None:
    text = explain("total_num_steps")
    assert "scheduler.params.total_num_steps (WarmupDecayLR)\n" in text
    assert "scheduler.params.total_num_steps (WarmupCosineLR)\n" in text
    assert "none; it must be given" in text


def test_a_word_lists_the_keys_and_types_that_have_it() -> None:
    for word in ("warmup", "WarmupLR"):
        assert "\n  scheduler.params.warmup_num_steps (WarmupLR) " in explain(word)
    assert "scheduler.params.total_num_steps (WarmupDecayLR)" in explain("warmup")


def test_a_section_lists_what_is_in_it_and_a_pattern_what_it_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n  aio.queue_depth " in explain("aio")
    lines = explain("zero_optimization.offload_param.*").splitlines()
    assert len(lines) == 6 and all(line.startswith("  zero_optimization.offload_param.") for line in lines)
    assert explain().startswith("  train_batch_size ")
    assert main(["explain", "aio.queue_depth"]) == 0
    assert "Requests under way at once." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("zero_optimization.stge", 'did you mean "zero_optimization.stage"?'),
        ("gradient_cliping", 'did you mean "gradient_clipping"?'),
        ("*nothing*", "redline explain lists the keys at the top"),
    ],
)
def test_a_miss_names_the_nearest(query: str, hint: str) -> None:
    with pytest.raises(EngineError) as caught:
        explain(query)
    assert str(caught.value) == f'"{query}": unknown key; {hint}'
