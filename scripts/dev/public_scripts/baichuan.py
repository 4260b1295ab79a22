"""A tokenizer of bytes, random text, a tiny model and a learning rate that moves it.

zero.Init does nothing: in DeepSpeed 0.19.8 it takes the embedding from the model's own initialization, which fails.
"""

import contextlib
import json
import os
import random
from pathlib import Path

import deepspeed
import stand_in
import torch


class _Tokenizer:
    def Load(self, path):
        pass

    def EncodeAsIds(self, text):
        return list(text.encode())


def _attention(query, key, value, attn_bias):
    layout = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*layout, is_causal=True).transpose(1, 2)


stand_in.module("xformers.ops", memory_efficient_attention=_attention)
stand_in.module("sentencepiece", SentencePieceProcessor=_Tokenizer)
random.seed(0)
Path("data").mkdir(exist_ok=True)
for number in range(int(os.environ["WORLD_SIZE"])):
    text = "\n".join("".join(random.choices("abcdefghij", k=200)) for _ in range(100))
    Path(f"data/{number}.txt").write_text(text)

from models.configuration_baichuan import BaiChuanConfig  # noqa: E402

BaiChuanConfig.__init__.__defaults__ = tuple(
    {64000: 300, 4096: 64, 11008: 128, 32: 2}.get(value, value) if not isinstance(value, bool) else value
    for value in BaiChuanConfig.__init__.__defaults__
)
config = json.loads(Path("config/deepspeed.json").read_text())
config["optimizer"]["params"]["lr"] = 1e-3
Path("ds.json").write_text(json.dumps(config))
deepspeed.zero.Init = lambda **_: contextlib.nullcontext()
stand_in.run("train.py")
