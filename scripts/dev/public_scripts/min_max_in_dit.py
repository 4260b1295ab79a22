"""Random latents in place of a streaming dataset, and a smaller model."""

import os

import stand_in
import torch


class _Latents(torch.utils.data.Dataset):
    def __init__(self, **_):
        self.latents = torch.randn(256, 4 * 32 * 32, generator=torch.Generator().manual_seed(int(os.environ["RANK"])))

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, index):
        return {"vae_output": self.latents[index], "label": str(index % 1000)}


stand_in.module("wandb")
stand_in.module("streaming", StreamingDataset=_Latents)
stand_in.module("streaming.base.util")
stand_in.module("streaming.base.format.mds.encodings", Encoding=object, _encodings={})
import ddpm  # noqa: E402
import dit_model  # noqa: E402


class _Model(dit_model.DiT_Llama):
    def __init__(self, channels, **_):
        super().__init__(channels, dim=64, n_layers=2, n_heads=4, num_classes=1000)


def _initialize(self, *args):
    initialize(self, *args)
    for name, buffer in list(self.named_buffers(recurse=False)):
        setattr(self, name, buffer.bfloat16())  # as DeepSpeed did when the script was written


initialize = ddpm.DDPM.__init__
ddpm.DDPM.__init__, dit_model.DiT_Llama = _initialize, _Model
stand_in.run("main.py")
