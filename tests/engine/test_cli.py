"""The command: its help, and what each part prints, writes and exits with."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from redline import __version__
from redline.cli import main
from redline.config import build_schema
from tests.tasks import task_folder
from tests.terminal import on_terminal

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "validate", "explain", "diff", "schema", "plot", "range-test", "tune", "report", "consolidate", "run",
    "compare-run",
)  # fmt: skip
GOOD = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
CYCLE = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.3, "cycle_first_step_size": 2}
CONFIGS = {
    "good.json": GOOD,
    "bad.json": {"train_batch_size": 8, "shceduler": {}},
    "deepspeed.json": {**GOOD, "tensor_parallel": {"autotp_size": 2}},
    "cycle.json": {**GOOD, "scheduler": {"type": "OneCycle", "params": CYCLE}},
}
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
TEST = ("range-test", "task.py:linear", "--config", "good.json")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with configs and a task."""
    for name, config in CONFIGS.items():
        (tmp_path / name).write_text(json.dumps(config))
    with task_folder(tmp_path, monkeypatch, TASK):
        yield tmp_path


@pytest.fixture
def redline(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process; returns exit code, output and errors."""

    def run(*arguments: str) -> tuple[Any, str, str]:
        capsys.readouterr()
        try:
            code: Any = main(arguments)
        except SystemExit as left:
            code = left.code
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


def process(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = command.replace("redline", f"{sys.executable} -m redline")
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, capture_output=True, text=True,
                          env=environment, timeout=600)  # fmt: skip


# -- the command line ----------------------------------------------------------------------------------------


def test_the_help_lists_every_command(redline: Any) -> None:
    code, out, _ = redline("--help")
    assert code == 0 and out.startswith("usage: redline ")
    assert [command for command in COMMANDS if f"\n    {command} " not in out] == []
    assert redline("--version")[1] == f"redline {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_teaches(command: str, redline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = redline(command, "--help")
    assert code == 0 and f"usage: redline {command}" in out
    assert f"  redline {command}" in out.partition("example")[2]
    options = [line for line in out.splitlines() if line.startswith("  --")]
    assert [line for line in options if len(line.split("  ")) < 3] == [], "every option is explained"


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_a_terminal_gets_color_and_a_table(no_color: str, colored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, "stdout")
    monkeypatch.setenv("NO_COLOR", no_color)
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    assert ("\x1b[36m--steps\x1b[0m" in terminal.getvalue()) == colored
    assert main(["validate", "good.json"]) == 0
    assert any(line.split() == ["key", "status", "note"] for line in terminal.screen())
    assert ("\x1b[32mhonoured\x1b[0m" in terminal.getvalue()) == colored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("valdate", "good.json"), "invalid choice: 'valdate'"),
        (("validate",), "CONFIG"),
        (("validate", "good.json", "--world-size", "0"), 'got "0"; expected an integer >= 1'),
        (("plot", "good.json", "--steps", "many"), 'got "many"; expected an integer >= 1'),
        (("range-test", "task.py:linear"), "--config"),
        ((*TEST, "--step-rates", "5;50"), "expected numbers with commas"),
        ((*TEST, "--sweep", "lr=1"), "expected weight_decay=... or momentum"),
        ((*TEST, "--sweep", "momentum=a"), "expected weight_decay=... or momentum"),
        ((*TEST, "--batch-sizes", "8,0"), "expected integers >= 1 with commas"),
        ((*TEST, "--growth", "fast"), "invalid choice: 'fast'"),
        ((*TEST, "--baseline", "no"), "expected a learning rate or none"),
        ((*TEST, "--seed", str(2**70)), "expected an integer of at most 63 bits"),
        (("report", "range_test", "--smoothing", "1"), "from 0 to below 1"),
        (("consolidate",), "DIR"),
        (("consolidate", "run", "compare-run"), "--output"),
        (("consolidate", "run", "-o", "m.pt", "--dtype", "fp8"), "invalid choice: 'fp8'"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_the_reason(
    arguments: tuple[str, ...], message: str, redline: Any
) -> None:
    code, _, err = redline(*arguments)
    assert code == 2 and message in err


DEEPSPEEDS = ROOT / "tests" / "golden" / "deepspeed_checkpoints"
STAGE2 = ("consolidate", str(DEEPSPEEDS / "stage2-fp32"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plot", "nowhere.json"), "nowhere.json"),
        (("plot", "bad.json"), 'shceduler: unknown key; did you mean "scheduler"?'),
        (("plot", "cycle.json", "--out", "nowhere/a.png"), "nowhere/a.png: No such file or directory"),
        (("plot", "cycle.json", "--csv", "nowhere/a.csv"), "nowhere/a.csv: No such file or directory"),
        (("plot", "cycle.json", "--out", "a.xyz"), "a.xyz: "),
        (("plot", "cycle.json", "--steps", str(10**12)), "got 1,000,000,000,000; at most 5,000,000"),
        (("range-test", "nowhere.py:linear", *TEST[2:]), "nowhere.py"),
        (("range-test", "task.py", *TEST[2:]), "expected file.py:function"),
        (("range-test", "task.py:nothing", *TEST[2:]), "nothing"),
        (("range-test", "task.py:wrong", *TEST[2:]), "returned int"),
        ((*TEST[:3], "nowhere.json"), "nowhere.json"),
        ((*TEST[:3], "bad.json"), "shceduler: unknown key"),
        ((*TEST, "--min-lr", "-1", "--out", "."), "min_lr: got -1.0; expected a number > 0"),
        ((*TEST, "--out", "task.py/out"), "task.py/out: Not a directory"),
        ((*TEST, "--out", "task.py"), "task.py: File exists"),
        ((*TEST, "--rates", "5", "--max-lr", "1", "--out", "."), "max_lr: the growth follows from min_lr and max_lr"),
        (("range-test", "task.py:wrong", *TEST[2:], "--out", "old"), "old holds earlier results (tuned.json)"),
        (("tune", "task.py:wrong", *TEST[2:], "--steps", "999", "--out", "old"), "or replace them with --force"),
        ((*TEST, "--out", "a.png"), "out: a.png: give a folder"),
        (("report", "losses.csv", "--out", "old"), "old holds earlier results"),
        (("report", "."), "range_test.json"),
        (("report", "losses.csv"), "column"),
        (("consolidate", "nowhere", "-o", "m.pt"), "nowhere"),
        (("consolidate", ".", "-o", "m.pt"), "latest"),
        ((*STAGE2, "-o", "good.json"), "good.json"),
        ((*STAGE2, "-o", "task.py"), "task.py"),
        ((*STAGE2, "-o", "no/m.pt"), "no/m.pt"),
        ((*STAGE2, "--tag", "x", "-o", "m.pt"), "global_step7"),
    ],
)
def test_a_mistake_exits_with_1_and_the_reason_and_leaves_no_file(
    arguments: tuple[str, ...], message: str, redline: Any, folder: Path
) -> None:
    (folder / "losses.csv").write_text("rate,error\n0.1,2.0\n")
    (folder / "old").mkdir()
    (folder / "old" / "tuned.json").touch()
    before = {path.name for path in folder.iterdir()}
    code, _, err = redline(*arguments)
    assert code == 1
    assert message in err and err.splitlines()[-1].startswith(("redline: ", "  ")), "no traceback"
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before
    assert (folder / "task.py").read_text() == TASK


def test_in_a_process_of_its_own(folder: Path) -> None:
    assert process("redline --help | cat", folder).stdout.startswith("usage: redline ")
    done = process("redline plot nowhere.json", folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("redline: nowhere.json: 1 problem\n") and "Traceback" not in done.stderr
    left = process("redline schema | head -n 1", folder)  # a reader that leaves early
    assert (left.stdout, left.stderr, left.returncode) == ("{\n", "", 141)
    light = "import sys, redline.cli; redline.cli.build_parser(); assert not {'torch', 'rich'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", light], check=True, cwd=ROOT)


def test_an_interrupt_exits_as_shells_expect(redline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("redline.range_test.run_range_test", interrupted)
    code, _, err = redline(*TEST)
    assert code == 130 and err.endswith("redline: interrupted\n")


# -- validate and schema -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), [("good.json", 0), ("bad.json", 1), ("deepspeed.json", 3)])
def test_validate_exits_by_what_the_config_is(name: str, code: int, redline: Any) -> None:
    exit_code, out, _ = redline("validate", name)
    assert exit_code == code and out.startswith(f"{name}: ")
    exit_code, out, _ = redline("validate", name, "--json")
    report = json.loads(out)
    assert exit_code == code
    assert (report["valid"], report["runnable"]) == (code != 1, code == 0)
    assert report.keys() == {"valid", "runnable", "errors", "keys", "resolved"}
    where = {"path": "shceduler", "line": 1, "column": 25, "message": 'unknown key; did you mean "scheduler"?'}
    assert report["errors"] == ([where] if code == 1 else [])


def test_validate_of_several_exits_by_the_worst_and_prints_a_list(redline: Any) -> None:
    assert redline("validate", "good.json", "deepspeed.json")[0] == 3
    code, out, _ = redline("validate", "good.json", "bad.json", "deepspeed.json", "--json")
    assert code == 1
    assert [report["valid"] for report in json.loads(out)] == [True, False, True]


def test_validate_reads_standard_input(redline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, code in ((json.dumps(GOOD), 0), ('{"train_batch_size": }', 1), ("", 1)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        exit_code, out, _ = redline("validate", "-", "--json")
        assert exit_code == code and json.loads(out)["valid"] == (code == 0)


def test_validate_is_told_the_samples_for_a_number_of_steps_that_is_auto(redline: Any) -> None:
    params = {"total_num_steps": "auto", "warmup_num_steps": 2, "warmup_max_lr": 0.1}
    config = {"train_batch_size": 4, "optimizer": {"type": "Adam"}, "redline": {"epochs": 3},
              "scheduler": {"type": "WarmupDecayLR", "params": params}}  # fmt: skip
    Path("auto.json").write_text(json.dumps(config))
    assert redline("validate", "auto.json")[0] == 3
    code, out, _ = redline("validate", "auto.json", "--samples", "40", "--effective")
    assert code == 0
    assert ["scheduler.params.total_num_steps", "auto", "30"] in [line.split() for line in out.splitlines()]


def test_validate_checks_batch_sizes_for_a_world_and_a_policy(redline: Any, folder: Path) -> None:
    code, out, _ = redline("validate", "good.json", "--world-size", "4")
    assert code == 0 and "batch: 8 = 2 " in out
    assert redline("validate", "good.json", "--world-size", "3")[0] == 1
    (folder / "policy.json").write_text(json.dumps({"required": ["gradient_clipping"]}))
    code, out, _ = redline("validate", "good.json", "--schema", "policy.json")
    assert code == 1 and "gradient_clipping" in out


def test_validate_of_a_missing_file_is_a_report(redline: Any) -> None:
    code, out, err = redline("validate", "nowhere.json")
    assert code == 1 and "no such file" in out and err == ""


def test_schema_prints_the_schema(redline: Any) -> None:
    code, out, _ = redline("schema")
    assert code == 0 and json.loads(out) == build_schema()


# -- plot ----------------------------------------------------------------------------------------------------


def test_plot_draws_in_the_terminal_and_writes_picture_and_numbers(redline: Any, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotext", reason="the extra `terminal` is not installed")
    code, out, _ = redline("plot", "cycle.json", "--steps", "5", "--out", "a.png", "--csv", "a.csv")
    assert code == 0 and out.startswith("OneCycle: learning rate")
    assert out.endswith("Written to a.csv\nWritten to a.png\n")
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "a.csv").open(newline="") as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.1])
    assert redline("plot", "cycle.json")[0] == 0
    assert (folder / "cycle_schedule.png").exists()


def test_plot_without_matplotlib_still_draws_in_the_terminal(redline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotext", reason="the extra `terminal` is not installed")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = redline("plot", "cycle.json")
    assert code == 1 and out.startswith("OneCycle: learning rate")
    assert err.startswith("redline: ") and "pip install 'redline[plot]'" in err


# -- range-test and report -----------------------------------------------------------------------------------


def record_in(folder: Path) -> Any:
    return json.loads((folder / "range_test.json").read_text())["curves"]


def test_a_range_test_from_task_to_config_in_a_process_of_its_own(folder: Path, redline: Any) -> None:
    pytest.importorskip("matplotlib")
    done = process(
        "redline range-test task.py:linear --config good.json --step-rates 5,500 --steps 60 --min-lr 1e-3 --out out "
        "--train-steps 300",
        folder,
    )
    assert done.returncode == 0, done.stderr
    assert "Suggested OneCycle for 300" in done.stdout
    assert "rate 5: step " in done.stderr
    files = {path.name for path in (folder / "out").iterdir()}
    assert files == {"range_test.json", "range_test.csv", "range_test.png", "report.html", "one_cycle.json"}
    assert [curve["name"] for curve in record_in(folder / "out")] == ["fixed 0.01", "rate 5", "rate 500"]
    assert redline("validate", "out/one_cycle.json")[0] == 0
    code, out, _ = redline("report", "out", "--train-steps", "77")
    assert code == 0 and "Suggested OneCycle for 77" in out
    params = json.loads((folder / "out" / "one_cycle.json").read_text())["scheduler"]["params"]
    assert params["cycle_first_step_size"] + params["cycle_second_step_size"] == 77


def test_a_table_of_another_tool_is_reported_in_a_folder_of_its_own(redline: Any, folder: Path) -> None:
    rows = [f"{1e-4 * 1.1**k:.6g},{max(0.3, 2.3 - 0.04 * k)}" for k in range(80)]
    (folder / "losses.csv").write_text("\n".join(["rate,error", *rows]))
    table = ("report", "losses.csv", "--lr-column", "rate", "--loss-column", "error")
    code, out, _ = redline(*table, "--smoothing", "0.5", "--batch-size", "64")
    assert code == 0
    assert "Suggested OneCycle for 800" in out and " at batch size 64" in out
    config = json.loads((folder / "losses_report" / "one_cycle.json").read_text())
    assert "train_batch_size" in config["_range_test"]
    code, out, _ = redline(*table, "--out", "other", "--train-steps", "50")
    assert "Suggested OneCycle for 50" in out and "batch size" not in out.partition("Suggested")[2].splitlines()[0]
    assert redline("report", "other")[0] == 0


def test_a_range_test_is_the_same_with_the_same_seed(redline: Any, folder: Path) -> None:
    records = []
    for seed in ("1", "1", "2"):
        redline(*TEST, "--step-rates", "5", "--steps", "20", "--quiet", "--force", "--seed", seed)
        records.append(record_in(folder / "range_test"))
    assert records[0] == records[1] != records[2]


def test_a_range_test_at_several_seeds_batch_sizes_and_settings(redline: Any, folder: Path) -> None:
    more = ("--growth", "exponential", "--batch-sizes", "8,16", "--sweep", "weight_decay=0,1e-2", "--baseline", "none")
    redline(*TEST, "--steps", "20", "--quiet", "--seeds", "2", *more)
    record = record_in(folder / "range_test")
    base = "rate 1.5, exponential"
    names = [base, f"{base}, batch 16", f"{base}, weight_decay 0.01"]
    assert [curve["name"] for curve in record] == [name for each in names for name in (each, f"{each}, seed 1")]
    assert [curve["seed"] for curve in record] == [0, 1] * 3
    assert [curve["train_batch_size"] for curve in record] == [None, None, 16, 16, None, None]
    assert record[4]["settings"] == [["weight_decay", 0.01]]
    assert record[0]["lrs"][:2] == pytest.approx([1e-7, 2.5e-7])


def test_a_range_test_without_descent_is_refused_and_leaves_its_record(redline: Any, folder: Path) -> None:
    code, out, _ = redline("range-test", "task.py:flat", *TEST[2:], "--step-rates", "5", "--steps", "40", "--quiet")
    assert code == 1 and "No suggestion. " in out
    assert (folder / "range_test" / "range_test.json").exists()
    assert not (folder / "range_test" / "one_cycle.json").exists()
    assert redline("report", "range_test")[0] == 1


# -- consolidate ---------------------------------------------------------------------------------------------


def test_consolidate_writes_a_file_and_prints_what_is_in_it(redline: Any, folder: Path) -> None:
    code, out, err = redline("consolidate", str(DEEPSPEEDS / "stage3-bf16-two-groups"), "-o", "model.safetensors")
    assert (code, err) == (0, "")
    assert out.startswith("model.safetensors: 10 tensors, 0.0 MiB; from ")
    assert out.endswith("  head.weight is tied to embed.weight\n")
    assert (folder / "model.safetensors").stat().st_size == 1168
    source = str(DEEPSPEEDS / "stage1-fp32-two")
    assert redline("consolidate", source, "--tag", "global_step7", "--dtype", "bf16", "-o", "m.bin", "--quiet")[0] == 0
    tensors = torch.load("m.bin", weights_only=True)
    assert len(tensors) == 11 and tensors["mix.weight"].dtype == torch.bfloat16


def test_consolidate_into_a_folder_that_cannot_be_written_to(
    redline: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = open

    def refuse(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "w" in mode and "m.safetensors" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, mode, *rest, **more)

    if os.name == "nt" or os.geteuid() == 0:  # root may write everywhere
        monkeypatch.setattr("builtins.open", refuse)
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0o500)
    code, _, err = redline(*STAGE2, "-o", "locked/m.safetensors")
    assert code == 1 and "locked/m.safetensors: " in err and "Permission denied" in err
    assert list((folder / "locked").iterdir()) == []
