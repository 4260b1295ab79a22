#!/usr/bin/env python3
"""Run public training scripts here and in DeepSpeed, and compare their losses.

    git clone https://github.com/wenet-e2e/wenet sources/wenet-e2e/wenet    # and others that RUNS names
    scripts/dev/deepspeed_scripts.py sources --deepspeed-python ~/ds/bin/python [NAME ...]

The scripts run unchanged in a copy, by `redline compare-run`. Their data is random: stand-ins take the place of
datasets, of packages that are not needed and of large models; those in public_scripts/ start the script themselves.
Without a GPU they also map CUDA's names to the CPU; calls of torch.cuda are taken out of DeepSpeedExamples' own. What
the scripts import beyond that (timm, einops, peft, accelerate, tensorboardX, click; transformers 4.46 where noted) must
be found by both Pythons, by PYTHONPATH for example. docs/deepspeed.md has the results in short.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

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


class Run(NamedTuple):
    """A script: `words` are its path in `folder`, and arguments; a stand-in starts it where there is one."""

    repository: str
    folder: str
    words: tuple[str, ...]
    ranks: int = 1
    stand_in: str = ""
    flags: tuple[str, ...] = ()  # of compare-run


COMMITS = {  # with which docs/deepspeed.md's results came out
    "deepspeedai/DeepSpeedExamples": "45b4b7156c",
    "wenet-e2e/wenet": "015469960d",
    "FunAudioLLM/CosyVoice": "ace7c47f41",
    "liucongg/ChatGLM-Finetuning": "a137ad63ee",
    "baichuan-inc/Baichuan-7B": "6f3ef4633a",
    "MCG-NJU/VideoMAE": "14ef8d8562",
    "microsoft/LMOps": "4f2a9deb5f",
    "OpenLLMAI/OpenRLHF": "0ec540821e",
    "cloneofsimo/min-max-in-dit": "74b6319ed8",
    "bigohofone/assignment1-basics-solution": "83782a364c",
}
_EXAMPLES = "deepspeedai/DeepSpeedExamples"
_CIFAR = ("cifar10_deepspeed.py", "--deepspeed", "--epochs", "1")
_GAN = ("gan_deepspeed_train.py", "--dataset", "cifar10", "--workers", "0", "--batchSize", "32",
        "--outf", "out.{run}", "--tensorboard_path", "runs.{run}",
        "--deepspeed_config", "gan_deepspeed_config.json")  # fmt: skip
_BF16 = ("train.py", "--hidden_dim", "64", "--num_layers", "2", "--num_heads", "2",
         "--vocab_size", "500", "--seq_length", "32", "--deepspeed_config")  # fmt: skip
# The speech scripts take no --local_rank.
_SPEECH = ("--train_engine", "deepspeed", "--train_data", "-", "--cv_data", "-", "--model_dir", "out.{run}",
           "--tensorboard_dir", "runs.{run}", "--ddp.dist_backend", "gloo", "--num_workers", "1", "--prefetch", "2",
           "--deepspeed")  # fmt: skip
_WENET = (*_SPEECH, "--config", "train.yaml", "--data_type", "raw", "--deepspeed_config")
_COSYVOICE = (*_SPEECH, "--model", "llm", "--onnx_path", "-", "--config", "README.md",
              "--deepspeed_config", "examples/libritts/cosyvoice/conf/ds_stage2.json")  # fmt: skip
_CHATGLM = ("--model_name_or_path", "-", "--train_path", "data/spo_0.json", "--max_len", "48",
            "--per_device_train_batch_size", "2", "--num_train_epochs", "3", "--output_dir", "out.{run}")  # fmt: skip
_CHAT = ("--data_path", "local/jsonfile", "--data_output_path", "index.{run}/", "--output_dir", "out.{run}",
         "--dtype", "bf16", "--deepspeed", "--num_warmup_steps", "5")  # fmt: skip
_CHAT_TRAIN = (*_CHAT, "--model_name_or_path", "tiny", "--per_device_train_batch_size", "4", "--max_seq_len", "32",
               "--learning_rate", "1e-3", "--zero_stage", "2", "--data_split")  # fmt: skip
_CHAT_RLHF = (*_CHAT, "--actor_model_name_or_path", "tiny", "--critic_model_name_or_path", "tiny",
              "--per_device_generation_batch_size", "4", "--per_device_training_batch_size", "4",
              "--max_answer_seq_len", "12", "--max_prompt_seq_len", "16", "--actor_learning_rate", "1e-3",
              "--critic_learning_rate", "1e-3", "--actor_zero_stage", "2", "--critic_zero_stage", "2", "--enable_ema",
              "--seed", "1", "--data_split", "1,1,8")  # fmt: skip
_OPENRLHF = ("--pretrain", "tiny", "--bf16", "--dataset", "-", "--micro_train_batch_size", "2", "--train_batch_size",
             "8", "--max_len", "64", "--learning_rate", "1e-3", "--save_path", "out.{run}", "--ckpt_path",
             "checkpoints.{run}", "--save_steps", "8")  # fmt: skip
_MINILLM = ("--deepspeed", "--deepspeed_config", "configs/deepspeed/ds_config_zero2_bf16.json", "--do-train",
            "--model-path", "tiny", "--teacher-model-path", "tiny", "--model-type", "opt", "--kd-ratio", "0.5",
            "--batch-size", "4", "--eval-batch-size", "4", "--gradient-accumulation-steps", "2", "--epochs", "3",
            "--lr", "0.001", "--warmup-iters", "2", "--lr-decay-style", "cosine", "--save", "out.{run}",
            "--save-interval", "5", "--eval-interval", "5", "--max-length", "24", "--num-workers", "0")  # fmt: skip
_VIDEOMAE = ("--model", "vit_stand_in", "--batch_size", "4", "--update_freq", "2", "--epochs", "2", "--warmup_epochs",
             "1", "--input_size", "32", "--num_frames", "4", "--num_workers", "0", "--no_pin_mem",
             "--enable_deepspeed", "--output_dir", "out.{run}", "--dist_eval", "--layer_decay", "0.75", "--mixup", "0",
             "--cutmix", "0", "--num_sample", "1", "--lr", "0.05")  # fmt: skip


def _examples(folder: str, *words: str, ranks: int = 1) -> Run:
    return Run(_EXAMPLES, f"training/{folder}", words, ranks)


def _chat(script: str, *words: str) -> Run:
    return Run(
        _EXAMPLES, "applications/DeepSpeed-Chat", (f"training/{script}/main.py", *words), 1, "deepspeed_chat", _LOW
    )


_NO_RANK = ("--no_local_rank",)
_LOW = ("--tolerance", "0.01")  # of losses in bf16 and fp16
# With "transformers 4" in its name a run takes transformers 4.46.
RUNS: dict[str, Run] = {
    **{
        f"cifar, {dtype}, stage {stage}, {ranks} rank{'s' * (ranks > 1)}": _examples(
            "cifar", *_CIFAR, "--dtype", dtype, "--stage", str(stage), ranks=ranks
        )
        for dtype, stage, ranks in (("fp32", 0, 1), ("fp32", 3, 2), ("bf16", 0, 1), ("bf16", 3, 1), ("bf16", 2, 2),
                                    ("fp16", 2, 2))
    },
    "gan, 1 rank": _examples("gan", *_GAN),
    "gan, 2 ranks": _examples("gan", *_GAN, ranks=2),
    "bf16_master_weight, baseline": _examples("bf16_master_weight", *_BF16, "configs/baseline.json"),
    "bf16_master_weight, bf16_full": _examples("bf16_master_weight", *_BF16, "configs/bf16_full.json"),
    "DeepSpeed-Chat SFT, transformers 4": _chat("step1_supervised_finetuning", *_CHAT_TRAIN, "8,1,1",
                                                "--gradient_accumulation_steps", "2"),
    "DeepSpeed-Chat reward, transformers 4": _chat("step2_reward_model_finetuning", *_CHAT_TRAIN, "1,8,1"),
    "DeepSpeed-Chat DPO, transformers 4": _chat("step2_dpo_finetuning", *_CHAT_TRAIN, "1,8,1"),
    "DeepSpeed-Chat RLHF, transformers 4": _chat("step3_rlhf_finetuning", *_CHAT_RLHF),
    "wenet, stage 1": Run("wenet-e2e/wenet", "", (*_WENET, "fp32_stage1.json"), 1, "wenet", _NO_RANK),
    "wenet, stage 2, 2 ranks": Run("wenet-e2e/wenet", "", (*_WENET, "fp32_stage2.json"), 2, "wenet", _NO_RANK),
    "CosyVoice": Run("FunAudioLLM/CosyVoice", "", _COSYVOICE, 1, "cosyvoice", _NO_RANK),
    "CosyVoice DPO": Run("FunAudioLLM/CosyVoice", "", (*_COSYVOICE, "--dpo", "--ref_model", "ref.pt"), 1, "cosyvoice",
                         _NO_RANK),
    "ChatGLM-Finetuning LoRA, fp16": Run(
        "liucongg/ChatGLM-Finetuning", "", (*_CHATGLM, "--lora_module_name", "c_attn", "--ds_file",
                                            "ds_zero2_no_offload.json"), 1, "chatglm_finetuning"),
    "ChatGLM-Finetuning, stage 3, fp16, 2 ranks": Run(
        "liucongg/ChatGLM-Finetuning", "", (*_CHATGLM, "--train_type", "all", "--ds_file",
                                            "ds_zero3_no_offload.json"), 2, "chatglm_finetuning"),
    "Baichuan-7B": Run(
        "baichuan-inc/Baichuan-7B", "", ("--data_dir", "data", "--max_length", "32", "--checkpoint_saving_path",
                                         "out.{run}", "--steps_per_epoch", "8", "--deepspeed_config",
                                         "ds.json"), 1, "baichuan", _LOW),
    "VideoMAE": Run("MCG-NJU/VideoMAE", "", _VIDEOMAE, 1, "videomae", _LOW),
    "MiniLLM, transformers 4": Run("microsoft/LMOps", "minillm", _MINILLM, 1, "minillm", _LOW),
    "OpenRLHF SFT, transformers 4": Run(
        "OpenLLMAI/OpenRLHF", "", ("openrlhf/cli/train_sft.py", *_OPENRLHF, "--input_key", "prompt", "--output_key",
                                   "chosen", "--zero_stage", "3"), 1, "openrlhf", _LOW),
    "OpenRLHF DPO, transformers 4": Run(
        "OpenLLMAI/OpenRLHF", "", ("openrlhf/cli/train_dpo.py", *_OPENRLHF, "--ref_pretrain", "tiny", "--prompt_key",
                                   "prompt", "--zero_stage", "2"), 1, "openrlhf", _LOW),
    "min-max-in-dit": Run(
        "cloneofsimo/min-max-in-dit", "", ("--train_batch_size", "2", "--per_device_train_batch_size", "2"), 1,
        "min_max_in_dit", _LOW),
    "cs336 assignment 1": Run("bigohofone/assignment1-basics-solution", "", ("out.{run}",), 1, "cs336"),
}  # fmt: skip
_WITHOUT_CUDA = {"torch.cuda.set_device(args.local_rank)": "pass", "torch.cuda.synchronize()": "pass",
                 'torch.device("cuda", args.local_rank)': 'torch.device("cpu")'}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="a folder with the checkouts, each as owner/name")
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of names of runs (default: all)")
    parser.add_argument("--deepspeed-python", default=sys.executable, metavar="PATH", help="a Python with DeepSpeed")
    parser.add_argument("--steps", default="20", metavar="N", help="optimizer steps (default: 20)")
    options = parser.parse_intermixed_args()
    failed = 0
    for name, run in RUNS.items():
        if options.names and not name.startswith(tuple(options.names)):
            continue
        source = options.sources / run.repository / run.folder
        if not source.is_dir():
            commit = COMMITS[run.repository]
            print(f"{name}: there is no {source}; clone https://github.com/{run.repository} (compared at {commit})")
            continue
        with tempfile.TemporaryDirectory() as folder:
            done = _compare(options, run, Path(shutil.copytree(source, f"{folder}/run")))
        last = (done.stderr + done.stdout).strip().splitlines()[-1:] or ["nothing was printed"]
        print(f"{name}: {last[0] if done.returncode != 1 else done.stderr + done.stdout}", flush=True)
        failed += done.returncode != 0
    return min(failed, 1)


def _compare(options: argparse.Namespace, run: Run, folder: Path) -> subprocess.CompletedProcess[str]:
    words = list(run.words)
    paths = list(filter(None, [os.environ.get("PYTHONPATH")]))
    if run.stand_in:
        words.insert(0, str(Path(__file__).parent / "public_scripts" / f"{run.stand_in}.py"))
    else:
        paths.insert(0, str(folder))
        (folder / "torchvision.py").write_text(_TORCHVISION)
        script = folder / words[0]
        text = script.read_text()
        for call, instead in _WITHOUT_CUDA.items() if not torch.cuda.is_available() else ():
            text = text.replace(call, instead)
        script.write_text(text)
    command = [sys.executable, "-m", "redline", "compare-run", "--deepspeed-python", options.deepspeed_python,
               "--steps", options.steps, "--num_gpus", str(run.ranks), "--seed", "1", *run.flags, *words]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
