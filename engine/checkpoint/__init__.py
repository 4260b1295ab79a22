"""Checkpoints: all of a run on disk, so that it continues as if it had not been interrupted.

`save` writes and `load` reads what is in a directory (`storage`); `deepspeed_reader` makes a checkpoint of DeepSpeed's
look like one of Redline's. `model_file` writes one file with the model of a checkpoint, or of a running engine.

The modules that do the work import torch.distributed.checkpoint, which takes half a second. They are imported when they
are first needed, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redline.checkpoint.ranks import AsyncWriter
from redline.log import log

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["Checkpointer"]


class Checkpointer:
    """What the engine is given to save and load itself, by the config's options."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._writer: AsyncWriter | None = None
        self._loaded: str | None = None  # the tag of a checkpoint that was loaded; keep_last does not remove it

    def save(
        self,
        run: Any,
        save_dir: str | Path,
        tag: str | None,
        client_state: Mapping[str, Any],
        *,
        save_latest: bool,
        exclude_frozen: bool,
    ) -> bool:
        """See :meth:`redline.Engine.save_checkpoint`."""
        from redline.checkpoint.save import Save

        for callback in run.callbacks:
            callback.on_save(run)
        if self._config.redline.checkpoint.async_save and self._writer is None:
            self._writer = AsyncWriter(run.world_size)
        writer = self._writer
        self.wait()
        group = None if writer is None else writer.group
        save = Save(run, self._config, group, save_dir, tag, latest=save_latest, protected=self._loaded)
        save.capture(run, client_state, exclude_frozen=exclude_frozen)
        if writer is None or save.error is not None:
            save.write()
        else:
            save.values = writer.copy(save.values)
            writer.start(save.write)
        return True

    def load(
        self, run: Any, load_dir: str | Path, tag: str | None, **options: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """See :meth:`redline.Engine.load_checkpoint`; the options are those of `LoadOptions`."""
        from redline.checkpoint.load import LoadOptions, load_checkpoint

        self.wait()
        path, client_state = load_checkpoint(run, self._config, load_dir, tag, LoadOptions(**options))
        self._loaded = None if path is None else Path(path).name
        # A run that was killed before its first save finds nothing, and resumes at its beginning.
        if not options["module_only"] and (path is not None or run.counters()["global_steps"] == 0):
            for callback in run.callbacks:
                callback.on_resume(run)
        return path, client_state

    def save_16bit_model(self, run: Any, save_dir: str | Path, filename: str, exclude_frozen: bool) -> bool:
        """See :meth:`redline.Engine.save_16bit_model`."""
        from redline.checkpoint.model_file import save_16bit_model

        zero = self._config.zero_optimization
        if zero is not None and zero.stage == 3 and not zero.stage3_gather_16bit_weights_on_model_save:
            log.warning(
                "save_16bit_model: nothing is saved: zero_optimization.stage3_gather_16bit_weights_on_model_save is "
                "false, as it is by default"
            )
            return False
        save_16bit_model(run, save_dir, filename, exclude_frozen=exclude_frozen)
        return True

    def check(self) -> None:
        """Raise the error of an asynchronous save that has ended."""
        if self._writer is not None:
            self._writer.check()

    def wait(self) -> None:
        """Wait for the asynchronous save that is being written, and raise its error."""
        if self._writer is not None:
            self._writer.wait()
