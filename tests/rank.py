"""One rank of the pool in `tests.distributed`: it serves calls until its caller is gone, each from a clean state.

What a call can leave behind in a process is put back after it: environment variables, the working directory, random
seeds, torch's global settings, signal handlers, warning filters, loggers, module-level names of our own packages,
exit functions (they run, as at the end of a script), the process group and what torch caches about it.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import itertools
import logging
import os
import pickle
import random
import signal
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["DUMP_SIGNAL", "IMPORTED", "serve"]

# Imported before any rank is forked. torch._dynamo alone takes seconds, and DDP's constructor imports it.
IMPORTED = [
    *("pytest", "hypothesis", "numpy", "pydantic", "jsonschema"),
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.tensor"),
    *(
        "redline.start",
        "redline.config",
        "redline.checkpoint.load",
        "redline.checkpoint.save",
        "redline.checkpoint.model_file",
    ),
    *("redline.range_test", "tests.rank"),
]
DUMP_SIGNAL = signal.SIGUSR1  # a rank that hangs then writes down where

_OURS = ("redline", "scripts", "tests")
_SYS = ("argv", "path", "stdin", "stdout", "stderr", "excepthook", "displayhook")
_TORCH: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
)


def serve(calls: Connection, dump: Connection, once: bool = False) -> None:
    """Answer calls until the caller closes the connection.

    Args:
        calls: where calls come in and answers go out.
        dump: where the tracebacks of all threads go on `DUMP_SIGNAL`.
        once: whether to end after the first call, as a script does, and without imports that it may not need.

    A call is a pickled (environment, folder, pickled (function, arguments)). To each there are two answers: first
    (pickled value, None) or (None, traceback), at once, since other ranks may wait for this one in vain; then whether
    the state is clean again. Where it is not, this process ends.
    """
    faulthandler.enable()  # says where, if a signal such as SIGSEGV or SIGABRT ends this process
    faulthandler.register(DUMP_SIGNAL, file=dump.fileno())
    torch.set_num_threads(1)  # torch was imported before the environment was set
    if not once:
        for name in IMPORTED:
            importlib.import_module(name)
    clean = None if once else _CleanState()
    gc.freeze()  # a collection would take half a second to look through what torch's import has made
    while True:
        try:
            environment, folder, work = pickle.loads(calls.recv_bytes())
        except (EOFError, KeyboardInterrupt):
            return
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        calls.send(_run(work, clean.note_modules if clean else None))
        _end_what_runs()
        if clean:
            clean.restore()
        fit = clean is not None and not _has_connections()
        calls.send(fit)
        if not fit:
            os._exit(0)  # at once: another rank may wait for this one's connections to break


def _run(work: bytes, imported: Callable[[], None] | None = None) -> tuple[bytes | None, str | None]:
    """The pickled value of a pickled (function, arguments), or the traceback.

    Both travel as bytes: the environment is there before the function's module is imported, and a tensor arrives as a
    copy. torch's own queues would share its memory, which goes when this process goes.

    Args:
        work: what to call.
        imported: called between importing the function's module and calling the function.
    """
    try:
        target, args = pickle.loads(work)
        if imported:
            imported()
        return pickle.dumps(target(*args)), None
    except BaseException:
        return None, traceback.format_exc()


def _end_what_runs() -> None:
    """Wait for threads, then run the exit functions, as an interpreter at its exit; a forked child skips both."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    # DDP models go while their process group is still there. A Reducer that is the last to hold a gloo group waits for
    # the group's threads with the GIL held, which one of them may need to end: a deadlock, now and then.
    gc.collect()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _has_connections() -> bool:
    """Whether a process group is left, though it has been destroyed: something in C++ still refers to it.

    An exception out of FSDP's hooks may leave a cycle through the autograd graph, which nothing collects. The group's
    threads and its connections to the other ranks then stay.
    """
    tasks = Path("/proc/self/task")
    with suppress(OSError):  # a thread that ends while it is looked at; no Linux
        return any("gloo" in (task / "comm").read_text() for task in tasks.iterdir())
    return False


class _CleanState:
    """The state of a process that has imported everything and run nothing, as of this object's construction."""

    def __init__(self) -> None:
        self._folder = os.getcwd()
        self._seed = torch.initial_seed()
        self._sys = {name: getattr(sys, name) for name in _SYS}
        self._path, self._argv = sys.path[:], sys.argv[:]
        self._torch = [(get, set_to, get()) for get, set_to in _TORCH]
        self._signals = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self._warnings = warnings.filters[:], warnings.showwarning
        self._loggers = [
            (each, each.handlers[:], each.filters[:], each.level, each.propagate, each.disabled) for each in _loggers()
        ]
        self._seed_random()
        self._modules: dict[str, _Names] = {}
        self.note_modules()
        # These caches hold device meshes, and so process groups that are gone after the call.
        self._caches = [
            each
            for each in gc.get_objects()
            if type(each) is functools._lru_cache_wrapper and (each.__module__ or "").startswith("torch.distributed")
        ]
        # The exit functions so far belong to the parent, and weakref's would switch all finalizers off when it runs.
        weakref.finalize(self, int)
        atexit._clear()

    def note_modules(self) -> None:
        """Take the names of our modules that have been imported since the last call of this for their clean state."""
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in _OURS and name not in self._modules:
                self._modules[name] = _Names(module)

    def restore(self) -> None:
        """Undo what the call has changed."""
        self.note_modules()  # those that the function itself imported
        self._restore_python()
        self._restore_torch()

    def _restore_python(self) -> None:
        os.chdir(self._folder)
        for name, value in self._sys.items():
            setattr(sys, name, value)
        sys.path[:], sys.argv[:] = self._path, self._argv
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            vars(sys).pop(name, None)
        for number, handler in self._signals.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        warnings.resetwarnings()  # forgets, too, which warnings have been shown
        warnings.filters[:], warnings.showwarning = self._warnings  # type: ignore[index]
        logging.disable(logging.NOTSET)
        for logger, handlers, filters, level, propagate, disabled in self._loggers:
            logger.handlers[:], logger.filters[:] = handlers, filters
            logger.setLevel(level)
            logger.propagate, logger.disabled = propagate, disabled
        for names in self._modules.values():
            names.restore()
        self._seed_random()

    def _restore_torch(self) -> None:
        for get, set_to, value in self._torch:
            if get() != value:
                set_to(value)
        gc.collect()  # DDP and FSDP models first, then their process group
        if dist.is_initialized():
            dist.destroy_process_group()
        for cache in self._caches:
            cache.cache_clear()
        if clear := getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None):
            clear()
        torch._dynamo.reset()

    def _seed_random(self) -> None:
        random.seed(0)
        importlib.import_module("numpy").random.seed(0)
        torch.manual_seed(self._seed)


class _Names:
    """The names of a module as they are now: what each is bound to, and what lists, dicts and sets hold."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        names = {key: value for key, value in vars(module).items() if not key.startswith("__")}
        self._values = {
            key: (value, value.copy() if type(value) in (list, dict, set) else None) for key, value in names.items()
        }

    def restore(self) -> None:
        for key, (value, content) in self._values.items():
            if type(value) is itertools.count:  # part of keys in the store, so it must agree between ranks
                value = itertools.count()
            if content is not None:
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)
            if vars(self._module).get(key) is not value:
                setattr(self._module, key, value)


def _loggers() -> list[logging.Logger]:
    known = logging.root.manager.loggerDict.values()
    return [logging.root, *(each for each in known if isinstance(each, logging.Logger))]
