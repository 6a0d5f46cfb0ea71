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

# The main process decides when work ends. (SIGTERM from that process itself ends a worker all the same.)
NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def worker_context() -> BaseContext:
    """A fork server: forking this process, with its OpenMP, CUDA and gloo threads, can hang the child."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches every process of the terminal, a scheduler's signal every process of the job: the server, and
        # workers before `init_worker`, inherit deafness.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in NOT_FOR_WORKERS}
        try:
            forkserver.ensure_running()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return context


def init_worker(*_: object) -> None:
    """Set up a worker: no OpenCV threads, signals left to the main process, and an end when that one ends it or is
    killed itself."""
    cv2.setNumThreads(0)
    for number in NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    # The fork server, our parent to the kernel, lives as long as its children do: the main process is watched instead.
    main = multiprocessing.parent_process()
    if main is None:
        return

    def end_with_main() -> None:
        main.join()
        os._exit(1)

    def end_when_told() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main.pid:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what is ignored never comes to the one that waits for it
    for work in (end_with_main, end_when_told):
        threading.Thread(target=work, daemon=True).start()


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
