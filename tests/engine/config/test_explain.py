"""What a key means, and the command line around configs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.cli import main
from engine.config.explain import explain
from engine.config.table import paint_on_terminal, rows_as_text
from engine.errors import EngineError


def test_a_key_has_meaning_values_default_auto_and_status_and_the_stages_a_table() -> None:
    assert explain("zero_optimization.stage") == (
        "zero_optimization.stage\n"
        "  0 shards nothing, 1 optimizer state, 2 gradients as well, 3 parameters as well.\n"
        "  values   0, 1, 2 or 3\n"
        "  default  0\n"
        '  "auto"   the default\n'
        "  status   honoured: 1 is 2 here: a gradient is reduced to the rank that owns its shard\n"
        "\n"
        "  stage        shared out                      reshard_after_forward  sent per update                  memory per process\n"  # noqa: E501
        "  0            nothing                         -                      2G                               w + W + G + S; in fp32 W + G + S\n"  # noqa: E501
        "  1, 2         optimizer state, master params  -                      w + G                            w + g + (W + S)/N\n"  # noqa: E501
        "  3            parameters, too                 True                   2w per micro-batch, G            (W + G + S)/N + w of a block or two\n"  # noqa: E501
        "  3, hpz n     and a copy of them among n      n                      w, w among n per micro-batch, G  as 3, and w/n until backward\n"  # noqa: E501
        "  1-3, mics n  as the stage, but among n       as the stage           as the stage, and 2G/n           as the stage, n for N\n"  # noqa: E501
        "\n"
        "  N processes; W weights as the optimizer has them, w as the model computes with them; G gradients as they are reduced,\n"  # noqa: E501
        "  g as a backward makes them; S optimizer state. hpz n: zero_hpz_partition_size. mics n: mics_shard_size, a mesh of N/n\n"  # noqa: E501
        "  by n."
    )


def test_the_last_part_is_enough_and_names_every_type() -> None:
    text = explain("total_num_steps")
    assert "scheduler.params.total_num_steps (WarmupDecayLR)\n" in text
    assert "scheduler.params.total_num_steps (WarmupCosineLR)\n" in text
    assert "none; it must be given" in text


def test_a_section_lists_what_is_in_it_and_a_pattern_what_it_matches() -> None:
    assert "\n  aio.queue_depth " in explain("aio")
    lines = explain("zero_optimization.offload_param.*").splitlines()
    assert len(lines) == 6 and all(line.startswith("  zero_optimization.offload_param.") for line in lines)
    assert explain().startswith("  train_batch_size ")


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


def test_a_table_is_folded_on_a_terminal_and_a_line_a_row_in_a_pipe() -> None:
    rows = [("a", "honoured", "one two three four five six")]
    assert list(rows_as_text(rows, ("key", "status", "note"))) == ["  a  honoured  one two three four five six"]
    lines = list(rows_as_text(rows, ("key", "status", "note"), 40, paint_on_terminal))
    assert lines[0] == "  \x1b[1mkey\x1b[0m  \x1b[1mstatus  \x1b[0m  note"
    assert lines[2:] == ["  a    \x1b[32mhonoured\x1b[0m  one two three four five", " " * 17 + "six"]


def test_two_configs_are_compared_as_they_are_in_force(
    write: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write('{"train_batch_size": 8, "gradient_clipping": 1.0, "_note": "mine"}')
    Path("other.json").write_text('{"train_micro_batch_size_per_gpu": 8}')
    Path("third.json").write_text('{"train_batch_size": 8, "gradient_clipping": 0.5, "aio": {"queue_depth": 4}}')
    assert main(["diff", "ds_config.json", "other.json"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["diff", "ds_config.json", "third.json"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "  gradient_clipping  1.0 (given)  0.5 (given)",
        "  aio.queue_depth    -            4 (unread)",
    ]
    Path("broken.json").write_text('{"train_batch_size": 0}')
    assert main(["diff", "ds_config.json", "broken.json"]) == 1
    assert "train_batch_size: got 0" in capsys.readouterr().err


def test_validate_takes_several_files_and_shows_the_config_in_force(
    write: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write('{"train_batch_size": 8}')
    Path("sharded.json").write_text('{"train_batch_size": 8, "tensor_parallel": {"autotp_size": 2}}')
    assert main(["validate", "ds_config.json"]) == 0
    assert main(["validate", "ds_config.json", "sharded.json"]) == 3
    capsys.readouterr()
    assert main(["validate", "--effective", "ds_config.json"]) == 0
    assert re.search("gradient_clipping +default  1.0\n", capsys.readouterr().out)
    assert main(["validate", "--effective", "--json", "ds_config.json"]) == 0
    assert json.loads(capsys.readouterr().out)["origins"]["gradient_clipping"] == "default"
    with pytest.raises(SystemExit) as left:
        main(["validate"])
    assert left.value.code == 2


def test_explain_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "aio.queue_depth"]) == 0
    assert "Requests under way at once." in capsys.readouterr().out
    assert main(["explain", "aio.queue_deth"]) == 1
    assert "did you mean" in capsys.readouterr().err
