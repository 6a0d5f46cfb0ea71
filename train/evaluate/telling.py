"""What results say, in words and rows: the same for a terminal, for Markdown and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.blur import TIERS
from train.evaluate.scores import INPUT, TRIVIAL
from train.evaluate.summary import groups

Results = Mapping[str, Any]
FEW = 8  # scenes
HARM = -0.1  # dB on the identity tier that are worth a word
ORACLE = "oracle: reads the sharp picture; a bound, no method"
NAMES = {
    INPUT: "the blurry input",
    "gaussian": "Gaussian smoothing",
    "unsharp": "unsharp masking",
    "wiener": "Wiener (told the kernel)",
    "richardson_lucy": "Richardson–Lucy (told the kernel)",
}


def headline(results: Results) -> tuple[str, str]:
    """(one honest sentence about the gain over what needs no model, good | warning | bad)."""
    row, metric = results["tiers"][-1], results["headline"]["metric"]
    facts = results["metrics"][metric]
    value = f"{row['restored'][metric]:.{facts['digits']}f} dB {facts['label']}"
    over = gain(row, "over_trivial")
    if row["over_low"] is None:
        said, mood = "of one scene alone there is no interval, so nothing is shown by it", "warning"
    elif row["over_low"] > 0:
        said, mood = "the interval lies above 0", "good"
    elif row["over_high"] < 0:
        said, mood = "WORSE than what needs no model", "bad"
    else:
        said, mood = "not to be told from what needs no model", "warning"
    if results["model"].get("oracle"):
        said, mood = f"{said}; of an {ORACLE}", "warning"
    text = (
        f"{results['data']['set']}, {group(row)} ({count(row['pictures'], 'picture')} of "
        f"{count(row['scenes'], 'scene')}): {value}, {over} over the best trivial "
        f"({NAMES.get(row['trivial'], row['trivial'])}; {said}), {gain(row, 'gain')} over the blurry input."
    )
    return text[0].upper() + text[1:], mood


def warnings(results: Results) -> list[str]:
    """What a reader must know before a number is used: what is missing, drawn, tiled, or not aligned."""
    data, pictures, failed = results["data"], results["pictures"], results["failed"]
    lines = []
    if failed:
        lines.append(
            f"INCOMPLETE: {len(failed)} of {len(pictures) + len(failed)} pictures could not be evaluated and are in no "
            f"mean; first {failed[0]['key']}: {failed[0]['why']}"
        )
    if results["model"].get("oracle"):
        lines.append(f"{ORACLE[0].upper()}{ORACLE[1:]}.")
    if data["pairs"] < data["of"]:
        lines.append(f"A part of the set: {data['pairs']} of {data['of']} pairs, drawn over the scenes by hash.")
    if data["released"] and data["of"] != data["released"]:
        lines.append(f"An incomplete copy of the set: {data['of']} pairs where {data['released']} were released.")
    tiled = sum(picture["tiles"] > 1 for picture in pictures)
    if tiled:
        number = "All pictures" if tiled == len(pictures) else f"{tiled} of {len(pictures)} pictures"
        lines.append(f"{number} were restored in tiles; published numbers are of whole pictures.")
    lines += unknown_scenes(data) + few_scenes(results["tiers"][-1]["scenes"])
    still = next((row for row in results["tiers"] if row["tier"] == "identity"), None)
    if still is not None and still["gain"] < HARM:
        lines.append(f"Pictures that are not blurred LOSE by it: {gain(still, 'gain')} on the identity tier.")
    lost = [name for picture in pictures for name in picture.get("not aligned", [])]
    if lost:
        lines.append(
            f"The alignment found no transform {count(len(lost), 'time')} ({lost.count('restored')} of restored "
            "pictures); those were measured as they are, scaled but not moved: the official script stops there."
        )
    return lines


def few_scenes(scenes: int) -> list[str]:
    """A line where intervals are of too few scenes to be believed to the letter."""
    if scenes >= FEW or scenes == 1:
        return []
    return [
        f"Few scenes ({scenes}): intervals from a bootstrap over fewer than {FEW} are too narrow; trust none that "
        "barely leaves 0."
    ]


def unknown_scenes(data: Mapping[str, Any]) -> list[str]:
    """A line where nothing says which pictures are of one video or place."""
    if not data.get("scenes unknown"):
        return []
    number = "all" if data["scenes unknown"] == data["pairs"] else data["scenes unknown"]
    return [
        f"Scenes are not known of {number} of {data['pairs']} pictures: each counts as a scene of its own, and where "
        "they share videos or places the intervals are too narrow."
    ]


def facts(results: Results) -> dict[str, str]:
    """What the numbers are of: model, training data, test data, settings."""
    model, data, settings = results["model"], results["data"], results["settings"]
    trained = model["training data"]
    tile = settings["tile"]
    return {
        "model": f"{model['name']} ({model['path']})",
        "network": f"{model['backbone']}{_prior(model)}, "
        f"{model['parameters'] / 1e6:.2f} M parameters, {model['macs at 256×256'] / 1e9:.2f} GMACs at 256×256",
        "training data": ", ".join(trained) if isinstance(trained, list) else trained,
        "training blur": str(model["training blur"]),
        "test data": f"{data['set']}, split {data['split']}",
        "blur variant": str(data["blur variant"]),
        "pictures": f"{len(results['pictures'])} of {data['of']} pairs, {count(data['scenes'], 'scene')}"
        + (f", {len(results['failed'])} failed" if results["failed"] else ""),
        "restored": f"{'whole pictures' if tile == 'whole' else f'tile: {tile}'}, {settings['precision']}"
        + (f", crops of {data['crop']} px" if data.get("crop") else ""),
        "alignment": settings["alignment"],
        "yardsticks": f"chosen on {settings['yardsticks']}",
        "device": results["device"],
        "code": results["versions"]["sharpprior"],
        "weights": model["digest"],
    }


def _prior(model: Mapping[str, Any]) -> str:
    if model.get("oracle"):
        return f" as an {ORACLE}"
    return " with the prior" if model["prior"] else ", no prior"


def gain_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the gains: a row a tier."""
    metric = results["headline"]["metric"]
    known = results["metrics"][metric]
    heads = ["tier", "pictures", f"input {known['label']}", f"restored {known['label']}", "gain over input, dB"]
    heads += ["gain over the best trivial, dB", "best trivial"]
    rows = []
    for row in results["tiers"]:
        values = [f"{row[of][metric]:.{known['digits']}f}" for of in ("input", "restored")]
        gains = [gain(row, name, unit=False) for name in ("gain", "over_trivial")]
        rows.append([group(row), str(row["pictures"]), *values, *gains, NAMES.get(row["trivial"], row["trivial"])])
    return heads, rows


