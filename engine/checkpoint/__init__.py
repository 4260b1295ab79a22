"""Checkpoints: all of a run on disk, so that it continues as if it had not been interrupted.

`save` writes and `load` reads what is in a directory (`storage`); `deepspeed_reader` makes a checkpoint of DeepSpeed's
look like one of Redline's. `model_file` writes one file with the model of a checkpoint, or of a running engine.

The modules that do the work import torch.distributed.checkpoint, which takes half a second. They are imported when they
are first needed, here and nowhere else.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from redline.distributed.process_group import make_side_group
from redline.errors import EngineError
from redline.log import log

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["Checkpointer"]


class Checkpointer:
    """What the engine is given to save and load itself, by the config's options.

    With `async_save` a thread writes one checkpoint at a time. Its error is raised by the next call, or logged when the
    interpreter exits, which waits for the thread. Several ranks communicate in a group of their own, so that the
    thread's collectives and the training's do not mix.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config, self._is_async = config, config.redline.checkpoint.async_save
        self._loaded: str | None = None  # the tag of a checkpoint that was loaded; keep_last does not remove it
        self._group: Any = None
        self._saving: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        if self._is_async:
            # A weak reference: the exit function must not keep the buffers alive.
            atexit.register(_log_error, weakref.ref(self))

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
        if self._is_async and self._group is None and run.world_size > 1:
            self._group = make_side_group()
        self.wait()
        save = Save(
            run, self._config, self._group, save_dir, tag, client_state,
            latest=save_latest, exclude_frozen=exclude_frozen, protected=self._loaded,
        )  # fmt: skip
        if self._is_async and save.error is None:
            save.values = self._copy(save.values)
            pool = ThreadPoolExecutor(1, "save_checkpoint")
            self._saving = pool.submit(save.write)
            pool.shutdown(wait=False)  # the thread ends after this one
        else:
            save.write()
        return True

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to CPU memory, which is kept for the next time: new memory costs as much as the copying."""
        before, self._buffers = self._buffers, {}
        for key, tensor in tensors.items():
            buffer = before.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        # One launch for all tensors, and one wait for the device at the end.
        torch._foreach_copy_(list(self._buffers.values()), list(tensors.values()), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return self._buffers

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
                "false, as it is by default; set it, or save what engine.full_state_dict() returns on rank 0"
            )
            return False
        save_16bit_model(run, save_dir, filename, exclude_frozen=exclude_frozen)
        return True

    def full_state_dict(self, run: Any) -> dict[str, Any]:
        """See :meth:`redline.Engine.full_state_dict`."""
        from redline.checkpoint.model_file import full_state_dict

        return full_state_dict(run)

    def check(self) -> None:
        """Raise the error of an asynchronous save that has ended; once."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the asynchronous save that is being written, and raise its error."""
        saving, self._saving = self._saving, None
        if saving is not None and (error := saving.exception()) is not None:
            raise EngineError(f"{error} (while training continued: async_save)") from error


def _log_error(reference: weakref.ref[Checkpointer]) -> None:
    if (checkpointer := reference()) is not None:
        try:
            checkpointer.wait()
        except EngineError as error:
            log.error("the last checkpoint was not written: %s", error)
