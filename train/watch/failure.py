"""How a command ends badly: one line that says what, where and what to do, and a status other than 0."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable

from train.log import log
from train.watch.heartbeat import FAILED, STOPPED
from train.watch.signals import StoppedEarly, StopRequest
from train.watch.watchdog import blame, leaving

INTERRUPTED = 130


def explained(work: Callable[[], None], stop: StopRequest | None = None) -> int:
    """Exit status of `work`: 0, or 1 after one line about what the user can mend, or 130 when interrupted.

    0 too where `stop` was asked before there was anything to save; its marker says so. ValueError and OSError are the
    user's (configuration, data, files); their traceback goes to the run's log. Anything else is a defect of ours and
    keeps its traceback.
    """
    threading.excepthook = _quiet_about_disks
    try:
        work()
    except (ValueError, OSError) as error:
        for handler in log.handlers:
            if isinstance(handler, logging.FileHandler):
                with contextlib.suppress(OSError, ValueError):  # the disk may be full: then it is what is told below
                    handler.stream.write(traceback.format_exc())
                    handler.flush()
        leaving(FAILED, _line(error))
        for detail in getattr(error, "details", ()):
            print(detail, file=sys.stderr)
        print(f"error: {_line(error)}", file=sys.stderr, flush=True)
        return _leave(1)
    except StoppedEarly as early:
        if stop is not None:
            stop.mark(str(early))
        leaving(STOPPED, str(early))
        print(f"{early}: stopped before training began", file=sys.stderr, flush=True)
        return _leave(0)
    except KeyboardInterrupt:
        leaving(FAILED, "interrupted")
        print("interrupted", file=sys.stderr, flush=True)
        return _leave(INTERRUPTED)
    except Exception as error:
        if _collective_failed(error):
            said = f"a collective operation failed ({_line(error)[:200]}): looking for the rank that is gone"
            print(said, file=sys.stderr, flush=True)
            blame()
        leaving(FAILED, f"{type(error).__name__}: {_line(error)[:200]}")
        traceback.print_exc()
        return _leave(1)
    return 0


def _quiet_about_disks(failed: threading.ExceptHookArgs) -> None:
    """A thread that could not write its file (TensorBoard's, of a full disk) is one line too."""
    if isinstance(failed.exc_value, OSError):
        print(f"{_line(failed.exc_value)}: a thread that writes files ends", file=sys.stderr, flush=True)
    else:
        threading.__excepthook__(failed)


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: free space where the run's folder lies, then go on with --resume auto"
    return " ".join(str(error).split()) or type(error).__name__


def _collective_failed(error: Exception) -> bool:
    """Whether an exception is what the end of another rank looks like from here."""
    import torch.distributed as dist

    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, (dist.DistError, RuntimeError)) and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )


def _leave(status: int) -> int:
    """End at once where other ranks exist: a clean exit would wait for them in the process group's destructor."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