def metric_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of every metric's means, input → restored: a row a tier."""
    heads = ["tier", *(f"{m['label']} {'↓' if m['better'] == 'lower' else '↑'}" for m in results["metrics"].values())]
    rows = []
    for row in results["tiers"]:
        cells = [
            f"{row['input'][name]:.{m['digits']}f}\u00a0→\u00a0{row['restored'][name]:.{m['digits']}f}"
            for name, m in results["metrics"].items()
        ]
        rows.append([group(row), *cells])
    return heads, rows


def yardstick_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the headline's metric of what needs no model, beside the restored pictures; rows are tiers."""
    metric = results["headline"]["metric"]
    digits = results["metrics"][metric]["digits"]
    columns = [name for name in TRIVIAL if name == INPUT or any(name in row["yardsticks"] for row in results["tiers"])]
    rows = []
    for row in results["tiers"]:
        values = {INPUT: row["input"], **row["yardsticks"]}
        cells = [f"{values[name][metric]:.{digits}f}" if name in values else "–" for name in columns]
        rows.append([group(row), *cells, f"{row['restored'][metric]:.{digits}f}"])
    return ["tier", *(NAMES.get(name, name) for name in columns), "restored"], rows


def bound_table(results: Results) -> tuple[list[str], list[list[str]]] | None:
    """(heads, rows) of deconvolution that is told the kernel, beside input and restored, on those pictures whose kernel
    is uniform and known; None where there are none."""
    metric = results["headline"]["metric"]
    digits = results["metrics"][metric]["digits"]
    names = [name for name in NAMES if name not in TRIVIAL]
    rows = []
    for tier, belongs in groups([each["tier"] for each in results["pictures"]]):
        some = [e for e in results["pictures"] if belongs(e["tier"]) and all(name in e["yardsticks"] for name in names)]
        if some:
            columns = [[each[INPUT] for each in some], *([each["yardsticks"][name] for each in some] for name in names)]
            columns.append([each["restored"] for each in some])
            cells = [f"{sum(each[metric] for each in column) / len(some):.{digits}f}" for column in columns]
            rows.append([tier, str(len(some)), *cells])
    return (["tier", "pictures", NAMES[INPUT], *(NAMES[name] for name in names), "restored"], rows) if rows else None


