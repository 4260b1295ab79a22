"""What the stand-ins of public scripts share: modules that are not there, and CUDA's names on a machine without a GPU.

Without a GPU the device is the CPU, and fp16 counts as supported there.
"""

import datetime
import functools
import importlib
import importlib.machinery
import random
import runpy
import sys
import types
from unittest.mock import MagicMock

import deepspeed
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator

_DEVICE = torch.device


def module(name, **values):
    """Make ``import name`` find these values; every other name in it is a mock."""
    made = types.ModuleType(name)
    made.__path__, made.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
    made.__getattr__ = lambda key: MagicMock() if not key.startswith("__") else _no_attribute(name, key)
    vars(made).update(values)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent:
        try:
            importlib.import_module(parent)
        except ModuleNotFoundError as error:
            if not parent.startswith(str(error.name)):
                raise
            module(parent)
        setattr(sys.modules[parent], child, made)
    return made


def run(script=None):
    """Run a script of the working directory, or the one that the arguments name, with these arguments."""
    if script is None:
        script = next(word for word in sys.argv[1:] if word.endswith(".py"))
        sys.argv.remove(script)
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")


def save_model(folder):
    """A tiny OPT and a tokenizer of the words w0 to w96, as from_pretrained reads them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|endoftext|>", "Human:", "Assistant:", *(f"w{number}" for number in range(97))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = transformers.OPTConfig(
        vocab_size=104, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.0, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=words[0], bos_token=words[0]
    ).save_pretrained(folder)
    return model


def sentence(length):
    """So many random words."""
    return " ".join(f"w{random.randrange(97)}" for _ in range(length))


def preferences(count):
    """The same random prompts each time, with an answer that is chosen and one that is rejected."""
    random.seed(0)
    return [{"prompt": f"Human: {sentence(6)} Assistant:", "chosen": " " + sentence(8), "rejected": " " + sentence(8)}
            for _ in range(count)]  # fmt: skip


def _no_attribute(name, key):
    raise AttributeError(f"module {name!r} has no attribute {key!r}")


def _on_cpu(value):
    """``value`` with the CPU in place of a CUDA device; an int is one, unless it is a bool."""
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    if isinstance(value, _DEVICE) or (isinstance(value, int) and not isinstance(value, bool)):
        return _DEVICE("cpu")
    return value


class _Device(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, _DEVICE)

    def __call__(cls, *args, **kwargs):
        made = _DEVICE(*args, **kwargs)
        return made if made.type == "meta" else _DEVICE("cpu")


def _moved(to):
    @functools.wraps(to)
    def moved(self, *args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        keep = args and isinstance(args[0], _DEVICE) and args[0].type == "meta"
        return to(self, *(args if keep else map(_on_cpu, args)), **kwargs)

    return moved


def _initialized(init):
    @functools.wraps(init)
    def initialized(backend=None, *args, **kwargs):
        return init("gloo" if backend == "nccl" else backend, *args, **kwargs)

    return initialized


class _FusedAdam:
    """torch's Adam in place of DeepSpeed's kernel, which on a CPU takes a compiler and rounds otherwise."""

    def __new__(cls, params, weight_decay=0.0, bias_correction=True, adam_w_mode=True, **kwargs):
        kind = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
        return kind(params, weight_decay=weight_decay, **kwargs)


def _use_cpu():
    torch.device = _Device("device", (), {"__module__": "torch"})
    for owner in (torch.Tensor, torch.nn.Module):
        owner.to = _moved(owner.to)
        owner.cuda = lambda self, *_, **__: self
    tensor = torch.tensor
    torch.tensor = lambda *args, device=None, **kwargs: tensor(*args, device=_on_cpu(device), **kwargs)
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.memory_summary = lambda: ""
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.amp.autocast = functools.partial(torch.autocast, "cpu")
    torch.distributed.init_process_group = _initialized(torch.distributed.init_process_group)
    type(get_accelerator()).is_fp16_supported = lambda self: True
    if not hasattr(deepspeed, "__redline__"):
        deepspeed.ops.adam.FusedAdam = deepspeed.runtime.engine.FusedAdam = _FusedAdam


sys.path[0] = ""  # the working directory, in place of that of the stand-ins
if not torch.cuda.is_available():
    _use_cpu()
# An attribute of older versions of torch
torch.distributed.ProcessGroup.options = types.SimpleNamespace(_timeout=datetime.timedelta(minutes=1))
