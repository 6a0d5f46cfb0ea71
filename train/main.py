"""Train a deblurring network with a semantic prior.

accelerate launch train/main.py --config configs/quickstart.yaml          # bundled photographs, CPU or GPU
accelerate launch train/main.py --config configs/large.yaml               # one node, all its GPUs
torchrun --nproc_per_node 2 train/main.py --config configs/quickstart.yaml   # several CPU processes (gloo)
python train/main.py --config configs/large.yaml --dry-run --ranks 8      # check everything, train nothing

--set optim.lr=1e-4     any key of the configuration
--resume auto           go on with the run of that name, or start it
--resume auto --extend N   go on with a finished run until step N (with --set optim.lr=… at another rate)
--init RUN              start from the weights of a run, a checkpoint or an exported model
--prior RUN             take the distilled prior of a run or of an exported file, frozen from the first step
                        (model.prior_from, and train.distill_steps 0)
--profile               three steps under torch's profiler, into the run's folder (profile.step, profile.steps: others)
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before other packages called `train` or `data`

from train.watch.signals import StopRequest


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="go on with a run")
    parser.add_argument(
        "--extend", type=int, metavar="STEPS", help="with --resume: steps in all, more than the run had"
    )
    parser.add_argument("--init", metavar="RUN", help="weights to start from")
    parser.add_argument("--prior", metavar="RUN", help="run or file whose distilled prior to plug in, frozen")
    parser.add_argument("--profile", action="store_true", help="profile a window of steps")
    parser.add_argument("--dry-run", action="store_true", help="validate, count and plan; train nothing")
    parser.add_argument("--ranks", type=int, default=None, help="ranks to plan for in a dry run")
    return parser.parse_args(arguments)


def train(args: argparse.Namespace, stop: StopRequest) -> None:
    from train.config.file import load_config
    from train.config.schema import ProfileSection

    stop.heed()
    plugged = []
    if args.prior:
        plugged = ["model.prior=true", f"model.prior_from={json.dumps(args.prior)}", "train.distill_steps=0"]
    overrides = [*plugged, *args.set]
    config = load_config(args.config, overrides)
    if args.extend is not None:
        if not args.resume or args.dry_run:
            raise ValueError("--extend goes on with a run: give --resume auto, or a checkpoint, too")
        config = load_config(args.config, [*overrides, f"train.steps={args.extend}"])

    if args.profile and config.profile is None:
        config = config.model_copy(update={"profile": ProfileSection()})

    # Imported here, so that a wrong key is told in a second.
    from train.checkpoint.plug import plug_in, with_plugged
    from train.config.networks import build_model
    from train.engine.engine import Engine
    from train.log import log
    from train.plan.dry_run import dry_run
    from train.run.bad_steps import BadSteps
    from train.run.precision import choose_precision
    from train.run.schedule import evaluation_due
    from train.run.session import Session
    from train.run.step import training_step
    from train.watch.health import check_health

    by_hand = [given.partition("=")[0] for given in args.set]
    config = with_plugged(config, resumed=args.resume is not None, asked=by_hand)
    if args.dry_run:
        if args.resume or args.init:
            raise ValueError("--dry-run trains nothing: leave out --resume and --init")
        plug_in(build_model(config, read_weights=False), config)
        return dry_run(config, args.ranks)
    if args.ranks is not None:
        raise ValueError("--ranks plans a --dry-run; the launcher decides how many ranks a run has")

    config, chosen = choose_precision(config, args.resume)
    engine = Engine(config)
    extend = args.extend is not None
    with Session(config, engine, stop, resume=args.resume, init=args.init, extend=extend) as run:
        if config.engine.health_check:
            check_health(engine)
        if chosen:
            log.info(chosen)
        step, steps = run.step, config.train.steps
        stop.begin(step)
        run.catch_up()
        loader, bad = run.loader(), BadSteps(run.folder.path, engine.rank, config.train.max_bad_steps)
        while step < steps and not stop.agreed:
            run.begin(step)
            result = training_step(engine, run.task, loader, step, stop, run.traces)
            step += 1
            run.record(step, result)
            bad.check(step, result)
            if result.updated:
                run.ema.update()
            if evaluation_due(step, config):
                run.evaluate(step)
            if step == steps or step % config.checkpoint.every == 0:
                run.save(step)
        if not stop.agreed:
            run.finish()
        if stop.agreed:
            run.stop()


def main() -> int:
    args, stop = parse(sys.argv[1:]), StopRequest()
    stop.install()  # before torch, whose import takes seconds
    from train.watch.failure import explained

    return explained(lambda: train(args, stop), stop)


if __name__ == "__main__":
    sys.exit(main())
