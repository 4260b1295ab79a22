"""A tiny OPT and random sentences in place of models and datasets. The arguments name the script."""

from pathlib import Path

import stand_in
import torch


def _load_dataset(*_, **__):
    samples = stand_in.preferences(400)
    return {"train": samples[:320], "eval": samples[320:]}


stand_in.module("datasets", load_dataset=_load_dataset, load_from_disk=_load_dataset)
Path("data").mkdir(exist_ok=True)
for name in ("train", "eval"):
    Path(f"data/{name}.json").touch()
if not Path("tiny/pytorch_model.bin").exists():
    decoder = stand_in.save_model("tiny").model.state_dict()
    reward = {f"rwtransformer.{name.removeprefix('model.')}": value for name, value in decoder.items()}
    torch.save({**reward, "v_head.weight": torch.randn(1, 32)}, "tiny/pytorch_model.bin")
stand_in.run()
