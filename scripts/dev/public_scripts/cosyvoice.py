"""A tiny language model over random tokens in place of the yaml file's, with a loss for DPO."""

import stand_in
import torch
from torch import nn


class _Llm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 50)

    def _logps(self, tokens):
        logits = self.head(self.layers(self.embedding(tokens[:, :-1])))
        return logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)

    def forward(self, batch, device):
        loss = -self._logps(batch["tokens"].to(device)).mean()
        return {"loss": loss, "acc": loss.detach().exp()}

    def forward_dpo(self, batch, device):
        chosen, rejected = (self._logps(batch[name].to(device)) for name in ("tokens", "rejected"))
        return {"loss": -chosen.mean(), "acc": chosen.detach().mean(), "chosen_logps": chosen.mean(),
                "rejected_logps": rejected.mean()}  # fmt: skip


class _Data(torch.utils.data.IterableDataset):
    def __init__(self, *_, mode, **__):
        self.steps = {"train": 30, "dev": 2}[mode]

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        made = torch.Generator().manual_seed(torch.distributed.get_rank())
        for _ in range(self.steps):
            tokens = torch.randint(50, (2, 4, 12), generator=made)
            yield {"tokens": tokens[0], "rejected": tokens[1], "utts": list("abcd")}


def _configs(file, overrides):
    train = {"optim": "adam", "optim_conf": {"lr": 1e-3}, "scheduler": "warmuplr",
             "scheduler_conf": {"warmup_steps": 5}, "max_epoch": 2, "grad_clip": 5, "accum_grad": 2,
             "log_interval": 100, "save_per_step": 10}  # fmt: skip
    torch.manual_seed(0)
    return {"llm": _Llm(), "data_pipeline": None, "train_conf": train}


stand_in.module("hyperpyyaml", load_hyperpyyaml=_configs)
stand_in.module("cosyvoice.dataset.dataset", Dataset=_Data)
torch.manual_seed(0)
torch.save(_Llm().state_dict(), "ref.pt")
stand_in.run("cosyvoice/bin/train.py")
