"""Worker processes of loader and prepare: started clean, deaf to Ctrl-C, gone when their main process is gone."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

import cv2

# Only what is not ours: the server does not know our import path (Python < 3.14), and a package called `data` elsewhere
# would be taken for ours in every worker.
_PRELOADED = ["torch", "cv2", "webdataset", "pydantic"]


def worker_context() -> BaseContext:
    """A fork server: forking this process, with its OpenMP, CUDA and gloo threads, can hang the child."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches every process of the terminal: the server, and workers before `init_worker`, inherit deafness.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
    return context


def init_worker(*_: object) -> None:
    """Set up a worker: no OpenCV threads, Ctrl-C left to the main process, and an end when that one is killed."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The fork server, our parent to the kernel, lives as long as its children do: the main process is watched instead.
    main = multiprocessing.parent_process()

    def end_with_main() -> None:
        main.join()
        os._exit(1)

    if main is not None:
        threading.Thread(target=end_with_main, daemon=True).start()


@contextlib.contextmanager
def main_not_imported_again() -> Iterator[None]:
    """Start children without their importing the main script again, as a fork server's children otherwise do.

    Nothing of ours that workers run lives in the main script, and importing a training script takes seconds a worker.
    """
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    try:
        main.__spec__ = None
        if "__file__" in kept:
            del main.__file__
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)
