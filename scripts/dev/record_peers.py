"""Records what Hugging Face Trainer, TRL, Accelerate and Lightning come to with real DeepSpeed.

Writes ``tests/golden/peers.json`` from the runs in ``tests/peers``. Needs an environment with deepspeed==0.19.8 and
the packages of the extra `peers` of pyproject.toml, in their versions; no other part of this repository. A case has

    run, precision,      what ran, and where
      stage, ranks
    error                why DeepSpeed refuses it, or
    loss, norm, ...      what it comes to
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.distributed import RanksFailed, run_ranks  # noqa: E402
from tests.peers import cases  # noqa: E402
from tests.peers.tiny import Case  # noqa: E402

DEEPSPEED_VERSION = "0.19.8"
PACKAGES = ("deepspeed", "torch", "transformers", "peft", "trl", "accelerate", "lightning")


def record_all(some: list[Case], folder: str) -> None:
    """Runs in every rank; rank 0 writes a line per case, so that a case that ends the ranks is known."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # It would be compiled for minutes, and is used for inference only. deepspeed.comm.torch is torch, hence the dict.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.initialize = partial(_initialize, deepspeed.initialize)
    deepspeed.init_distributed("gloo")
    with open(Path(folder) / "cases.jsonl", "a", encoding="utf-8") as file:
        for case in some:
            own = [tempfile.mkdtemp(dir=folder)]
            dist.broadcast_object_list(own)
            found = cases.run(case, Path(own[0]))
            if dist.get_rank() == 0:
                file.write(json.dumps({**case, **found}, allow_nan=False) + "\n")
                file.flush()


def _initialize(initialize: Any, args: Any = None, **given: Any) -> Any:
    """DeepSpeed's, without the index of a CUDA device that Lightning gives it."""
    return initialize(None if hasattr(args, "device_rank") else args, **given)


def record(some: list[Case]) -> list[Case]:
    """All cases of one number of ranks; after one that DeepSpeed refuses they start anew."""
    done: list[Case] = []
    while len(done) < len(some):
        fault = None
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_ranks(record_all, some[0]["ranks"], some[len(done) :], folder, timeout=3000.0, fresh=True)
            except RanksFailed as error:
                fault = str(error).strip().splitlines()
            path = Path(folder) / "cases.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        done += map(json.loads, lines)
        if fault is not None:
            print(f"{some[len(done)]}:", *fault[-12:], sep="\n", flush=True)
            reason = next((line for line in reversed(fault) if "Error" in line), fault[-1])
            done.append({**some[len(done)], "error": reason[:160]})
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="NAME", help="only the runs whose name has this in it; the others stay")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "tests" / "golden" / "peers.json", metavar="FILE",
        help="where to write (default: %(default)s)",
    )  # fmt: skip
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    if versions["deepspeed"] != DEEPSPEED_VERSION:
        parser.error(f"expected DeepSpeed {DEEPSPEED_VERSION}; this is {versions['deepspeed']}")
    kept = json.loads(given.output.read_text())["cases"] if given.run else []
    kept = [case for case in kept if given.run not in case["run"]]
    for ranks in (1, 2):
        chosen = [case for case in cases.cases() if case["ranks"] == ranks and (given.run or "") in case["run"]]
        kept += record(chosen) if chosen else []
        print(f"{ranks} ranks: {len(chosen)} cases", flush=True)
    body = ",\n".join(json.dumps(case, separators=(",", ":")) for case in kept)
    versions["python"] = platform.python_version()
    text = f'{{\n"versions": {json.dumps(versions)},\n"cases": [\n{body}\n]\n}}\n'
    given.output.write_text(text, encoding="utf-8")
    print(f"{given.output}: {len(kept)} cases, {len(text) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
