"""A tiny OPT and random sentences in place of models and datasets. The arguments name the script."""

import stand_in
from transformers.integrations import HfDeepSpeedConfig


class _Dataset(list):
    """What the scripts use of a dataset of the package datasets."""

    column_names = ("prompt", "chosen", "rejected")

    def map(self, function, **_):
        return _Dataset({**sample, **function(sample)} for sample in self)

    def filter(self, function):
        return _Dataset(filter(function, self))

    def select(self, indices):
        return _Dataset(self[index] for index in indices)

    def __getitem__(self, key):
        return [sample[key] for sample in self] if isinstance(key, str) else super().__getitem__(key)


def _load_dataset(*_, **__):
    samples = stand_in.preferences(240)
    return {"train": _Dataset(samples[:200]), "test": _Dataset(samples[200:])}


stand_in.module("transformers.deepspeed", HfDeepSpeedConfig=HfDeepSpeedConfig)  # its place in older versions
stand_in.module(
    "datasets", load_dataset=_load_dataset, Dataset=_Dataset, interleave_datasets=lambda parts, **_: parts[0]
)
for name in ("bitsandbytes", "flash_attn", "flash_attn.bert_padding", "flash_attn.utils.distributed", "ray", "loralib"):
    stand_in.module(name)
stand_in.save_model("tiny")
stand_in.run()
