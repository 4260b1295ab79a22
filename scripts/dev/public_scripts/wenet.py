"""A small conformer of the repository on random features."""

import json
from pathlib import Path
from typing import Optional, Union

import stand_in
import torch
import yaml

_DIM, _WORDS = 16, 30


class _Data(torch.utils.data.IterableDataset):
    def __init__(self, *_, split, **__):
        self.steps = {"train": 30, "cv": 2}[split]

    def __iter__(self):
        made = torch.Generator().manual_seed(torch.distributed.get_rank())
        for _ in range(self.steps):
            yield {"feats": torch.randn(4, 60, _DIM, generator=made), "feats_lengths": torch.tensor([60, 60, 52, 48]),
                   "target": torch.randint(2, _WORDS - 1, (4, 6), generator=made),
                   "target_lengths": torch.tensor([6, 6, 5, 4]), "langs": ["en"] * 4, "tasks": ["asr"] * 4}  # fmt: skip


class _Tokenizer:
    def __init__(self, configs):
        self.symbol_table = {"<blank>": 0, "<unk>": 1, **{str(number): number for number in range(2, _WORDS)}}

    def vocab_size(self):
        return _WORDS


vars(torch.nn.modules.conv).update(Union=Union, Optional=Optional)  # names that older versions have there
for name in (
    "torchaudio",
    "torchaudio.compliance.kaldi",
    "torchaudio.functional",
    "librosa",
    "whisper",
    "whisper.tokenizer",
    "k2",
    "langid",
    "langid.langid",
):
    stand_in.module(name)
stand_in.module("wenet.utils.init_dataset", init_dataset=lambda *args, **kwargs: _Data(*args, **kwargs))
stand_in.module("wenet.utils.init_tokenizer", init_tokenizer=lambda configs: _Tokenizer(configs))
size = {"output_size": 32, "attention_heads": 4, "linear_units": 64, "num_blocks": 2, "dropout_rate": 0.0,
        "positional_dropout_rate": 0.0}  # fmt: skip
config = {
    "encoder": "conformer", "encoder_conf": {**size, "cnn_module_kernel": 7, "attention_dropout_rate": 0.0},
    "decoder": "transformer",
    "decoder_conf": {**{key: value for key, value in size.items() if key != "output_size"},
                     "self_attention_dropout_rate": 0.0, "src_attention_dropout_rate": 0.0},
    "tokenizer": "char", "ctc": "ctc", "ctc_conf": {"ctc_blank_id": 0}, "cmvn": None, "cmvn_conf": {},
    "model": "asr_model", "model_conf": {"ctc_weight": 0.3, "lsm_weight": 0.1, "length_normalized_loss": False},
    "dataset": "asr", "dataset_conf": {}, "input_dim": _DIM, "grad_clip": 5, "accum_grad": 1, "max_epoch": 2,
    "log_interval": 100, "optim": "adam", "optim_conf": {"lr": 0.002}, "scheduler": "warmuplr",
    "scheduler_conf": {"warmup_steps": 5},
}  # fmt: skip
Path("train.yaml").write_text(yaml.dump(config))
for stage in (1, 2, 3):
    source = json.loads(Path(f"examples/aishell/whisper/conf/ds_stage{stage}.json").read_text())
    Path(f"fp32_stage{stage}.json").write_text(json.dumps({**source, "bf16": {"enabled": False}}))
for run in ("redline", "deepspeed"):
    Path(f"out.{run}").mkdir(exist_ok=True)
stand_in.run("wenet/bin/train.py")
