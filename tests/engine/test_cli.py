"""The command: what each part prints, writes and exits with; `python -m engine` is the same as `redline`."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cli import main
from engine.config import build_schema
from tests.tasks import task_folder

ROOT = Path(__file__).parent.parent.parent

GOOD = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
TASK = """
import torch
from torch import nn

def linear():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = x.sum(1, keepdim=True)
    return nn.Linear(4, 1), (x, y), nn.MSELoss(), (x[:16], y[:16])

def flat():
    x = torch.zeros(64, 4)
    return nn.Linear(4, 1, bias=False), (x, x[:, :1]), nn.MSELoss()

def wrong():
    return 3
"""


def module(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "engine", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=100)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a good config, a bad one, one of DeepSpeed's, and a task."""
    for name, config in {
        "good.json": GOOD,
        "bad.json": {"train_batch_size": 8, "shceduler": {}},
        "deepspeed.json": {**GOOD, "tensor_parallel": {"autotp_size": 2}},
        "cycle.json": {**GOOD, "scheduler": {"type": "OneCycle", "params": {
            "cycle_min_lr": 0.1, "cycle_max_lr": 0.3, "cycle_first_step_size": 2}}},
    }.items():  # fmt: skip
        (tmp_path / name).write_text(json.dumps(config))
    with task_folder(tmp_path, monkeypatch, TASK):
        yield tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    found = capsys.readouterr()
    return found.out, found.err


def exits(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_python_dash_m_engine_is_redline() -> None:
    done = module("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: redline ")
    for command in ("validate", "schema", "plot", "range-test", "tune", "report", "consolidate"):
        assert f"\n    {command}" in done.stdout


# -- validate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), [("good.json", 0), ("bad.json", 1), ("deepspeed.json", 3)])
def test_validate_exits_by_what_the_config_is(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", name]) == code
    assert said(capsys)[0].startswith(f"{name}: ")


def test_validate_of_several_exits_by_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "good.json", "deepspeed.json"]) == 3
    assert main(["validate", "good.json", "bad.json", "deepspeed.json"]) == 1
    assert "deepspeed.json: valid DeepSpeed" in said(capsys)[0]


@pytest.mark.parametrize(("name", "valid", "runnable"), [
    ("good.json", True, True), ("bad.json", False, False), ("deepspeed.json", True, False)
])  # fmt: skip
def test_validate_prints_one_json_object(
    name: str, valid: bool, runnable: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["validate", name, "--json"])
    report = json.loads(said(capsys)[0])
    assert (report["valid"], report["runnable"]) == (valid, runnable)
    assert report.keys() == {"valid", "runnable", "errors", "keys", "resolved"}
    if not valid:
        assert report["errors"] == [{
            "path": "shceduler", "line": 1, "column": 25, "message": 'unknown key; did you mean "scheduler"?'
        }]  # fmt: skip


def test_validate_prints_a_json_list_for_several(capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", "good.json", "bad.json", "--json"])
    assert [report["valid"] for report in json.loads(said(capsys)[0])] == [True, False]


def test_validate_checks_batch_sizes_for_a_world(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "good.json", "--world-size", "4"]) == 0
    assert "batch: 8 = 2 a process x 1 accumulated x world size 4" in said(capsys)[0]
    assert main(["validate", "good.json", "--world-size", "3"]) == 1


def test_validate_checks_a_policy_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonschema")
    (folder / "policy.json").write_text(json.dumps({"required": ["gradient_clipping"]}))
    assert main(["validate", "good.json", "--schema", "policy.json"]) == 1
    assert "gradient_clipping" in said(capsys)[0]


def test_validate_of_a_missing_file_is_an_error_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "nowhere.json"]) == 1
    out, err = said(capsys)
    assert "nowhere.json: no such file" in out + err
    assert "Traceback" not in out + err


# -- schema --------------------------------------------------------------------------------------------------


def test_schema_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(said(capsys)[0]) == build_schema()


# -- plot ----------------------------------------------------------------------------------------------------


