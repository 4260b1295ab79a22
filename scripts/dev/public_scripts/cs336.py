"""Random tokens, and the parts of hydra and omegaconf that the script uses."""

import importlib.metadata
import sys
from pathlib import Path

import numpy
import stand_in
import yaml


class _Config(dict):
    __getattr__ = dict.get


def _main(**_):
    config = {
        "model": {"vocab_size": 100, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64,
                  "rope_theta": 10000.0},
        "training": _Config(batch_size=8, z=0.0, scheduler="cosine", lr=1e-3, min_lr=1e-5, total_iters=30,
                            warmup_iters=5, max_seq_len=16, save_ckpt=True, save_interval=10, target_loss=0.1),
        "deepspeed": yaml.safe_load(Path("cs336_basics/configs/deepspeed/stage2.yaml").read_text()),
        "paths": _Config(ckpt_dir=next(word for word in sys.argv if word.startswith("out")), train_dataset_dir="data"),
        "run_name": "run",
    }  # fmt: skip
    return lambda main: lambda: main(_Config(config))


class _OmegaConf:
    to_container = staticmethod(lambda config, resolve: dict(config))


stand_in.module("wandb")
stand_in.module("hydra", main=_main)
stand_in.module("omegaconf", DictConfig=_Config, OmegaConf=_OmegaConf)
stand_in.module("einx")
stand_in.module("jaxtyping", Bool=dict, Float=dict, Int=dict)
importlib.metadata.version = lambda name: "0"
Path("data").mkdir(exist_ok=True)
numpy.save("data/tokens.npy", numpy.random.default_rng(0).integers(0, 100, 5000))
stand_in.run("cs336_basics/solutions/_train_model.py")
