"""Checkpoints: all of a run on the disk, so that it goes on as if nothing had happened.

    DIR/latest  DIR/TAG/{manifest.json, state.json, .metadata, *.distcp, rank_R.pt}     see `layout`

`state` takes a run's state from an engine and `save` writes it; `load` finds a checkpoint that is whole and
`restore` puts it into an engine. `deepspeed` reads what DeepSpeed wrote, which `adopt` puts into an engine.
`consolidate` and `export` make one file of a model: from a checkpoint, or from the engine itself.
"""

from engine.checkpoint.export import save_16bit_model
from engine.checkpoint.load import load_checkpoint
from engine.checkpoint.restore import Wanted
from engine.checkpoint.save import save_checkpoint

__all__ = ["Wanted", "load_checkpoint", "save_16bit_model", "save_checkpoint"]
