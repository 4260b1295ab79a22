"""Runs DeepSpeed's own unit tests, on the CPU, with Redline's package `deepspeed`, and prints a table.

    scripts/dev/deepspeed_tests SOURCE                                     # all files of deepspeed_tests.json: hours
    scripts/dev/deepspeed_tests SOURCE unit/runtime/test_lr_schedulers.py -k OneCycle
    scripts/dev/deepspeed_tests SOURCE --deepspeed                         # with the DeepSpeed that is installed

SOURCE is a checkout of DeepSpeed, of which only the tests are read, from a copy. They need pytest before 8.4, hjson,
psutil and py-cpuinfo. Each file is a process of its own with a timeout, and so is each rank of a test, so that a hang
costs one test. Outcomes are added to a log; a run that was stopped continues where it was.

``deepspeed_tests.json`` has the files, those that are left out, and why known tests fail: for each reason a pattern of
the test's name and its error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KNOWN: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
COLUMNS = ("passed", "failed", "known", "skipped")


def run_file(tests: Path, file: str, options: list[str], log: Path, *, timeout: float, real: bool) -> bool:
    """Run one file's tests; outcomes are added to `log`. False if it was ended at its timeout."""
    paths = [str(tests), str(Path(__file__).parent), *([] if real else [str(ROOT / "engine" / "compat")])]
    env = {
        "DS_UNITTEST_TIMEOUT": "60", "LOCAL_SIZE": "4", "OMP_NUM_THREADS": "1", **os.environ,
        "DS_ACCELERATOR": "cpu", "DEEPSPEED_TESTS_LOG": str(log), "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "deepspeed_tests_plugin", "-p", "no:cacheprovider"]
    process = subprocess.Popen([*command, file, *options], cwd=tests, env=env, start_new_session=True)
    try:
        process.wait(timeout)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(log: Path, files: list[str]) -> str:
    """How many tests of each file passed, failed, fail for a known reason, and were skipped."""
    outcomes = {line["test"]: line for line in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    counts = {file: Counter[str]() for file in files}
    unknown, reasons = [], Counter[str]()
    for test, line in outcomes.items():
        outcome, file = line["outcome"], test.partition("::")[0]
        if file not in counts:
            continue
        found = f"{test}: {line['why']}"
        reason = next((why for why, pattern in KNOWN["reasons"].items() if re.search(pattern, found)), None)
        if outcome == "failed" and reason is not None:
            outcome = "known"
            reasons[reason] += 1
        elif outcome == "failed":
            unknown.append(f"{test}: {line['why'].strip().splitlines()[-1:]}")
        counts[file][outcome] += 1
    width = max(map(len, files))
    rows = [("file", *COLUMNS), *((file, *(count[each] for each in COLUMNS)) for file, count in counts.items())]
    rows.append(("total", *(sum(count[each] for count in counts.values()) for each in COLUMNS)))
    lines = [f"{name:{width}}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows]
    lines += ["", "known:", *(f"{number:5}  {why}" for why, number in reasons.most_common())]
    return "\n".join([*lines, "", "failed:", *unknown])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkout of DeepSpeed")
    parser.add_argument("--log", type=Path, default=Path("deepspeed_tests.jsonl"), help="outcomes, one per line")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a file")
    parser.add_argument("--deepspeed", action="store_true", help="with the DeepSpeed that is installed")
    parser.add_argument("--table", action="store_true", help="only print the table of the log")
    args, rest = parser.parse_known_args()
    files = [each for each in rest if each.startswith("unit/")] or KNOWN["files"]
    options = [each for each in rest if each not in files]
    log: Path = args.log.resolve()
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "tests"
        if not args.table:
            shutil.copytree(args.source / "tests", tests)
        for file in files if not args.table else ():
            if not run_file(tests, file, options, log, timeout=args.timeout, real=args.deepspeed):
                print(f"{file}: ended after {args.timeout:.0f} s")
    print(table(log, files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