def test_plot_draws_in_the_terminal_and_writes_picture_and_numbers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plot", "cycle.json", "--steps", "5", "--out", "a.png", "--csv", "a.csv"]) == 0
    out, _ = said(capsys)
    assert "OneCycle: learning rate by update" in out
    assert out.endswith("Written to a.csv\nWritten to a.png\n")
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "a.csv").open(newline="") as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.1])


def test_plot_names_its_picture_after_the_config(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plot", "cycle.json"]) == 0
    assert (folder / "cycle_schedule.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "nowhere.json"),
        (["bad.json"], 'shceduler: unknown key; did you mean "scheduler"?'),
        (["cycle.json", "--out", "nowhere/a.png"], "nowhere/a.png: No such file or directory"),
        (["cycle.json", "--csv", "nowhere/a.csv"], "nowhere/a.csv: No such file or directory"),
        (["cycle.json", "--out", "a.xyz"], "a.xyz: "),
    ],
)
def test_plot_says_what_is_wrong_without_a_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", *arguments]) == 1
    _, err = said(capsys)
    assert err.startswith("redline: ")
    assert message in err


def test_plot_without_matplotlib_still_draws_in_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["plot", "cycle.json"]) == 1
    out, err = said(capsys)
    assert "OneCycle: learning rate by update" in out
    assert err == "redline: a picture needs matplotlib; install it with `pip install 'redline[plot]'`\n"


# -- range-test and report -----------------------------------------------------------------------------------