def similarity_rows(results: Results) -> tuple[list[str], list[list[str]]] | None:
    """(heads, rows) of the prior's likeness to its teacher, a row a level; None where it was not measured."""
    measured = [picture["teacher"] for picture in results["pictures"] if "teacher" in picture]
    if not measured:
        return None
    heads = ["level", "stride", "prior", "student alone", "teacher on the blurry image"]
    rows = []
    for level in range(len(measured[0]["similarity"])):
        cells = []
        for name in ("similarity", "student_similarity", "blurry_similarity"):
            values = [each[name][level] for each in measured if name in each]
            cells.append(f"{sum(values) / len(values):.3f}" if values else "other channels")
        rows.append([str(level + 1), str(4 * 2**level), *cells])
    return heads, rows


def lines(results: Results) -> list[str]:
    """The gains as plain lines for a terminal, then the headline and what to beware of."""
    metric = results["headline"]["metric"]
    known = results["metrics"][metric]
    width = max(len(group(row)) for row in results["tiers"])
    told = []
    for row in results["tiers"]:
        before, after = (f"{row[of][metric]:6.{known['digits']}f}" for of in ("input", "restored"))
        told.append(
            f"{group(row):{width}s}  {count(row['pictures'], 'picture'):>13s}  {before} → {after} dB  "
            f"gain {gain(row, 'gain')}  over the best trivial ({row['trivial']}) {gain(row, 'over_trivial')}"
        )
    means = ", ".join(
        f"{m['label']} {results['tiers'][-1]['restored'][name]:.{m['digits']}f}"
        for name, m in results["metrics"].items()
    )
    return [*told, f"{group(results['tiers'][-1])}: {means}", headline(results)[0], *warnings(results)]


def markdown(results: Results, *, title: str, panel: bool) -> str:
    """report.md."""
    parts = [f"# {title}", headline(results)[0], *(f"**{line}**" for line in warnings(results))]
    parts += [markdown_table(["", ""], list(facts(results).items()))]
    parts += ["## Gain", markdown_table(*gain_table(results)), explanation(results)]
    parts += ["## All metrics, input → restored", markdown_table(*metric_table(results)), notes(results)]
    parts += ["## What needs no model", markdown_table(*yardstick_table(results))]
    told = bound_table(results)
    if told is not None:
        parts += ["## What knows the kernel", markdown_table(*told), BOUND]
    rows = similarity_rows(results)
    if rows is not None:
        parts += ["## The prior's similarity to the teacher", markdown_table(*rows), SIMILARITY]
    if panel:
        parts.append("![blurry, restored, sharp](panel.png)")
    return "\n\n".join(parts) + "\n"


RECORDED = (
    "Of recorded pairs nobody knows the tier: smoothing and sharpening have what is best for the training pairs of the "
    "same bin of input PSNR (before any alignment), which needs the sharp picture and is known in evaluation alone."
)
BOUND = (
    "A bound and no rival: on the pictures whose blur is one kernel everywhere, deconvolution that is told it, as no "
    "restoration of a photograph is."
)
SIMILARITY = (
    "Mean cosine similarity of standardised features: the prior sees the blurry image, the teacher the sharp one. The "
    "last column is what the untouched teacher makes of the blurry image."
)


def explanation(results: Results) -> str:
    """How gains and intervals are to be read."""
    return (
        "Gains are means of paired differences. In brackets: 95 % bootstrap interval over scenes (videos, places or "
        "photographs), each drawn with all its pictures, because pictures of one scene resemble each other. The best "
        f"trivial is whichever of {', '.join(NAMES[name] for name in TRIVIAL)} has the highest mean in that row."
        + (f" {RECORDED}" if any(each["tier"] not in TIERS for each in results["pictures"]) else "")
    )


def notes(results: Results) -> str:
    """What each metric is, exactly."""
    return " ".join(f"{metric['label']}: {metric['note']}." for metric in results["metrics"].values())


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    body = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([body[0], "|---|" + ("---:|" if len(heads) > 2 else "---|") * (len(heads) - 1), *body[1:]])


def gain(row: Mapping[str, Any], name: str, *, unit: bool = True) -> str:
    """`+0.123 dB (+0.050 … +0.196)` of a row's gain or over_trivial."""
    low, high = (row["low"], row["high"]) if name == "gain" else (row["over_low"], row["over_high"])
    bounds = "one scene: no interval" if low is None else f"{low:+.3f} … {high:+.3f}"
    return f"{row[name]:+.3f}{' dB' if unit else ''} ({bounds})"


def group(row: Mapping[str, Any]) -> str:
    """A row's name."""
    return "all pictures" if row["tier"] == "all" else row["tier"]


def count(number: int, what: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
