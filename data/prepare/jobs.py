"""Turn a dataset or a folder of photographs into a shard set: parallel, resumable after a kill, always the same bytes.

The sources are cut into jobs by a rule that depends on them and the recipe alone; each job writes its shards
(atomically) and then a small record of them. A rerun takes over finished jobs and makes the others again; the index
comes last.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.errors import DataError
from data.files import files_below, write_atomically
from data.formats import is_junk
from data.prepare.layouts import (
    LAYOUTS,
    PairFiles,
    list_dataset,
    pairs_in_folders,
    pairs_of_list,
    with_own_keys,
)
from data.prepare.recipe import JobResult, Recipe, file_samples, window_samples
from data.prepare.windows import frame_sources
from data.shards.tar import INDEX
from data.shards.write import write_index, write_shard
from data.workers import init_worker, main_not_imported_again, worker_context

MANIFEST, RECORDS, LOCK = "manifest.json", ".records", ".lock"
BEGUN = "begun"


@dataclass
class Prepared:
    """What `prepare` did: folder, samples, shards, bytes; what was left out (junk: files that systems leave behind);
    jobs taken over from a killed run."""

    root: Path
    samples: int
    shards: int
    bytes: int
    small: list[str]
    refused: list[str]
    bad: list[str]
    reused_jobs: int
    junk: int = 0


# -- one job ----------------------------------------------------------------------------------------------------------
def _up_to(samples: Iterator[tuple[str, dict]], first: tuple[str, dict], limit: int) -> Iterator[tuple[str, dict]]:
    """`first` and what follows it until they hold `limit` bytes."""
    held, sample = 0, first
    while sample is not None:
        yield sample
        held += sum(map(len, sample[1].values()))
        sample = next(samples, None) if held < limit else None


def run_job(job: "Job") -> dict:
    """Write the job's shards, then its record, and return the record."""
    result = JobResult()

    def samples() -> Iterator[tuple[str, dict]]:
        make = file_samples if job.recipe.windows is None else window_samples
        for source in job.sources:
            yield from make(source, job.recipe, job.root, result)

    stream = samples()
    while (first := next(stream, None)) is not None:
        path = job.out / f"{job.name}_{len(result.shards):03d}.tar"
        result.shards.append(write_shard(path, _up_to(stream, first, job.recipe.shard_bytes)))
    record = {"digest": job.digest, **asdict(result)}
    write_atomically(job.record, json.dumps(record).encode())
    return record