def test_a_range_test_from_task_to_config_in_a_process_of_its_own(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    done = module(
        *("range-test", "task.py:linear", "--config", "good.json", "--rates", "5,500", "--steps", "60"),
        *("--min-lr", "1e-3", "--out", "out", "--train-steps", "300"),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Training loss by learning rate\n")
    assert "[ ] suggested 1Cycle, " in done.stdout
    assert "Suggested OneCycle for 300 updates at batch size 8:" in done.stdout
    assert "rate 5: step " in done.stderr
    files = {path.name for path in (folder / "out").iterdir()}
    assert files == {"range_test.json", "range_test.csv", "range_test.png", "report.html", "one_cycle.json"}
    assert {path.name for path in folder.iterdir()} >= {"task.py", "out"}
    record = json.loads((folder / "out" / "range_test.json").read_text())
    assert [curve["name"] for curve in record["curves"]] == ["fixed 0.01", "rate 5", "rate 500"]
    assert main(["validate", "out/one_cycle.json"]) == 0


def test_a_range_test_can_be_reported_again_for_another_length(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "good.json", "--rates", "5,500", "--steps", "60", "--min-lr", "1e-3", "--quiet"]
    assert main(["range-test", "task.py:linear", *arguments, "--baseline", "none"]) == 0
    capsys.readouterr()
    assert main(["report", "range_test", "--train-steps", "77"]) == 0
    assert "Suggested OneCycle for 77 updates" in said(capsys)[0]
    params = json.loads((folder / "range_test" / "one_cycle.json").read_text())["scheduler"]["params"]
    assert params["cycle_first_step_size"] + params["cycle_second_step_size"] == 77


def test_a_table_of_another_tool_is_reported_in_a_folder_of_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{1e-4 * 1.1**k:.6g},{max(0.3, 2.3 - 0.04 * k)}" for k in range(80)]
    (folder / "losses.csv").write_text("\n".join(["rate,error", *rows]))
    assert main(["report", "losses.csv"]) == 1
    assert said(capsys)[1].startswith(
        "redline: losses.csv: has no column with a learning rate and column with a loss; "
    )
    columns = ["--lr-column", "rate", "--loss-column", "error"]
    assert main(["report", "losses.csv", *columns, "--smoothing", "0.5", "--batch-size", "64"]) == 0
    out = said(capsys)[0]
    assert out.startswith("Training loss by learning rate\n")
    assert "Suggested OneCycle for 800 updates at batch size 64:" in out
    assert "Written to losses_report: range_test.json, " in out
    assert '"beta":0.5' in (folder / "losses_report" / "report.html").read_text()
    assert "train_batch_size" in json.loads((folder / "losses_report" / "one_cycle.json").read_text())["_range_test"]
    assert main(["report", "losses.csv", *columns, "--out", "other", "--train-steps", "50"]) == 0
    assert "Suggested OneCycle for 50 updates:" in said(capsys)[0], "nobody knows at which batch size"
    assert "train_batch_size" not in json.loads((folder / "other" / "one_cycle.json").read_text())["_range_test"]
    assert main(["report", "other"]) == 0
    with pytest.raises(SystemExit):
        main(["report", "other", "--smoothing", "1"])


def test_a_range_test_is_the_same_with_the_same_seed(folder: Path) -> None:
    arguments = ["range-test", "task.py:linear", "--config", "good.json", "--rates", "5", "--steps", "20", "--quiet"]
    records = []
    for seed in ("1", "1", "2"):
        main([*arguments, "--seed", seed])
        records.append(json.loads((folder / "range_test" / "range_test.json").read_text())["curves"])
    assert records[0] == records[1] != records[2]


def test_a_range_test_at_several_seeds_batch_sizes_and_settings(folder: Path) -> None:
    arguments = ["range-test", "task.py:linear", "--config", "good.json", "--steps", "20", "--quiet", "--seeds", "2"]
    more = ["--growth", "exponential", "--batch-sizes", "8,16", "--sweep", "weight_decay=0,1e-2", "--baseline", "none"]
    main([*arguments, *more])
    record = json.loads((folder / "range_test" / "range_test.json").read_text())["curves"]
    assert [curve["name"] for curve in record] == [
        "rate 1.5, exponential",
        "rate 1.5, exponential, seed 1",
        "rate 1.5, exponential, batch 16",
        "rate 1.5, exponential, batch 16, seed 1",
        "rate 1.5, exponential, weight_decay 0.01",
        "rate 1.5, exponential, weight_decay 0.01, seed 1",
    ]
    assert [curve["seed"] for curve in record] == [0, 1] * 3
    assert [curve["train_batch_size"] for curve in record] == [None, None, 16, 16, None, None]
    assert record[4]["settings"] == [["weight_decay", 0.01]]
    assert record[0]["lrs"][:2] == pytest.approx([1e-7, 2.5e-7])


def test_a_range_test_without_descent_is_refused_and_leaves_its_record(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "good.json", "--rates", "5", "--steps", "40", "--quiet", "--out", "out"]
    assert main(["range-test", "task.py:flat", *arguments]) == 1
    assert "No suggestion. " in said(capsys)[0]
    assert (folder / "out" / "range_test.json").exists()
    assert not (folder / "out" / "one_cycle.json").exists()
    assert main(["report", "out"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py:linear", "--config", "good.json"], "TASK: there is no file nowhere.py"),
        (["task.py", "--config", "good.json"], "expected file.py:function"),
        (["task.py:nothing", "--config", "good.json"], "TASK: task.py has no function nothing"),
        (["task.py:wrong", "--config", "good.json"], "task.py:wrong: returned int; expected model, data, loss"),
        (["task.py:linear", "--config", "nowhere.json"], "nowhere.json"),
        (["task.py:linear", "--config", "bad.json"], "shceduler: unknown key"),
        (["task.py:linear", "--config", "good.json", "--min-lr", "-1"], "min_lr: got -1.0; expected a number > 0"),
        (["task.py:linear", "--config", "good.json", "--out", "task.py/out"], "task.py/out: Not a directory"),
        (["task.py:linear", "--config", "good.json", "--out", "task.py"], "task.py: File exists"),
    ],
)
def test_a_range_test_says_what_is_wrong_without_a_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["range-test", *arguments, "--steps", "20", "--quiet"]) == 1
    _, err = said(capsys)
    assert err.splitlines()[-1].startswith(("redline: ", "  "))
    assert message in err


def test_a_folder_without_a_record_is_said_to_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "."]) == 1
    assert said(capsys)[1] == "redline: .: there is no range_test.json; give the folder that a range test wrote\n"


