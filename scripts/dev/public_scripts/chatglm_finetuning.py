"""A tiny GPT-2 and a tokenizer of characters in place of ChatGLM's; the data is the repository's."""

import stand_in
import torch
import transformers
from torch.utils.data import Dataset


class _Model(transformers.GPT2LMHeadModel):
    @classmethod
    def from_pretrained(cls, path):
        torch.manual_seed(0)
        size = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
        return cls(transformers.GPT2Config(vocab_size=500, bos_token_id=1, eos_token_id=1, **size))


class _Tokenizer:
    pad_token, eos_token, pad_token_id = "<pad>", "<eos>", 0

    @classmethod
    def from_pretrained(cls, path):
        return cls()

    def save_pretrained(self, path):
        pass


class _Data(Dataset):
    def __init__(self, path, tokenizer, length, *_):
        with open(path, encoding="utf-8") as file:
            lines = [line[40 : 40 + length] for line in file][:100]
        self.samples = [[ord(character) % 500 for character in line] for line in lines]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return {"input_ids": self.samples[index], "labels": self.samples[index]}


stand_in.module("model", MODE={"glm2": {"model": _Model, "tokenizer": _Tokenizer, "dataset": _Data}})
stand_in.run("train.py")
