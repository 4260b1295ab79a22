"""The command line of `redline`: its commands, what each takes, and the help on it. What they do is in `cli`."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["build_parser"]


def build_parser() -> argparse.ArgumentParser:
    """The parser; what it gives has the name of the command as `command`, and its options."""
    parser = argparse.ArgumentParser(
        prog="redline",
        description="Train PyTorch models from DeepSpeed's JSON, and find their learning rate.",
        epilog="A first look:  redline validate config.json;  redline plot config.json --steps 4000;\n"
        "redline tune task.py:digits --config config.json --steps 4000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    _add_validate(commands)
    _add_explain(commands)
    _add_diff(commands)
    _add_schema(commands)
    _add_plot(commands)
    _add_range_test(commands)
    _add_tune(commands)
    _add_report(commands)
    _add_consolidate(commands)
    return parser


def _add_validate(commands: Any) -> None:
    parser = _add(commands, "validate", "say what a config asks for, and everything that is wrong with it",
        "Exit code: 0 runs as written, 1 invalid, 2 wrong command line, 3 valid DeepSpeed that asks for what is "
        "not supported here.\n\nexamples:\n  redline validate ds_config.json\n"
        "  redline validate ds_config.json --world-size 8 --json")  # fmt: skip
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="config files, DeepSpeed's JSON")
    parser.add_argument("--world-size", type=_positive, metavar="N", help="check batch sizes for N processes")
    parser.add_argument("--schema", metavar="POLICY.json", help="a JSON Schema with rules of your own to check, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object (a list for several files)")
    parser.add_argument("--effective", action="store_true",
        help="print every value of the config in force, too, with its origin")  # fmt: skip


def _add_explain(commands: Any) -> None:
    parser = _add(commands, "explain", "say what a key means, what it takes, and what becomes of it",
        "KEY is a path, its last part, or a pattern; a section lists what is in it. Without KEY: all at the top.\n\n"
        "examples:\n  redline explain zero_optimization.stage\n  redline explain cycle_min_lr\n"
        "  redline explain 'zero_optimization.offload*'")  # fmt: skip
    parser.add_argument("key", nargs="?", default="", metavar="KEY")


def _add_diff(commands: Any) -> None:
    parser = _add(commands, "diff", "compare two configs as they are in force",
        "Defaults count, spelling and comments do not: two files that train alike have no difference.\n\n"
        "example:\n  redline diff ds_config.json range_test/one_cycle.json")  # fmt: skip
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")
    parser.add_argument("--world-size", type=_positive, metavar="N", help="infer batch sizes for N processes")


def _add_schema(commands: Any) -> None:
    _add(commands, "schema", "print the JSON Schema of configs, for editors",
        'Save it and name it in a config as "$schema"; editors then complete keys and underline mistakes.\n\n'
        "example:\n  redline schema > schema.json")  # fmt: skip


def _add_plot(commands: Any) -> None:
    parser = _add(commands, "plot", "draw the learning rate and momentum of a config before any training",
        "The charts appear in the terminal and as a picture.\n\n"
        "example:\n  redline plot configs/one_cycle.json --steps 5000")  # fmt: skip
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--steps", type=_positive, metavar="N", help="updates to show; default the schedule's length")
    parser.add_argument("--out", metavar="FILE", help="PNG, SVG or PDF; default CONFIG's name with _schedule.png")
    parser.add_argument("--csv", metavar="FILE", help="write the numbers, too")


def _add_range_test(commands: Any) -> None:
    parser = _add(commands, "range-test", "find the learning rate of a model",
        "TASK is file.py:function, a function that returns model, data, loss and, if you like, validation data:\n\n"
        "  def digits():\n"
        "      return model, train_dataset, torch.nn.CrossEntropyLoss(), validation_dataset\n\n"
        "data: a dataset, a tuple of tensors, or a loader. loss: a criterion, or loss(model, batch).\n"
        "Each rate is one run from the same weights: in STEP_SIZE updates the learning rate grows by\n"
        "rate x MIN_LR, or 1 + rate times with --growth exponential. Out come a picture, the numbers,\n"
        "and a config with a OneCycle to train with.\n\n"
        "examples:\n  redline range-test task.py:digits --config config.json --rates 5,50 --out range_test\n"
        "  torchrun --nproc-per-node 2 -m engine range-test task.py:digits --config config.json")  # fmt: skip
    parser.add_argument("task", metavar="TASK", help="file.py:function")
    parser.add_argument("--config", required=True, metavar="C", help="the config to test with, DeepSpeed's JSON")
    parser.add_argument("--out", default="range_test", metavar="DIR", help="folder to write to (default: %(default)s)")
    parser.add_argument(
        "--rates", type=_rates, metavar="R,R,...", help="growth rates, one run each (default: 5,50,500)"
    )
    parser.add_argument(
        "--min-lr", type=float, metavar="LR", help="first learning rate (default: the config's, or 1e-4)"
    )
    parser.add_argument(
        "--step-size", type=_positive, metavar="N", help="updates (default: the config's, or STEPS / 20)"
    )
    parser.add_argument("--growth", choices=["linear", "exponential"], metavar="G",
        help="linear, or exponential: by equal factors (default: the config's, or linear)")  # fmt: skip
    parser.add_argument("--steps", type=_positive, default=200, metavar="N", help="updates of a run (default: 200)")
    parser.add_argument("--baseline", type=_baseline, default=True, metavar="LR|none",
        help="fixed learning rate to run beside (default: the optimizer's)")  # fmt: skip
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N",
        help="make every test N times, with other random numbers and order of data (default: 1)")  # fmt: skip
    parser.add_argument("--batch-sizes", type=_batch_sizes, metavar="B,B",
        help="test at these batch sizes, too, by gradient accumulation")  # fmt: skip
    parser.add_argument("--sweep", type=_sweep, action="append", default=[], metavar="KEY=V,V",
        help="test with these values of weight_decay or momentum, too; may be given for both")  # fmt: skip
    parser.add_argument("--train-steps", type=_positive, metavar="N",
        help="updates of the training you plan, for its step sizes (default: 10 x STEPS)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of torch's random numbers (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_tune(commands: Any) -> None:
    parser = _add(commands, "tune", "find the learning rate and the schedule, and prove them by training",
        "A coarse sweep finds the order of magnitude, a slow and a fast range test the boundaries, five\n"
        "short trainings the peak. Trials with linear decay, OneCycle and fixed rates show which is best, and DIR\n"
        "gets its config, tuned.json, with a report. All together takes at most BUDGET of the N updates that you\n"
        "plan. TASK is as for range-test; with validation data trials are judged by its loss.\n\n"
        "The config's optimizer and batch are kept, its schedule is replaced. Where its schedule is an LRRangeTest\n"
        "with lr_range_test_min_lr, the tests start there and there is no sweep.\n"
        "Ctrl-C ends it at the next update with a report of what is known by then; a second one ends at once.\n"
        "Exit code: 0 done, 1 nothing can be suggested (the message says why), 2 wrong command line, 130 Ctrl-C.\n\n"
        "examples:\n  redline tune task.py:digits --config config.json --steps 4000\n"
        "  redline tune task.py:digits --config config.json --steps 4000 --sweep weight_decay=0,1e-4,1e-2\n"
        "  redline tune task.py:digits --config config.json --steps 4000 \\\n"
        "      --batch-sizes 32,128,512 --target-batch 512 --target-processes 8\n"
        "  torchrun --nproc-per-node 2 -m engine tune task.py:digits --config config.json --steps 4000")  # fmt: skip
    parser.add_argument("task", metavar="TASK", help="file.py:function")
    parser.add_argument("--config", required=True, metavar="BASE", help="the config to start from, DeepSpeed's JSON")
    parser.add_argument("--steps", type=_positive, required=True, metavar="N", help="updates of the training you plan")
    parser.add_argument("--out", default="tune", metavar="DIR", help="folder to write to (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=0.1, metavar="SHARE",
        help="share of N that it may take (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-updates", type=_positive, metavar="N",
        help="updates that it may take, however long the training (default: 1000)")  # fmt: skip
    parser.add_argument("--seeds", type=_positive, default=1, metavar="K",
        help="repeat the tests with so many initial models (default: %(default)s)")  # fmt: skip
    parser.add_argument("--batch-sizes", type=_batch_sizes, metavar="B,B,...",
        help="also test at these batch sizes, by gradient accumulation")  # fmt: skip
    parser.add_argument("--sweep", type=_sweep, action="append", metavar="NAME=V,V,...",
        help="also test with these values of weight_decay or momentum; may be given twice")  # fmt: skip
    parser.add_argument("--target-batch", type=_positive, metavar="B", help="write the config for this batch size")
    parser.add_argument("--target-processes", type=_positive, metavar="P", help="write it for so many processes")
    parser.add_argument("--seed", type=int, default=0, help="of torch's random numbers (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_report(commands: Any) -> None:
    parser = _add(commands, "report", "read a finished range test or tuning again and renew its files",
        "DIR is the folder that range-test or tune wrote; its files are renewed. FILE is a table that you have: CSV\n"
        "with a header, pytorch-lr-finder's history or Lightning's results as JSON. It needs a rate and a loss\n"
        "for each update; common names of columns are recognised. Its report goes to FILE's name with _report.\n\n"
        "examples:\n  redline report range_test --train-steps 5000\n"
        "  redline report losses.csv --lr-column lr --loss-column loss")  # fmt: skip
    parser.add_argument("source", metavar="DIR|FILE", help="the folder that range-test or tune wrote, or a table")
    parser.add_argument("--train-steps", type=_positive, metavar="N", help="suggest for a training of N updates")
    parser.add_argument("--smoothing", type=_share, default=0.8, metavar="B",
        help="weight of the past in the smoothing of the curves (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: DIR itself, or FILE's name_report)")
    parser.add_argument("--lr-column", metavar="NAME", help="column of FILE with the learning rate")
    parser.add_argument("--loss-column", metavar="NAME", help="column of FILE with the training loss")
    parser.add_argument(
        "--batch-size", type=_positive, metavar="B", help="samples of an update that FILE was made with"
    )


def _add_consolidate(commands: Any) -> None:
    parser = _add(commands, "consolidate", "make one file of a checkpoint's model",
        "DIR is where save_checkpoint saved, here or in DeepSpeed (ZeRO stages 0 to 3), or the folder of one tag.\n"
        "One process does it, without a GPU and in little memory: tensors go from file to file in parts.\n"
        "A name that ends in .safetensors gives that format; in it a tied weight stands under one of its names, as\n"
        "transformers and safetensors.torch.load_model expect. .pt, .pth and .bin are for torch.load, have every\n"
        "name, and take twice the room while they are written.\n"
        "Exit code: 0 written, 1 no checkpoint, a broken one, or no room: then there is no file, 2 wrong command "
        "line.\n\n"
        "examples:\n  redline consolidate checkpoints -o model.safetensors\n"
        "  redline consolidate checkpoints --tag global_step1000 --dtype bf16 -o model.bin")  # fmt: skip
    parser.add_argument("directory", metavar="DIR", help="folder of checkpoints")
    parser.add_argument("-o", "--output", required=True, metavar="FILE",
        help="file to write: .safetensors, .pt, .pth or .bin")  # fmt: skip
    parser.add_argument("--tag", metavar="TAG", help="which checkpoint (default: the one that DIR/latest names)")
    parser.add_argument("--dtype", choices=["keep", "fp32", "bf16", "fp16"], default="keep",
        help="number format of parameters; keep is the one of the checkpoint, fp32 wherever training had fp32 weights; "
        "buffers keep theirs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add(commands: Any, name: str, help: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f'got "{text}"; expected an integer >= 1')
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'got "{text}"; expected a number from 0 to below 1')
    return value


def _rates(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f'got "{text}"; expected numbers with commas, such as 5,50') from None


def _batch_sizes(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _sweep(text: str) -> tuple[str, list[float]]:
    name, equals, values = text.partition("=")
    if not equals or name not in ("weight_decay", "momentum"):
        raise argparse.ArgumentTypeError(
            f'got "{text}"; expected weight_decay=... or momentum=..., such as weight_decay=0,1e-4,1e-2'
        )
    return name, _rates(values)


def _baseline(text: str) -> float | bool:
    try:
        return False if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'got "{text}"; expected a learning rate or none') from None
