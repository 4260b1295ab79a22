"""Plants faults in copies of the tree, one in each, and shows which tests catch them.

    python scripts/dev/plant_faults.py                  # all: half an hour on two cores
    python scripts/dev/plant_faults.py --list           # whether every patch still applies; exit code 1 if not
    python scripts/dev/plant_faults.py --only clip,mean # those with one of these words in their name

A fault replaces a few characters of the source. With it, at least one of its tests must fail; without any fault, all of
these tests must pass. A patch that no longer applies, because its line has changed, is an error: update its text here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from scripts.dev.checkout import ROOT, environment_of

RUNS = "tests/test_house.py::test_short_runs_train_as_before"
ONE, TWO = f"{RUNS}[1]", f"{RUNS}[2]"
CHECKPOINTS = "tests/test_house.py::test_checkpoints_of_an_older_version_load_bit_for_bit"
CONFIGS = "tests/test_house.py::test_every_config_is_judged_as_before"
GATHERED = "tests/engine/test_accumulation.py::test_a_step_uses_the_gradients_of_engine_backward_once[2-3]"
SAVE = "tests/engine/checkpoint/test_save.py"
FOUND = "tests/test_house.py::test_learning_rates_are_found_as_before"
PASSED = "NOT CAUGHT"
NOTHING = (PASSED, "NO ANSWER")
LIMIT = 900  # seconds of one run of tests, on a busy machine


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
        name: what goes wrong.
        path: of the file.
        old: text that is there exactly once.
        new: what takes its place.
        tests: arguments of pytest: tests of which at least one must fail.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    def why_not(self, root: Path) -> str | None:
        """Why the patch does not apply; None where it does."""
        path = root / self.path
        if not path.is_file():
            return f"{self.path} is not there"
        count = path.read_text().count(self.old)
        return None if count == 1 else f"{self.path} has it {count} times: {self.old!r}"


FAULTS = (
    # -- the step loop
    Fault("no clipping", "engine/optimizer_step.py",
          "clips = limit > 0 and (value is None or not value + 1e-6 <= limit)", "clips = False", (ONE,)),
    Fault("clips without unscaling", "engine/optimizer_step.py",
          "divisor = scale * (value + 1e-6) / limit", "divisor = scale",
          ("tests/engine/test_precision.py",)),
    Fault("schedule steps on a skipped step", "engine/step_loop.py",
          "elif self.lr_scheduler is not None and not skipped:", "elif self.lr_scheduler is not None:", (ONE,)),
    Fault("losses are not divided by the accumulation", "engine/step_loop.py",
          "if scale_wrt_gas and steps > 1:", "if scale_wrt_gas and steps > 99:", (ONE,)),
    Fault("an accumulation ends one late", "engine/accumulation.py",
          "return self.micro_batches + 1 >= self.steps", "return self.micro_batches >= self.steps", (ONE,)),
    Fault("flush divides by a full accumulation", "engine/accumulation.py",
          "scale_by(gradients, state.steps * self._world.size / total)", "pass",
          (GATHERED,)),
    Fault("samples of one rank are counted", "engine/step_loop.py",
          "micro_batches * self.config.train_micro_batch_size_per_gpu * self.world.size",
          "micro_batches * self.config.train_micro_batch_size_per_gpu", (TWO,)),
    Fault("half precision does not get the master params", "engine/optimizer_step.py",
          "        params.copy_to_model()\n        self._moving = False\n", "        self._moving = False\n", (ONE,)),
    Fault("the loss scale does not shrink", "engine/precision.py",
          "self.value = max(self.value / 2, self.minimum)", "self.value = max(self.value, self.minimum)", (ONE,)),
    Fault("the loss scale grows one step early", "engine/precision.py",
          "stable = self._updates - self._last_overflow - 1", "stable = self._updates - self._last_overflow",
          ("tests/engine/test_loss_scale.py",)),
    Fault("Lamb without its bounds", "engine/optimizers/lamb.py",
          '.clamp(group["min_coeff"], group["max_coeff"])', "", ("tests/engine/optimizers/test_lamb.py",)),
    # -- ranks
    Fault("sum for mean", "engine/gradients.py",
          "return cls(size, dtype, before=1.0 / factor, after=factor / size)", "return cls(size, dtype)", (TWO,)),
    Fault("the norm of one's own shards", "engine/distributed/strategy.py",
          'self._run_collective("all_reduce", square.nbytes, lambda: dist.all_reduce(square, group=self._group))',
          "pass",
          (TWO,)),
    Fault("no_sync sends the gradients all the same", "engine/accumulation.py",
          "if ends and not state.in_no_sync:", "if ends:",
          ("tests/engine/distributed/test_process_group.py::test_what_no_sync_kept_is_shared_by_the_backward_after_it",)),
    Fault("seed unshared", "engine/data.py",
          "torch.Generator().manual_seed(self.seed + epoch)", "torch.Generator().manual_seed(self.seed + rank)",
          (CHECKPOINTS,)),
    Fault("every epoch in the same order", "engine/data.py",
          "torch.Generator().manual_seed(self.seed + epoch)", "torch.Generator().manual_seed(self.seed)",
          (CHECKPOINTS,)),
    # -- checkpoints
    Fault("stale manifest: a flipped bit passes", "engine/checkpoint/storage.py",
          "(found := record_of(path)) != expected", "(found := expected) != expected",
          (f"{SAVE}::test_a_file_that_was_harmed_is_named_and_the_newest_whole_checkpoint_is_used",)),
    Fault("stale manifest: a changed manifest passes", "engine/checkpoint/storage.py",
          "if _checksum(document) != crc32:", "if not crc32:",
          (f"{SAVE}::test_a_manifest_that_was_harmed_is_named",)),
    Fault("`latest` stays where it was", "engine/checkpoint/save.py",
          "                os.replace(latest, parent / storage.LATEST)\n", "                pass\n",
          (f"{SAVE}::test_a_folder_holds_checkpoints_and_latest_and_nothing_else",)),
    Fault("the newest checkpoints are removed", "engine/checkpoint/storage.py",
          "for each in ordered[:-keep_last]", "for each in ordered[keep_last:]",
          (f"{SAVE}::test_the_last_few_stay_and_every_so_many",)),
    Fault("Python's random numbers begin anew", "engine/random_state.py",
          'random.setstate(state["python"])', "pass", (CHECKPOINTS,)),
    Fault("the data begin anew", "engine/run_state.py",
          'run.training_dataloader.load_state_dict(saved["data"])', "pass", (CHECKPOINTS,)),
    Fault("skipped steps are forgotten", "engine/engine.py",
          "            setattr(self._counters, name, value)\n",
          '            setattr(self._counters, name, value if name != "skipped_steps" else 0)\n', (CHECKPOINTS,)),
    Fault("a rank's own buffers are lost", "engine/checkpoint/load.py",
          "                    buffers[name].copy_(value)\n", "                    pass\n", (CHECKPOINTS,)),
    # -- config
    Fault("unknown keys pass", "engine/config/section.py",
          'extra="forbid"', 'extra="ignore"', (CONFIGS,)),
    Fault("the ranks are left out of the batch", "engine/config/root.py",
          "unit = (micro or steps or 1) * world.size", "unit = micro or steps or 1", (CONFIGS,)),
    Fault("what is not built is not refused", "engine/config/schema.py",
          'return key.get("status") == REFUSED or "allowed" in key', 'return "allowed" in key', (CONFIGS,)),
    Fault("Adam is not AdamW", "engine/optimizers/__init__.py",
          'rest.pop("adam_w_mode", True)', 'rest.pop("adam_w_mode", False)', (ONE,)),
    # -- schedules
    Fault("a warm-up is linear", "schedulers/warmup.py",
          "return self._per_log * math.log(k)", "return (k - 1) / self.warmup_num_steps",
          ("tests/schedulers/test_deepspeed_parity.py",)),
    Fault("a decay ends one step early", "schedulers/warmup.py",
          "left = self.total_num_steps - (k - 1)", "left = self.total_num_steps - k",
          ("tests/schedulers/test_deepspeed_parity.py",)),
    Fault("stairs are a slope", "schedulers/lr_range_test.py",
          "if self.staircase else", "if False else", ("tests/schedulers/test_deepspeed_parity.py",)),
    Fault("momentum rises with the learning rate", "schedulers/one_cycle.py",
          'group["betas"] = (high - mom_range * height, beta2)',
          'group["betas"] = (high - mom_range * (1 - height), beta2)', (ONE,)),
    # -- range tests
    Fault("nothing diverges", "engine/range_test/curve.py",
          "DIVERGENCE_NOISE = 8.0", "DIVERGENCE_NOISE = 8e9", ("tests/engine/range_test/test_curve.py",)),
    Fault("a range test leaves its random numbers behind", "engine/run_state.py",
          "        set_random_state(self._random)\n", "",
          ("tests/engine/range_test/test_no_trace.py::test_every_optimizers_state_is_restored",)),
    Fault("a range test leaves its buffers behind", "engine/run_state.py",
          "        module._buffers.update({name: _restored(*item) for name, item in buffer_content.items()})\n", "",
          ("tests/engine/test_run_state.py",)),
    Fault("the maximum is where descent begins", "engine/range_test/suggest.py",
          "ALONE = 0.8", "ALONE = 0.2", ("tests/engine/range_test/test_suggest.py",)),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only look whether every patch applies")
    parser.add_argument("--only", default="", help="words of names, with commas")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    options = parser.parse_args()
    words = [word for word in options.only.split(",") if word]
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    lost = [f"{fault.name}: {why}" for fault in chosen if (why := fault.why_not(ROOT)) is not None]
    if lost:
        sys.exit("\n".join(["these patches no longer apply; update their text to the lines as they are now:", *lost]))
    print(f"{len(chosen)} of {len(FAULTS)} faults, all patches apply", flush=True)
    if not options.list:
        sys.exit(plant_all(chosen, options.jobs))


def plant_all(faults: list[Fault], jobs: int) -> int:
    """Plant each fault in a copy of its own and print the table.

    Returns:
        1 where a fault was not caught, or the tests fail without one; else 0.
    """
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        clean = pool.submit(run, Path(name) / "clean", None, sorted({test for fault in faults for test in fault.tests}))
        outcomes = pool.map(lambda pair: run(Path(name) / str(pair[0]), pair[1], pair[1].tests), enumerate(faults))
        width = max(len(fault.name) for fault in faults)
        missed = 0
        for fault, outcome in zip(faults, outcomes):
            print(f"{fault.name:<{width}}  {outcome}", flush=True)
            missed += outcome.startswith(NOTHING)
    print(f"{len(faults) - missed} of {len(faults)} faults are caught")
    if not clean.result().startswith(PASSED):
        print(f"but the tests fail without a fault, too: {clean.result()}")
        return 1
    return int(missed > 0)


def run(folder: Path, fault: Fault | None, tests: list[str] | tuple[str, ...]) -> str:
    """Run tests in a copy of the tree, with a fault or without.

    Returns:
        The test that failed first, or what begins with a word of `NOTHING`.
    """
    copy_tree(folder / "tree")
    if fault is not None:
        path = folder / "tree" / fault.path
        path.write_text(path.read_text().replace(fault.old, fault.new))
    environment = environment_of(folder / "tree", folder / "packages", folder / "tree")
    arguments = ["-n", "0", "-x", "-q", "--tb=no", "-m", "not long", "-p", "no:cacheprovider", *tests]
    command = [sys.executable, "-m", "pytest", *arguments]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=folder / "tree", env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"it hangs for {LIMIT} s"
    finally:
        shutil.rmtree(folder)
    if done.returncode == 0:
        return PASSED
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        return f"NO ANSWER, pytest exits with {done.returncode}: {(done.stdout + done.stderr)[-300:]}"
    return f"{failed[1]}  ({time.monotonic() - begin:.0f} s)"


def copy_tree(folder: Path) -> None:
    """A copy of the tree's tracked and new files."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


if __name__ == "__main__":
    main()
