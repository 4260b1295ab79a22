"""A small ViT of the repository on random videos."""

import math
from functools import partial

import stand_in
import torch
from torch import nn


class _Videos(torch.utils.data.Dataset):
    def __init__(self, length):
        self.videos = torch.randn(length, 3, 4, 32, 32, generator=torch.Generator().manual_seed(length))

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        return self.videos[index], index % 10, str(index), {}


stand_in.module("torch._six", inf=math.inf)
stand_in.module("datasets", build_dataset=lambda is_train, test_mode, args: (_Videos(200 if is_train else 8), 10))
for name in ("novograd", "nvnovograd"):
    stand_in.module(f"timm.optim.{name}")

import modeling_finetune  # noqa: E402


@modeling_finetune.register_model
def vit_stand_in(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    model = modeling_finetune.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=48, depth=3, num_heads=4, mlp_ratio=2, qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **{key: value for key, value in kwargs.items() if key != "drop_block_rate"},
    )  # fmt: skip
    model.default_cfg = {}
    return model


stand_in.run("run_class_finetuning.py")