def test_errors_reach_the_shell_in_one_line_too(folder: Path) -> None:
    done = module("plot", "nowhere.json", folder=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("redline: nowhere.json: 1 problem\n  no such file ")
    assert "Traceback" not in done.stderr


def test_an_interruption_is_said_and_exits_as_shells_expect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.range_test.run_range_test", interrupted)
    assert main(["range-test", "task.py:linear", "--config", "good.json"]) == 130
    assert said(capsys)[1].endswith("redline: interrupted\n")


# -- consolidate ---------------------------------------------------------------------------------------------

DEEPSPEEDS = ROOT / "tests" / "golden" / "deepspeed_checkpoints"


def test_consolidate_writes_a_file_and_says_what_is_in_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = DEEPSPEEDS / "stage3-bf16-two-groups"
    assert main(["consolidate", str(source), "-o", "model.safetensors"]) == 0
    out, err = said(capsys)
    assert out.splitlines() == [
        f"model.safetensors: 10 tensors, 0.0 MiB; from {source / 'global_step7'}, DeepSpeed's, of ZeRO stage 3 on "
        "2 processes",
        "  head.weight is tied to embed.weight",
    ]
    assert err == ""
    assert (folder / "model.safetensors").stat().st_size == 1168


def test_consolidate_takes_a_tag_a_number_format_and_another_kind_of_file(folder: Path) -> None:

    source = str(DEEPSPEEDS / "stage1-fp32-two")
    assert (
        main(["consolidate", source, "--tag", "global_step7", "--dtype", "bf16", "--output", "m.bin", "--quiet"]) == 0
    )
    tensors = torch.load("m.bin", weights_only=True)
    assert len(tensors) == 11 and tensors["mix.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "-o", "m.pt"), "redline: nowhere: there is no such folder"),
        ((".", "-o", "m.pt"), 'redline: .: it has no checkpoint, or none named in the file "latest"'),
        ((str(DEEPSPEEDS / "stage2-fp32"), "-o", "good.json"), "redline: good.json: expected a name that ends in"),
        ((str(DEEPSPEEDS / "stage2-fp32"), "-o", "there.pt"), "redline: there.pt: it is there already"),
        ((str(DEEPSPEEDS / "stage2-fp32"), "-o", "no/m.pt"), "redline: no/m.pt: the folder no is not there"),
        ((str(DEEPSPEEDS / "stage2-fp32"), "--tag", "x", "-o", "m.pt"), "there are the tags global_step7"),
    ],
)
def test_consolidate_says_what_is_at_fault_in_one_line_and_leaves_no_file(
    arguments: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "there.pt").write_text("precious")
    before = sorted(path.name for path in folder.iterdir())
    assert main(["consolidate", *arguments]) == 1
    out, err = said(capsys)
    assert out == "" and message in err and len(err.splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (folder / "there.pt").read_text() == "precious"


@pytest.mark.parametrize("arguments", [(), ("run",), ("run", "-o", "m.pt", "--dtype", "fp8")])
def test_consolidate_needs_a_folder_and_a_file_and_knows_its_number_formats(arguments: tuple[str, ...]) -> None:
    assert exits("consolidate", *arguments) == 2


def test_consolidate_of_a_folder_that_cannot_be_written_to_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.name == "nt" or os.geteuid() == 0:  # root may write everywhere
        monkeypatch.setattr("builtins.open", _refusing_to_write("m.safetensors"))
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0o500)
    assert main(["consolidate", str(DEEPSPEEDS / "stage2-fp32"), "-o", "locked/m.safetensors"]) == 1
    assert "locked/m.safetensors: it could not be written: Permission denied; nothing was left" in said(capsys)[1]
    assert list((folder / "locked").iterdir()) == []


def _refusing_to_write(name: str) -> Any:
    import builtins
    import errno

    usual = builtins.open

    def opening(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "w" in mode and name in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, mode, *rest, **more)

    return opening
