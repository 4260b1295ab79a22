"""Training runs of Hugging Face's Trainer, of PEFT and of TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.peers.tiny import LENGTH, VOCABULARY, Case, gpt, mean, sentences

__all__ = [
    "client_optimizer",
    "dpo",
    "from_pretrained",
    "hand_over",
    "lora",
    "options",
    "resume",
    "save",
    "sft",
    "smaller_batch",
    "train",
]

STEPS = 4


def config(case: Case, **more: Any) -> dict[str, Any]:
    """A config as Hugging Face's documentation has it: what TrainingArguments know is "auto"."""
    params = {**dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"), "torch_adam": True}  # nothing to compile
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": params},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
        },
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": case["stage"],
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "steps_per_print": 1_000_000,
        **more,
    }


def arguments(case: Case, folder: Path, cls: Any = None, **more: Any) -> Any:
    from transformers import TrainingArguments

    settings = {
        "output_dir": str(folder), "deepspeed": config(case), "use_cpu": True, "bf16": case["precision"] == "bf16",
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 1, "weight_decay": 0.1, "max_grad_norm": 0.5,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    return (cls or TrainingArguments)(**{**settings, **more})


def collate(items: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch, padded on the right."""
    longest = max(len(each["input_ids"]) for each in items)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for each in items:
        tokens, padding = each["input_ids"], longest - len(each["input_ids"])
        batch["input_ids"].append(tokens + [0] * padding)
        batch["labels"].append(tokens + [-100] * padding)
        batch["attention_mask"].append([1] * len(tokens) + [0] * padding)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def trainer(args: Any, model: nn.Module | None = None, uneven: bool = False, **more: Any) -> Any:
    from transformers import Trainer

    data = {"train_dataset": sentences(64, uneven=uneven), "eval_dataset": sentences(10, seed=1)}
    return Trainer(model=model or gpt(), args=args, data_collator=collate, **{**data, **more})


def history(made: Any) -> dict[str, Any]:
    """Losses, norms and learning rates of the steps, and the losses of the evaluations."""
    logs = made.state.log_history
    found = {name: [float(each[key]) for each in logs if key in each] for name, key in
             (("loss", "loss"), ("norm", "grad_norm"), ("lr", "learning_rate"), ("eval", "eval_loss"))}  # fmt: skip
    return {name: values for name, values in found.items() if values}


def train(case: Case, folder: Path) -> dict[str, Any]:
    """The whole of it: train, evaluate, predict; optimizer and schedule are the config's."""
    made = trainer(arguments(case, folder))
    made.train()
    made.evaluate()
    predicted = made.predict(sentences(6, seed=2))
    assert predicted.predictions.shape == (6, LENGTH, VOCABULARY)
    return {**history(made), "predicted": float(predicted.metrics["test_loss"])}


def client_optimizer(case: Case, folder: Path) -> dict[str, Any]:
    """Optimizer and schedule are Trainer's own."""
    settings = config(case)
    del settings["optimizer"], settings["scheduler"]
    args = arguments(case, folder, deepspeed=settings, gradient_accumulation_steps=1, lr_scheduler_type="cosine")
    made = trainer(args)
    made.train()
    made.evaluate()
    return history(made)


def options(case: Case, folder: Path) -> dict[str, Any]:
    """What TrainingArguments have besides."""
    args = arguments(
        case, folder, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        label_smoothing_factor=0.1, train_sampling_strategy="group_by_length", torch_compile=False,
        dataloader_drop_last=True, logging_nan_inf_filter=False,
    )  # fmt: skip
    made = trainer(args, uneven=True)
    made.train()
    made.evaluate()
    return history(made)


def smaller_batch(case: Case, folder: Path) -> dict[str, Any]:
    """`auto_find_batch_size`: the first batch does not fit into memory, so a second engine trains the same model."""
    from transformers import TrainerCallback

    class Full(TrainerCallback):
        def on_step_begin(self, args: Any, *others: Any, **more: Any) -> None:
            if made._train_batch_size == args.per_device_train_batch_size:
                raise RuntimeError("CUDA out of memory.")

    args = arguments(case, folder, per_device_train_batch_size=4, auto_find_batch_size=True)
    made = trainer(args, callbacks=[Full()])
    made.train()
    made.evaluate()
    return history(made)


def resume(case: Case, folder: Path) -> dict[str, Any]:
    """Half the steps again, from a checkpoint; the best model is loaded at the end."""
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
                "load_best_model_at_end": True}  # fmt: skip
    whole = trainer(arguments(case, folder, **settings))
    whole.train()
    again = trainer(arguments(case, folder, **settings))
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert again.state.global_step == STEPS
    assert again.state.best_model_checkpoint == str(folder / "checkpoint-4")
    resumed = history(again)
    again.evaluate()
    return {**history(whole), "resumed": resumed["loss"][-2:], "best": history(again)["eval"][-1]}


def from_pretrained(case: Case, folder: Path) -> dict[str, Any]:
    """A model that `from_pretrained` makes while TrainingArguments exist: at stage 3 within zero.Init.

    It is saved by `save_model` and read again, and so is the next, which has other tokens besides.
    """
    from transformers import AutoModelForCausalLM

    first = folder / "first"
    if _is_first():
        gpt().save_pretrained(first)
    _wait()
    args = arguments(case, folder)
    model = AutoModelForCausalLM.from_pretrained(first)
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    made = trainer(args, model)
    made.train()
    made.evaluate()
    made.save_model(str(folder / "saved"))
    _wait()
    return {**history(made), "saved": _loss_of(folder / "saved")}


def lora(case: Case, folder: Path) -> dict[str, Any]:
    """An adapter by PEFT: trained, saved and read again."""
    from peft import LoraConfig, PeftModel, get_peft_model

    args = arguments(case, folder)
    torch.manual_seed(1)
    adapted = get_peft_model(
        gpt(), LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    )
    made = trainer(args, adapted)
    made.train()
    made.evaluate()
    made.save_model(str(folder / "adapter"))
    _wait()
    return {**history(made), "saved": _loss_of(PeftModel.from_pretrained(gpt(), folder / "adapter"))}


def save(case: Case, folder: Path) -> dict[str, Any]:
    """`save_model` without the key that gathers the weights at stage 3."""
    settings = config(case)
    del settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    made = trainer(arguments(case, folder, deepspeed=settings, max_steps=1))
    made.train()
    made.save_model(str(folder / "saved"))
    _wait()
    names = {each.name for each in (folder / "saved").iterdir()}
    return {"model": "model.safetensors" in names, "checkpoint": any("global_step" in name for name in names)}


def sft(case: Case, folder: Path) -> dict[str, Any]:
    """TRL's SFTTrainer, and generation in the end, as its online trainers do it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.models import unwrap_model_for_generation

    tokenizer = _tokenizer()
    texts = [" ".join(f"t{token}" for token in each["input_ids"]) for each in sentences(64)]
    args = arguments(case, folder, SFTConfig, max_length=LENGTH, gradient_checkpointing=False, packing=False,
                     dataset_num_proc=None)  # fmt: skip
    made = SFTTrainer(
        model=gpt(), args=args, processing_class=tokenizer, train_dataset=Dataset.from_dict({"text": texts}),
        eval_dataset=Dataset.from_dict({"text": texts[:4]}),
    )  # fmt: skip
    made.train()
    made.evaluate()
    with unwrap_model_for_generation(made.model_wrapped, made.accelerator) as model:
        tokens = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
    made.save_model(str(folder / "saved"))
    _wait()
    found = {**history(made), "saved": _loss_of(folder / "saved")}
    return {**found, "generated": tokens[0].tolist()} if case["precision"] == "fp32" else found


def dpo(case: Case, folder: Path) -> dict[str, Any]:
    """TRL's DPOTrainer, whose reference model is a second engine, without an optimizer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    texts = [" ".join(f"t{token}" for token in each["input_ids"]) for each in sentences(64)]
    pairs = {"prompt": [each[:8] for each in texts], "chosen": [each[8:] for each in texts],
             "rejected": [each[8:] for each in reversed(texts)]}  # fmt: skip
    args = arguments(case, folder, DPOConfig, max_length=2 * LENGTH, gradient_checkpointing=False)
    made = DPOTrainer(
        model=gpt(), ref_model=gpt(), args=args, processing_class=_tokenizer(), train_dataset=Dataset.from_dict(pairs)
    )
    made.train()
    return history(made)


def hand_over(case: Case, folder: Path) -> float:
    """The loss after training, or of the checkpoint that other ranks have saved then, before training goes on."""
    saved = folder / f"checkpoint-{STEPS}"
    resumes = saved.exists()
    _wait()
    made = trainer(arguments(case, folder, save_strategy="steps", save_steps=STEPS, eval_on_start=resumes))
    made.train(resume_from_checkpoint=str(saved) if resumes else None)
    made.evaluate()
    return float(history(made)["eval"][0])


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{token}": token for token in range(3, VOCABULARY)}}
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _loss_of(model: Any) -> float:
    """Of a model, or of one in a folder, without any engine."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return mean(model.float()(**collate(sentences(8, seed=1))).loss)


def _is_first() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
