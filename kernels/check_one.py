"""A process that judges cases on one route: a line of JSON in, a line of JSON out. Started by `kernels.check` alone.

    python -m kernels.check_one ROUTE DEVICE [--timed] [--preload MODULE]

What a kernel does to its process (an illegal access ends a GPU context, a bad store anything) ends here. --preload
imports a module first, which tests use to break kernels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import threading
import time


def end_with_parent(parent: int) -> None:
    """End this process when the one that asks is gone: a kernel that hangs would never read that."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("route")
    parser.add_argument("device")
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--preload")
    args = parser.parse_args()
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries and compilers print is no answer

    def answer(what: dict) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    import torch

    from kernels.judge import judge
    from kernels.routes import case_from_json

    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.empty(1, device=device)
    if args.preload:
        importlib.import_module(args.preload)
    answer({"ready": True})
    for line in sys.stdin:
        result = judge(case_from_json(json.loads(line)), args.route, device, timed=args.timed)
        answer(result)
        if result.get("fatal"):
            os._exit(0)  # its end could hang or abort over what is left of the context


if __name__ == "__main__":
    main()
