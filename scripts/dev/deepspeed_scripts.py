#!/usr/bin/env python3
"""Run training scripts of DeepSpeedExamples here and in DeepSpeed, and compare their losses.

    git clone https://github.com/deepspeedai/DeepSpeedExamples
    scripts/dev/deepspeed_scripts.py DeepSpeedExamples --deepspeed-python ~/ds/bin/python [NAME ...]

The scripts run unchanged in a copy, by `redline compare-run`. Their data is random: a small stand-in takes the place of
torchvision. Without a GPU, calls of torch.cuda are taken out. docs/deepspeed.md has the results in short.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_TORCHVISION = '''
import sys
import types

import torch


class _Images(torch.utils.data.Dataset):
    """Random images of ten classes, the same each time."""

    def __init__(self, root=None, train=True, transform=None, download=False, image_size=(3, 32, 32), **_):
        made = torch.Generator().manual_seed(int(train))
        self.images = torch.rand(512, *image_size, generator=made)
        self.labels = torch.randint(10, (512,), generator=made).tolist()
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def _transform(*sizes):
    return lambda image: image


def _compose(steps):
    def run(image):
        for step in steps:
            image = step(image)
        return image

    return run


def _resize(size):
    return lambda image: torch.nn.functional.interpolate(image[None], size=(size, size))[0]


for _name, _values in {
    "datasets": {"CIFAR10": _Images, "FakeData": _Images, "MNIST": _Images},
    "transforms": {"Compose": _compose, "Resize": _resize, "ToTensor": _transform, "Normalize": _transform},
    "utils": {"make_grid": lambda images, **_: images, "save_image": lambda *_, **__: None},
}.items():
    _module = types.ModuleType(f"torchvision.{_name}")
    vars(_module).update(_values)
    globals()[_name] = sys.modules[f"torchvision.{_name}"] = _module
__path__ = []
'''

_CIFAR = ("training/cifar", "cifar10_deepspeed.py", "--deepspeed", "--epochs", "1")
_GAN = ("training/gan", "gan_deepspeed_train.py", "--dataset", "cifar10", "--workers", "0", "--batchSize", "32",
        "--outf", "out.{run}", "--tensorboard_path", "runs.{run}",
        "--deepspeed_config", "gan_deepspeed_config.json")  # fmt: skip
_BF16 = ("training/bf16_master_weight", "train.py", "--hidden_dim", "64", "--num_layers", "2", "--num_heads", "2",
         "--vocab_size", "500", "--seq_length", "32", "--deepspeed_config")  # fmt: skip
# Of each run: ranks, directory, script, arguments.
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    **{
        f"cifar, {dtype}, stage {stage}, {ranks} rank{'s' * (ranks > 1)}": (
            ranks, (*_CIFAR, "--dtype", dtype, "--stage", str(stage))
        )
        for dtype, stage, ranks in (("fp32", 0, 1), ("fp32", 3, 2), ("bf16", 0, 1), ("bf16", 3, 1), ("bf16", 2, 2),
                                    ("fp16", 2, 2))
    },
    "gan, 1 rank": (1, _GAN),
    "gan, 2 ranks": (2, _GAN),
    "bf16_master_weight, baseline": (1, (*_BF16, "configs/baseline.json")),
    "bf16_master_weight, bf16_full": (1, (*_BF16, "configs/bf16_full.json")),
}  # fmt: skip
_WITHOUT_CUDA = {"torch.cuda.set_device(args.local_rank)": "pass", "torch.cuda.synchronize()": "pass",
                 'torch.device("cuda", args.local_rank)': 'torch.device("cpu")'}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkout of DeepSpeedExamples")
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of names of runs (default: all)")
    parser.add_argument("--deepspeed-python", default=sys.executable, metavar="PATH", help="a Python with DeepSpeed")
    parser.add_argument("--steps", default="20", metavar="N", help="optimizer steps (default: 20)")
    options = parser.parse_intermixed_args()
    failed = 0
    for name, (ranks, (directory, *words)) in RUNS.items():
        if options.names and not name.startswith(tuple(options.names)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            done = _compare(options, ranks, Path(shutil.copytree(options.source / directory, f"{folder}/run")), words)
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["nothing was printed"]
        print(f"{name}: {last[0] if done.returncode != 1 else done.stdout + done.stderr}", flush=True)
        failed += done.returncode != 0
    return min(failed, 1)


def _compare(
    options: argparse.Namespace, ranks: int, folder: Path, words: list[str]
) -> subprocess.CompletedProcess[str]:
    (folder / "torchvision.py").write_text(_TORCHVISION)
    script = folder / words[0]
    text = script.read_text()
    for call, instead in _WITHOUT_CUDA.items() if not torch.cuda.is_available() else ():
        text = text.replace(call, instead)
    script.write_text(text)
    command = [sys.executable, "-m", "redline", "compare-run", "--deepspeed-python", options.deepspeed_python,
               "--steps", options.steps, "--num_gpus", str(ranks), "--seed", "1", *words]  # fmt: skip
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
