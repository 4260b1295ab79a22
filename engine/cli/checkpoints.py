"""The command that reads checkpoints: consolidate."""

from __future__ import annotations

import argparse

from redline.cli.arguments import arg, command

__all__ = ["consolidate"]

_DTYPES = ["keep", "fp32", "bf16", "fp16"]
_DTYPE = "of the parameters: keep, fp32, bf16 or fp16 (default: %(default)s)"


@command(
    arg("directory", metavar="DIR", help="folder of checkpoints"),
    arg("-o", "--output", required=True, metavar="FILE", help="file to write: .safetensors, .pt, .pth or .bin"),
    arg("--tag", metavar="TAG", help="which checkpoint (default: the one that DIR/latest names)"),
    arg("--dtype", choices=_DTYPES, default="keep", metavar="DTYPE", help=_DTYPE),
    arg("--force", action="store_true", help="replace an existing file"),
    arg("--quiet", action="store_true", help="print no progress"),
)
def consolidate(options: argparse.Namespace) -> int:
    """Write the model of a checkpoint into one file.

    DIR is where save_checkpoint saved, here or in DeepSpeed (ZeRO stages 0 to 3), or the folder of one tag.
    One process does it, without a GPU and in little memory: tensors are copied from file to file in parts.
    A name that ends in .safetensors gives that format; in it a tied weight has one of its names, as
    transformers and safetensors.torch.load_model expect. .pt, .pth and .bin are for torch.load, have every
    name, and take twice the disk space while they are written. --dtype keep is the checkpoint's dtype, which is
    fp32 wherever training had fp32 master params; buffers keep theirs in any case.
    Exit code: 0 written, 1 no checkpoint, a corrupt one, or no disk space: then there is no file, 2 wrong
    command line.

    examples:
      redline consolidate checkpoints -o model.safetensors
      redline consolidate checkpoints --tag global_step1000 --dtype bf16 -o model.bin
    """
    from redline.checkpoint.model_file import consolidate

    names = ("tag", "dtype", "force")
    settings = {name: getattr(options, name) for name in names}
    done = consolidate(options.directory, options.output, **settings, progress=not options.quiet)
    print(f"{done.path}: {done.tensors} tensors, {done.bytes / 2**20:,.1f} MiB; from {done.source}")
    for alias, name in done.aliases.items():
        print(f"  {alias} is tied to {name}")
    return 0
