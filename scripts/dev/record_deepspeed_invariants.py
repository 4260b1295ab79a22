"""Records what real DeepSpeed comes to in scripts of the kinds that an engine easily gets wrong.

Writes ``tests/golden/invariants.json`` from the scripts in ``tests/golden/invariants.py``. Needs an environment with
deepspeed==0.19.8 and torch; no other part of this repository. Each script runs on DeepSpeed and on a loop by hand. A
case has

    program, precision,    where it ran; bf16 and fp16 of stage 0 are recorded at DeepSpeed's stage 1: it makes a step
      stage, processes     while it builds stage 0, and forgets to scale fp16's loss
    deepspeed              "same": DeepSpeed and the loop agree; "differs": it trains otherwise; "refused": it raises,
                           or its ranks hang
    why                    in what it differs, or the error
    loss, norm, weights    of every backward (mean over the ranks), of every optimizer step (null where there is none),
                           and a number of each weight's values at the end: DeepSpeed's where it agrees with the loop,
                           else the loop's
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.distributed import RanksFailed, run_ranks  # noqa: E402
from tests.golden import invariants  # noqa: E402
from tests.golden.invariants import Case, HandDriver, differences  # noqa: E402

DEEPSPEED_VERSION = "0.19.8"
_HANG_SECONDS = 10  # until a rank that waits for the others in vain gives up


class DeepSpeedDriver:
    """DeepSpeed, as a script would use it."""

    def initialize(self, model: torch.nn.Module, case: Case) -> Any:
        import deepspeed

        config = invariants.config_of(case)
        if case["stage"] == 0 and invariants.compute_dtype(case) is not torch.float32:
            config["zero_optimization"] = {"stage": 1}
        config = json.loads(json.dumps(config))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        return engine

    def write(self, engine: Any, write: Callable[[Any], None]) -> None:
        import deepspeed

        if engine.zero_optimization_partition_weights():
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    write(engine.module)
        else:
            write(engine.module)

    def read(self, engine: Any) -> dict[str, torch.Tensor]:
        import deepspeed

        named = dict(engine.module.named_parameters())
        if not engine.zero_optimization_partition_weights():
            return {name: param.detach().clone() for name, param in named.items()}
        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: param.detach().clone() for name, param in named.items()}


def record_all(cases: list[Case], path: str) -> None:
    """Runs in every rank; rank 0 writes a line per case, so that a case that ends the processes is known."""
    import deepspeed

    _quiet()
    # DeepSpeed refuses fp16 on a CPU without instructions for it, though torch computes it on every CPU.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=_HANG_SECONDS))
    with open(path, "a", encoding="utf-8") as file:
        for case in cases:
            record = _record(case)
            if torch.distributed.get_rank() == 0:
                file.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
                file.flush()


def _record(case: Case) -> Case:
    by_hand = invariants.run(case, HandDriver())
    error, deepspeeds = None, None
    try:
        deepspeeds = invariants.run(case, DeepSpeedDriver())
    except Exception as caught:
        error = f"{type(caught).__name__}: {str(caught).strip().splitlines()[0][:160] if str(caught) else ''}"
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, (error, deepspeeds))
    errors = [each for each, _ in outcomes if each is not None]
    if errors:
        return {**case, "deepspeed": "refused", "why": errors[0], **by_hand}
    found = [differences(case, each, by_hand) for _, each in outcomes]
    unequal = [] if all(each == outcomes[0] for each in outcomes) else ["the ranks hold different numbers"]
    if any(found) or unequal:
        why = unequal + max(found, key=len)
        return {**case, "deepspeed": "differs", "why": "; ".join(why[:3]), **by_hand}
    assert deepspeeds is not None
    return {**case, "deepspeed": "same", **deepspeeds}


def record(cases: list[Case]) -> list[Case]:
    """All cases of one number of processes; what ends the processes is recorded by hand alone, and they start anew."""
    done: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(done) < len(cases):
            path, left = Path(folder) / f"{len(done)}.jsonl", cases[len(done) :]
            fault = None
            try:
                run_ranks(record_all, cases[0]["processes"], left, str(path), timeout=3000.0, fresh=True)
            except RanksFailed as error:
                fault = str(error).strip().splitlines()[-1][:160]
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            done += map(json.loads, lines)
            if fault is not None and len(done) < len(cases):
                case = cases[len(done)]
                print(f"{case}: {fault}", flush=True)
                by_hand = run_ranks(_by_hand, case["processes"], case, timeout=100.0, fresh=True)[0]
                done.append({**case, "deepspeed": "refused", "why": "its ranks wait for each other in vain", **by_hand})
    return done


def _by_hand(case: Case) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    return invariants.run(case, HandDriver())


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", help="only this one, printed and not written")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "tests" / "golden" / "invariants.json", metavar="FILE",
        help="where to write (default: %(default)s)",
    )  # fmt: skip
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        parser.error(f"DeepSpeed cannot be imported ({error}); install deepspeed=={DEEPSPEED_VERSION} beside torch")
    if deepspeed.__version__ != DEEPSPEED_VERSION:
        parser.error(f"the tests expect the numbers of DeepSpeed {DEEPSPEED_VERSION}; this is {deepspeed.__version__}")
    recorded: list[Case] = []
    for processes in (1, 2, 3):
        for autocast in (False, True):  # DeepSpeed keeps it in a global that ZeRO reads
            chosen = [
                case for case in invariants.cases()
                if case["processes"] == processes and (case["precision"] == "autocast") == autocast
                and given.program in (None, case["program"])
            ]  # fmt: skip
            recorded += record(chosen) if chosen else []
            print(f"{processes} processes, autocast {autocast}: {len(chosen)} cases", flush=True)
    if given.program is not None:
        print(*(json.dumps(each) for each in recorded), sep="\n")
        return 0
    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__, "python": platform.python_version()}
    body = ",\n".join(json.dumps(case, separators=(",", ":")) for case in recorded)
    text = f'{{\n"versions": {json.dumps(versions)},\n"cases": [\n{body}\n]\n}}\n'
    given.output.write_text(text, encoding="utf-8")
    print(f"{given.output}: {len(recorded)} cases, {len(text) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
