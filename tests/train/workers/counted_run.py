"""train/main.py with every step's collectives counted: counted_run.py OUT.json, then main.py's arguments."""

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))


def main() -> None:
    from tests.train.workers.recorder import recorded
    from train.plan.cost import gradients_of
    from train.run import step as loop

    out, steps = Path(sys.argv[1]), []
    plain = loop.training_step

    def counted(engine, *arguments):
        with recorded() as recorder:
            result = plain(engine, *arguments)
        moved: dict[str, int] = {}
        for one in recorder.collectives:
            moved[one.operation] = moved.get(one.operation, 0) + one.size
        steps.append({"moved": moved, "seconds": recorder.seconds, "share": recorder.share})
        if engine.main and engine.config.engine.zero < 3:
            gradients = gradients_of(engine.module)
            steps[-1]["bucket"] = engine.engine.zero_reduce_bucket_size()
            steps[-1]["gradients"] = [gradients.low, gradients.full, gradients.tensors]
        if engine.main:
            out.write_text(json.dumps(steps))
        return result

    loop.training_step = counted
    sys.argv = [str(ROOT / "train" / "main.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
