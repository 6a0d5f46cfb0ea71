"""What an experiment says: arms against the reference, picture by picture, with intervals; curves; what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.blur import TIERS
from data.files import write_atomically
from train.config.patches import phases
from train.config.schema import Config
from train.evaluate.metrics import METRICS
from train.evaluate.results import read_results
from train.experiments.plan import Experiment, Trial
from train.experiments.runner import RESULTS, finished
from train.run.folder import RunFolder

INPUT = "input"
SAME = 1e-6  # dB by which the input's PSNR may differ on another machine
DRAWS = 4000  # of the bootstrap


@dataclass(frozen=True)
class Made:
    """A finished run: its records, and the scores of every picture by (key, tier) (empty where it only distills)."""

    trial: Trial
    config: Config
    folder: Path
    records: list[dict]
    pictures: dict[tuple[str, str], dict]

    @property
    def steps(self) -> list[dict]:
        """Records of training steps."""
        return [record for record in self.records if "loss" in record]

    def seconds(self, name: str = "seconds") -> float:
        """Median of a step's seconds (`seconds`: by the clock; `cpu_s`: of the process's processor time)."""
        return statistics.median(record[name] for record in self.steps if name in record)


def gather(trials: Sequence[Trial]) -> list[Made]:
    """The finished runs."""
    found = []
    for trial in trials:
        try:
            config = trial.load()
        except ValueError:
            if trial.needs is None:
                raise
            continue  # the prior that it takes is not made yet
        if not finished(trial):
            continue
        folder = RunFolder.of(config)
        results = folder.path / RESULTS / "results.json"
        pictures = read_results(results)["pictures"] if results.is_file() else []
        scores = {(each["key"], each["tier"]): each for each in pictures}
        found.append(Made(trial, config, folder.path, list(folder.read_metrics()), scores))
    return found


def trivial_of(made: Sequence[Made]) -> dict[str, str]:
    """Per tier, which trivial way (the input itself, or a yardstick) has the highest mean PSNR: the one that counts."""
    some = next(each for each in made if each.pictures).pictures.values()
    best = {}
    for tier in dict.fromkeys(each["tier"] for each in some):
        rows = [each for each in some if each["tier"] == tier]
        ways = [INPUT, *(name for name in ("gaussian", "unsharp") if all(name in r["yardsticks"] for r in rows))]
        best[tier] = max(ways, key=lambda way: np.mean([_trivial(row, way) for row in rows]))
    return best


def _trivial(picture: Mapping[str, Any], way: str) -> float:
    return picture[INPUT]["psnr"] if way == INPUT else picture["yardsticks"][way]["psnr"]


def over_trivial(made: Made, best: Mapping[str, str], tier: str, metric: str = "psnr") -> dict[tuple[str, str], float]:
    """Gain of every picture of a tier over the best trivial way, dB."""
    return {
        place: each["restored"][metric] - _trivial(each, best[tier])
        for place, each in made.pictures.items()
        if each["tier"] == tier
    }


def paired(arm: Sequence[Made], reference: Sequence[Made], tier: str) -> tuple[float, float, float] | None:
    """Mean difference of restored PSNR between two arms, dB, with its 95 % interval: picture by picture over the seeds
    that both have. Photographs are resampled with all their pictures, and with two seeds or more the seeds too: with
    three of them an interval is rather too narrow than too wide. None without a common seed; NaN bounds where there is
    one photograph alone. ValueError where the two saw different pictures."""
    both = {each.trial.seed: each for each in reference}
    pairs = [(each, both[each.trial.seed]) for each in arm if each.trial.seed in both]
    places = [place for place in pairs[0][0].pictures if place[1] == tier] if pairs else []
    if not places:
        return None
    scenes, member = np.unique([pairs[0][0].pictures[place]["scene"] for place in places], return_inverse=True)
    sums, counts = np.zeros((len(pairs), len(scenes))), np.bincount(member, minlength=len(scenes))
    for row, (one, other) in enumerate(pairs):
        np.add.at(sums[row], member, [_difference(one, other, place) for place in places])
    mean = float(sums.sum() / (counts.sum() * len(pairs)))
    if len(scenes) < 2:
        return mean, float("nan"), float("nan")
    generator = np.random.Generator(np.random.Philox(0))
    of_scenes = generator.multinomial(len(scenes), np.full(len(scenes), 1 / len(scenes)), DRAWS)
    of_seeds = np.ones((DRAWS, 1)) if len(pairs) == 1 else (
        generator.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), DRAWS)
    )  # fmt: skip
    means = ((of_seeds @ sums) * of_scenes).sum(1) / (of_seeds.sum(1) * (of_scenes @ counts))
    low, high = np.quantile(means, [0.025, 0.975])
    return mean, float(low), float(high)


def _difference(one: Made, other: Made, place: tuple[str, str]) -> float:
    first, second = one.pictures[place], other.pictures.get(place)
    if second is None or abs(first[INPUT]["psnr"] - second[INPUT]["psnr"]) > SAME:
        raise ValueError(
            f"{one.folder} and {other.folder}: scored different pictures ({place[0]}, {place[1]}): their differences "
            "would mean nothing; make one of them again"
        )
    return first["restored"]["psnr"] - second["restored"]["psnr"]


def write_report(path: Path, name: str, experiment: Experiment, made: Sequence[Made], wanted: int) -> None:
    """NAME.md, and NAME.png beside it. made: the finished runs of `wanted` ones."""
    arms = {arm: [each for each in made if each.trial.arm == arm and each.pictures] for arm in experiment.arms}
    arms = {arm: runs for arm, runs in arms.items() if runs}
    lines = [f"# {experiment.title}", "", f"`sharpprior experiment {name}`", "", experiment.about.strip(), ""]
    if len(made) < wanted:
        lines += [f"**Not finished: {len(made)} of {wanted} runs.** What follows is of those.", ""]
    if arms:
        best = trivial_of(made)
        lines += [*_verdicts(experiment, arms, best), ""]
        first = {name: [each for each in made if each.trial.arm == name] for name in experiment.first}
        lines += [
            "## Runs",
            "",
            *_cost_table(experiment, {name: runs for name, runs in first.items() if runs} | arms),
            "",
        ]
        lines += ["## Gain over the best trivial way, dB", "", *_gain_table(experiment, arms, best), ""]
        lines += ["## Against the reference, picture by picture, dB", "", *_paired_table(experiment, arms), ""]
        for metric in dict.fromkeys(["features", "blur", *experiment.also]):
            lines += [f"## {METRICS[metric].label}", "", *_metric_table(metric, arms), ""]
        draw(path.with_suffix(".png"), experiment, arms)
        lines += [f"![loss and validation over the steps]({path.stem}.png)", ""]
    lines += ["## The prior's similarity to the teacher of the sharp picture", "", *similarity_table(made), ""]
    lines += ["## Settings", "", *_settings(experiment, made), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(lines))


def _tiers(arms: Mapping[str, Sequence[Made]]) -> list[str]:
    there = {each["tier"] for runs in arms.values() for made in runs for each in made.pictures.values()}
    return [tier for tier in TIERS if tier in there] + sorted(there - set(TIERS))


def _gain_table(experiment: Experiment, arms: Mapping[str, Sequence[Made]], best: Mapping[str, str]) -> list[str]:
    tiers = _tiers(arms)
    lines = ["| arm | seeds | " + " | ".join(f"{tier} (best: {best[tier]})" for tier in tiers) + " |"]
    lines.append("|---|---:|" + "---:|" * len(tiers))
    for arm, runs in arms.items():
        cells = []
        for tier in tiers:
            gains = [float(np.mean(list(over_trivial(made, best, tier).values()))) for made in runs]
            cells.append(_spread(gains, sign="+"))
        lines.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    lines += ["", "Mean over the seeds ± their sample standard deviation. The best trivial way of a tier is the input"]
    return [*lines, "itself, the best Gaussian smoothing or unsharp masking, whichever has the highest mean."]


def _paired_table(experiment: Experiment, arms: Mapping[str, Sequence[Made]]) -> list[str]:
    reference, tiers = experiment.compared_with, _tiers(arms)
    if reference not in arms:
        return [f"The reference, {reference}, has no finished run yet."]
    ceiling = {tier: paired(arms[experiment.oracle], arms[reference], tier) for tier in tiers} if (
        experiment.oracle in arms
    ) else {}  # fmt: skip
    lines = [f"| arm − {reference} | " + " | ".join(tiers) + " |", "|---|" + "---:|" * len(tiers)]
    for arm, runs in arms.items():
        if arm == reference:
            continue
        cells = []
        for tier in tiers:
            found = paired(runs, arms[reference], tier)
            if found is None:
                cells.append("no common seed")
                continue
            text = f"{found[0]:+.3f} ({found[1]:+.3f} … {found[2]:+.3f})"
            top = ceiling.get(tier)
            if top is not None and arm != experiment.oracle and top[1] > 0:
                text += f", {found[0] / top[0]:.0%} of the oracle's"
            cells.append(text)
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "In brackets the 95 % bootstrap interval over photographs, and over seeds where there are several.",
    ]


def _metric_table(metric: str, arms: Mapping[str, Sequence[Made]]) -> list[str]:
    """A metric that the eye is nearer to than PSNR, or that was asked for: of the runs that were scored by it."""
    has = {arm: [made for made in runs if _measured(made, metric)] for arm, runs in arms.items()}
    lacking = sum(map(len, arms.values())) - sum(map(len, has.values()))
    has = {arm: runs for arm, runs in has.items() if runs}
    note = f"{METRICS[metric].note[0].upper()}{METRICS[metric].note[1:]}."
    if lacking:
        note += f" {lacking} of the runs were scored before it was asked for, and are not in the table."
    if not has:
        return [note]
    tiers, digits = _tiers(has), METRICS[metric].digits
    some = next(iter(has.values()))[0].pictures.values()
    before = [np.mean([each[INPUT][metric] for each in some if each["tier"] == tier]) for tier in tiers]
    lines = [f"| arm | {' | '.join(tiers)} |", "|---|" + "---:|" * len(tiers)]
    lines.append("| blurry input | " + " | ".join(f"{value:.{digits}f}" for value in before) + " |")
    for arm, runs in has.items():
        cells = []
        for tier in tiers:
            means = [
                float(np.mean([each["restored"][metric] for each in made.pictures.values() if each["tier"] == tier]))
                for made in runs
            ]
            cells.append(_spread(means, digits=digits))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return [*lines, "", note]


def _measured(made: Made, metric: str) -> bool:
    return all(metric in each["restored"] and metric in each[INPUT] for each in made.pictures.values())


def _verdicts(experiment: Experiment, arms: Mapping[str, Sequence[Made]], best: Mapping[str, str]) -> list[str]:
    """A sentence an arm, for the two hard tiers."""
    reference, lines = experiment.compared_with, []
    for arm, runs in arms.items():
        if arm == reference or reference not in arms:
            continue
        said = []
        for tier in ("severe", "extreme"):
            found = paired(runs, arms[reference], tier)
            if found is None:
                continue
            mean, low, high = found
            word = "better" if low > 0 else "WORSE" if high < 0 else "not to be told apart"
            said.append(f"{tier}: {word} ({mean:+.2f} dB)")
        if said:
            lines.append(f"* **{arm}** against {reference}: " + "; ".join(said) + ".")
    return lines


def _cost_table(experiment: Experiment, runs_of: Mapping[str, Sequence[Made]]) -> list[str]:
    lines = [
        "| runs | what they are | steps | pairs seen | a step, s | its CPU time, s | all steps, CPU h |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, runs in runs_of.items():
        config, says = runs[0].config, {**experiment.first, **experiment.arms}[name].says
        seen = sum((phase.last - phase.first) * phase.batch for phase in phases(config))
        cpu = statistics.median(made.seconds("cpu_s") for made in runs)
        lines.append(
            f"| {name} | {says} | {config.train.steps:,} | {seen:,} | "
            f"{statistics.median(made.seconds() for made in runs):.2f} | {cpu:.2f} | "
            f"{cpu * config.train.steps / 3600:.2f} |"
        )
    return [*lines, "", "Medians. The clock counts other work on the machine too, CPU time does not."]


def similarity_table(made: Sequence[Made]) -> list[str]:
    """Lines of Markdown: per arm and level the prior's similarity to the teacher of the sharp picture after the last
    step, and by how much it is above the untouched teacher's of the blurry one, mean ± sample standard deviation over
    the seeds."""
    measured: dict[str, list[dict]] = {}
    for each in made:
        last = next((record for record in reversed(each.records) if record.get("similarity")), None)
        if last is not None:
            measured.setdefault(each.trial.arm, []).append(last)
    if not measured:
        return ["Not measured in these runs."]
    levels = range(max(len(last["similarity"]) for runs in measured.values() for last in runs))
    lines = ["| arm | seeds | " + " | ".join(f"level {n + 1}, stride {4 * 2**n}" for n in levels) + " |"]
    lines.append("|---|---:|" + "---:|" * len(levels))
    for arm, runs in measured.items():
        cells = []
        for level in levels:
            prior, blurry = ([run[name][level] for run in runs] for name in ("similarity", "blurry_similarity"))
            above = [a - b for a, b in zip(prior, blurry, strict=True)]
            cells.append(f"{_spread(prior)} ({_spread(above, sign='+')})")
        lines.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    some = next(iter(measured.values()))
    blurry = [_spread([run["blurry_similarity"][level] for run in some]) for level in levels]
    lines.append(f"| teacher on the blurry picture | {len(some)} | " + " | ".join(blurry) + " |")
    lines += [
        "",
        "Mean cosine of standardised features ± sample standard deviation over the seeds; in brackets how far it",
    ]
    return [*lines, "is above the untouched teacher's of the blurry picture."]


def _spread(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def _settings(experiment: Experiment, made: Sequence[Made]) -> list[str]:
    lines = [f"Configuration {experiment.config}, in all runs:", ""]
    lines += [f"* `{key}: {value}`" for key, value in experiment.set.items()]
    for name, arm in (*experiment.first.items(), *experiment.arms.items()):
        own = ", ".join(f"`{key}: {value}`" for key, value in arm.set.items()) or "nothing else"
        taken = f"the prior of {arm.prior}, frozen; " if arm.prior else ""
        lines.append(f"* **{name}**: {taken}{own}")
    data = dict.fromkeys(
        Path(source.path).name for each in made for source in each.config.data.train or () if source.path
    )
    return [*lines, "", f"Training sets: {', '.join(data) or 'the bundled photographs'}."]


def draw(path: Path, experiment: Experiment, arms: Mapping[str, Sequence[Made]]) -> None:
    """Running median of the loss, and validation PSNR of the hard tiers, over the steps: a line an arm, of its first
    seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for arm, runs in arms.items():
        made = runs[0]
        steps, losses = zip(*((record["step"], record["loss"]) for record in made.steps), strict=True)
        half = max(1, len(losses) // 40)
        smooth = [statistics.median(losses[max(0, n - half) : n + half + 1]) for n in range(len(losses))]
        axes[0].plot(steps, smooth, label=arm)
        for place, tier in ((1, "severe"), (2, "extreme")):
            points = [
                (record["step"], row["restored_psnr"])
                for record in made.records
                for row in record.get("tiers", ())
                if row["tier"] == tier
            ]
            if points:
                axes[place].plot(*zip(*points, strict=True), marker="o", markersize=3, label=arm)
    for place, label in enumerate(("loss, running median", "restored PSNR, severe, dB", "restored PSNR, extreme, dB")):
        axes[place].set(xlabel="step", ylabel=label)
        axes[place].grid(color="0.92")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(handles)), frameon=False)
    figure.savefig(path, dpi=110)