@dataclass(frozen=True)
class Job:
    """Sources that one worker turns into shards `<name>_000.tar`, `<name>_001.tar`, …"""

    name: str
    sources: tuple
    recipe: Recipe
    root: Path
    out: Path
    digest: str

    @property
    def record(self) -> Path:
        """File that says the job is done."""
        return self.out / RECORDS / f"{self.name}.json"

    def done(self) -> dict | None:
        """The record of this very job if an earlier run finished it and its shards are still whole."""
        try:
            record = json.loads(self.record.read_bytes())
            whole = all((self.out / s["name"]).stat().st_size == s["bytes"] for s in record["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if whole and record["digest"] == self.digest else None


def _files_of(source: PairFiles | Path) -> tuple[Path, ...]:
    if isinstance(source, PairFiles):
        return source.files
    return tuple(sorted(p for p in source.iterdir() if p.is_file())) if source.is_dir() else (source,)


def _jobs(sources: Sequence, recipe: Recipe, root: Path, out: Path, prefix: str) -> list[Job]:
    """Cut the sources, in order, into jobs: 64 or so, of 8 MiB to `shard_bytes` of source files each.

    The cut depends on the sources alone, so that any number of workers writes the same shards.
    """
    jobs: list[Job] = []
    held: list = []
    size, facts = 0, []
    total = sum(path.stat().st_size for source in sources for path in _files_of(source))
    job_bytes = min(recipe.shard_bytes, max(8 << 20, total // 64))

    def finish() -> None:
        nonlocal held, size, facts
        text = json.dumps([asdict(recipe), facts], sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        jobs.append(Job(f"{prefix}_{len(jobs):05d}", tuple(held), recipe, root, out, digest))
        held, size, facts = [], 0, []

    for source in sources:
        held.append(source)
        for path in _files_of(source):
            status = path.stat()
            size += status.st_size
            facts.append([str(path.relative_to(root)), status.st_size, status.st_mtime_ns])
        if size >= job_bytes:
            finish()
    if held:
        finish()
    return jobs


def _run_all(jobs: list[Job], workers: int, done: Callable[[Job, dict], None]) -> None:
    if workers == 1 or len(jobs) <= 1:
        for job in jobs:
            done(job, run_job(job))
        return
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=worker_context(), initializer=init_worker)
    try:
        with main_not_imported_again():
            waiting = {pool.submit(run_job, job): job for job in jobs}
        for future in as_completed(waiting):
            done(waiting[future], future.result())
    except BrokenProcessPool:
        raise DataError("a worker was killed (out of memory?); run the same command again with fewer workers") from None
    except BaseException:
        # Not asked to stop but killed: shards are written atomically, and a lock shared with them could be left held.
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# -- the whole set ----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[None]:
    try:
        lock = os.open(out / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise DataError(f"{out}: another `sharpprior prepare` is writing here; wait for it") from None
    try:
        yield
    finally:
        os.close(lock)  # the file stays: unlinking it would let two others in, one with each file


def _clear(out: Path, prefix: str, keep: Iterable[str]) -> None:
    """Remove shards and leftovers of this prefix that are not in `keep`; nothing else in the folder is touched."""
    kept = set(keep)
    for path in out.iterdir():
        ours = re.fullmatch(re.escape(prefix) + r"_\d{5}_\d{3}\.tar(\.\d+\.tmp)?", path.name)
        if ours and path.name not in kept:
            path.unlink()


def prepare(
    sources: Sequence[PairFiles] | Sequence[Path],
    root: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    prefix: str = "shard",
    info: dict | None = None,
    workers: int = 1,
    max_bad_fraction: float = 0.0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Write `sources` (files below `root`) as a shard set into `out`; see Recipe. Returns what was done.

    The shards depend on sources and recipe alone, not on workers or interruptions: after a kill, the same command goes
    on and gives the same bytes. `progress(sources done, all)`. Raises DataError for bad sources above
    `max_bad_fraction` (naming the first), for a folder that holds another set (unless `overwrite`), and for one that
    cannot be written.
    """
    recipe, root, out = recipe or Recipe(), Path(root), Path(out)
    if workers < 1 or not re.fullmatch(r"[0-9a-z_]{1,40}", prefix):
        raise DataError(
            f"workers {workers}, prefix {prefix!r}: 1 or more workers, a prefix of 1 to 40 of 0-9, a-z and _"
        )
    if not sources:
        raise DataError(f"{root}: nothing to prepare")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); choose another folder") from None
    with _only_one(out):
        jobs = _jobs(sources, recipe, root, out, prefix)
        identity = hashlib.blake2b("".join(job.digest for job in jobs).encode(), digest_size=16).hexdigest()
        # Where from and how, but not which bytes: a source may be mended between two tries.
        undertaking = json.dumps([str(root.resolve()), prefix, asdict(recipe)], sort_keys=True)
        _check_target(out, identity, undertaking, overwrite)
        if overwrite and _identity_in(out / RECORDS / BEGUN) != undertaking:
            shutil.rmtree(out / RECORDS, ignore_errors=True)
        (out / RECORDS).mkdir(exist_ok=True)
        write_atomically(out / RECORDS / BEGUN, json.dumps({"identity": undertaking}).encode())
        records = {job.name: record for job in jobs if (record := job.done())}
        reused = len(records)
        _clear(out, prefix, (shard["name"] for record in records.values() for shard in record["shards"]))
        total, finished = len(sources), sum(len(job.sources) for job in jobs if job.name in records)

        def done(job: Job, record: dict) -> None:
            nonlocal finished
            records[job.name] = record
            finished += len(job.sources)
            if progress:
                progress(finished, total)

        try:
            _run_all([job for job in jobs if job.name not in records], workers, done)
        except OSError as error:
            raise DataError(f"{out}: {error.strerror or error}; free space, then run the same command again") from None
        merged = _merge([records[job.name] for job in jobs])
        if len(merged.bad) > max_bad_fraction * total:
            raise DataError(
                f"{len(merged.bad)} of {total} sources are bad, more than max_bad_fraction {max_bad_fraction} allows: "
                f"{merged.bad[0]}{' …' if len(merged.bad) > 1 else ''}",
                details=merged.bad if len(merged.bad) > 1 else (),
            )
        if not merged.shards:
            reason = f"{len(merged.small)} smaller than min_size {recipe.min_size}, {len(merged.refused)} refused"
            raise DataError(f"{root}: no samples were made of {total} sources ({reason})", details=merged.refused)
        manifest = {**(info or {}), "identity": identity, "recipe": asdict(recipe), **asdict(merged)}
        del manifest["shards"]
        write_atomically(out / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
        write_index(out, merged.shards, info)
        shutil.rmtree(out / RECORDS)
    samples = sum(len(shard["keys"]) for shard in merged.shards)
    size = sum(shard["bytes"] for shard in merged.shards)
    return Prepared(out, samples, len(merged.shards), size, merged.small, merged.refused, merged.bad, reused)


def _check_target(out: Path, identity: str, undertaking: str, overwrite: bool) -> None:
    """Refuse a folder that holds a finished set, unless it may be written over; remove its index and manifest then."""
    begun = _identity_in(out / RECORDS / BEGUN)
    if (out / RECORDS).exists() and begun != undertaking and not overwrite:
        raise DataError(
            f"{out}: holds an unfinished set of other sources or settings; finish that one, choose a new folder, or "
            "write over it with --overwrite"
        )
    if not (out / INDEX).exists() and not (out / MANIFEST).exists():
        return
    found = _identity_in(out / MANIFEST)
    if found is None:
        raise DataError(f"{out}: holds an index or manifest that prepare did not make; choose a new folder")
    if not overwrite and (out / INDEX).exists():
        if found == identity:
            raise DataError(
                f"{out}: holds this very set already; `sharpprior verify` proves it, --overwrite makes it anew"
            )
        raise DataError(f"{out}: holds another shard set; choose a new folder, or write over it with --overwrite")
    if not (out / INDEX).exists():  # killed between its last two writes
        if found != identity and not overwrite:
            raise DataError(f"{out}: holds an unfinished set; choose a new folder, or write over it with --overwrite")
        (out / MANIFEST).unlink()
        return
    try:
        old = [shard["name"] for shard in json.loads((out / INDEX).read_bytes())["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        old = []
    # The index goes first: a set without one is unfinished, one with a wrong index would be torn.
    (out / INDEX).unlink()
    for name in old:
        if re.fullmatch(r"[0-9a-z_]+_\d{5}_\d{3}\.tar", name):
            (out / name).unlink(missing_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)


def _identity_in(path: Path) -> str | None:
    """The identity of the sources and settings that prepare wrote into a file; None if it wrote none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(path.read_bytes())["identity"]
    return None


def _merge(records: Iterable[dict]) -> JobResult:
    merged = JobResult()
    for record in records:
        for name in asdict(merged):
            getattr(merged, name).extend(record[name])
    return merged


def _frames_folder(layout: str, root: Path, split: str | None, variant: str | None) -> Path:
    """Where the frames of a layout lie. DataError for a split or variant that it has not, and for blurred frames."""
    if variant is not None:
        raise DataError(f"variant {variant!r}: windows are made from sharp frames; leave it out")
    base = root
    if layout in LAYOUTS and LAYOUTS[layout].counts:
        splits = LAYOUTS[layout].splits
        chosen = split or splits[0]
        if chosen not in splits:
            raise DataError(f"{layout}: split {chosen!r}; one of {', '.join(splits)}")
        base = root / chosen
    elif split is not None:
        base = root / split
    if not base.exists():
        raise DataError(f"{base}: missing; give the folder of high-frame-rate sequences, such as GOPRO_Large_all")
    for name in ("blur", "blur_gamma", "sharp", "input", "target"):
        if base.is_dir() and next(base.rglob(name), None) is not None:
            raise DataError(
                f"{base}: has {name}/ folders, so its frames are pairs; windows need GOPRO_Large_all or such"
            )
    return base


def prepare_dataset(
    layout: str,
    root: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    split: str | None = None,
    variant: str | None = None,
    partial: bool = False,
    folders: tuple[str, str] | None = None,
    pairs_list: Path | None = None,
    **options,
) -> Prepared:
    """`prepare` a dataset as released (`LAYOUTS`), or a folder of photographs, pairs or frames.

    With `recipe.windows` set, `root` is read as frames instead: GOPRO_Large_all, a video, or a folder of either.
    For layout "pairs": folders, the names of its (blurry, sharp) folders; pairs_list, a file of lines `<sharp>
    <blurry>` with paths below `root`.
    """
    root, out = Path(root), Path(out)
    recipe = recipe or Recipe()
    junk = 0
    if root.is_dir():
        names = (str(path.relative_to(root)) for path in files_below(root) if out not in path.parents)
        junk = sum(map(is_junk, names))
    info = {"dataset": layout, "split": split or "", "variant": variant or ""}
    if layout != "video" and layout not in LAYOUTS:
        raise DataError(f"dataset {layout!r}: unknown; one of {', '.join(LAYOUTS)}, video")
    if layout == "video" and recipe.windows is None:
        raise DataError("video: windows of frames are what it makes; give their levels")
    if recipe.windows is not None:
        base = _frames_folder(layout, root, split, variant)
        sources: Sequence = frame_sources(base)
        base = base.parent if base.is_file() else base
        licence = LAYOUTS[layout].licence if layout in LAYOUTS else "the user's"
        return replace(prepare(sources, base, out, recipe, info={**info, "licence": licence}, **options), junk=junk)
    if (folders or pairs_list) and (layout != "pairs" or split or variant or (folders and pairs_list)):
        raise DataError("--blurry with --sharp, or --list: they say where `prepare pairs` finds its pairs, so give one")
    if pairs_list:
        sources = with_own_keys(pairs_of_list(Path(pairs_list), root))
    elif folders:
        sources = with_own_keys(pairs_in_folders(root, *folders, root=root))
    else:
        sources = list_dataset(layout, root, split=split, variant=variant, partial=partial)
    known = LAYOUTS[layout]
    info |= {"split": split or known.splits[0], "variant": variant or known.variants[0], "licence": known.licence}
    return replace(prepare(sources, root, out, recipe, info=info, **options), junk=junk)
