"""Running an experiment, so that it can be stopped at any time and loses at most one batch.

``OUT/RUN/parts/`` gets one file for each batch of prompts, written beside its place and renamed.
A call first looks at what is there: a run with results is not run again; one with parts goes on
with the prompts that no part has. At the end the parts become ``results.nc`` and are deleted.

Which prompts share a batch may change the last bits of a number, so it is decided once: the plan
(batch size) is written down before the first batch, and so is every reduction for want of memory.
A run that was stopped and went on therefore has the numbers of one that was not, bit for bit, on
the same machine with the same number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from filelock import FileLock, Timeout

from tl_looped.errors import DataError, InputError
from tl_looped.experiments import store
from tl_looped.experiments.engines import (
    MOST_SPECTRA,
    PAIRWISE,
    Engine,
    load_engine,
    tokenize,
)
from tl_looped.experiments.identity import run_hash
from tl_looped.experiments.joining import joined
from tl_looped.experiments.labelling import beside
from tl_looped.experiments.parallel import Workers
from tl_looped.experiments.prompts import Prompts, load_prompts
from tl_looped.experiments.reading import specification
from tl_looped.experiments.sources import Source, find_model
from tl_looped.experiments.spec import Experiment
from tl_looped.experiments.tables import write_tables
from tl_looped.files import make_folder, write_bytes
from tl_looped.metrics import StreamOptions
from tl_looped.metrics.streaming import batches_of
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.cache_size import free_bytes

LARGEST_BATCH = 32
_LARGEST_PATTERNS = 2**29
_LIMITING_WINDOW = 64


@dataclass(frozen=True)
class Watch:
    """What a run tells its caller.

    Args:
        start: Called once with the prompts that are to be run and those that parts hold already.
        advance: Called with the prompts of every finished batch.
        say: Called with notices: prompts left out, a smaller batch size, a file set aside.
    """

    start: Callable[[int, int], None] = lambda total, done: None
    advance: Callable[[int], None] = lambda n: None
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: Where its files are.
        is_new: Whether anything was computed for it in this call.
    """

    folder: Path
    is_new: bool

    def load(self) -> xr.Dataset:
        """Its results."""
        return store.read_dataset(self.folder / store.RESULTS)


def resolve(spec: Experiment, model: LoopedTransformer | None = None) -> tuple[Experiment, Source]:
    """The experiment with its number of recurrences, and its model, found but not loaded.

    Raises:
        InputError: if an extra needs more recurrences than there are.
    """
    source = find_model(spec, model)
    spec = replace(spec, recurrences=spec.recurrences or source.recurrences)
    n = spec.recurrences or 0
    if "limiting" in spec.extras and n <= _LIMITING_WINDOW:
        raise InputError(
            f"extras: limiting looks at {_LIMITING_WINDOW} recurrences before the last one, and "
            f"the run has {n}: set recurrences = {_LIMITING_WINDOW + 1} or more"
        )
    return spec, source


def run_folder(spec: Experiment, digest: str) -> str:
    """Name of a resolved run's folder: model, prompts, recurrences, beginning of the hash."""
    plain = (Path(spec.model).name, spec.prompts.label)
    model, prompts = ("".join(c if c.isalnum() or c in "-._" else "-" for c in t) for t in plain)
    return f"{model}_{prompts}_r{spec.recurrences}_{digest[:8]}"


def run_experiment(
    spec: Experiment,
    out: Path,
    *,
    model: LoopedTransformer | None = None,
    device: str | None = None,
    batch_size: int | str = "auto",
    watch: Watch | None = None,
) -> Run:
    """Run an experiment, or go on with it, or find that it was run.

    Args:
        spec: What to run.
        out: Folder of runs; this one gets a folder in it, see :func:`run_folder`.
        model: A model in memory in place of the one that ``spec.model`` names. Its hooks act as in
            every run, and are not part of the hash.
        device: Where to run; in a launch of several processes each one's own if None.
        batch_size: Prompts at a time, or ``"auto"``: what the free memory suggests, 32 at most,
            halved whenever memory runs out.
        watch: Gets progress and notices.

    Raises:
        DataError: no prompt, no room on the disk, no memory for the given batch size.
        InputError, ConfigError, CheckpointError: see the parts of the specification.
    """
    if batch_size != "auto" and (type(batch_size) is not int or batch_size < 1):
        raise InputError(f"batch_size must be 'auto' or an integer from 1 on, got {batch_size!r}")
    watch = watch or Watch()
    workers = Workers.here(device)
    prompts = load_prompts(spec.prompts)
    spec, source = resolve(spec, model)
    digest = run_hash(spec, prompts, source.identity)
    folder = out / run_folder(spec, digest)
    results = folder / store.RESULTS
    data, problem = store.read_if_usable(results)
    workers.wait()  # before the first process touches anything
    if data is not None:
        return _found(spec, folder, workers, data)
    lock = _lock(folder) if workers.first else None
    if workers.first:
        if problem:
            kept = store.set_aside(results)
            watch.say(f"{problem}. It is kept as {kept.name}; the run starts anew")
        write_bytes(spec.to_toml().encode(), folder / store.SPEC)
    engine = load_engine(spec, source, workers.device, model)
    job = _Job(spec, engine, prompts, folder, workers, watch)
    job.plan(batch_size)
    workers.wait()
    job.run()
    workers.wait()
    if workers.first:
        identity: dict[str, Any] = {"hash": digest, "model_identity": source.identity}
        if spec.kind == "looped" and source.folder is not None:
            identity["trained_recurrences"] = source.recurrences
        data = joined(spec, engine, prompts, job.parts(), job.rows, job.numbers, job.n_cut)
        data = data.assign_attrs(identity)
        store.write_dataset(data, results)
        write_tables(data, folder / "tables")
    _clean(folder, workers)
    if lock is not None:
        lock.release()
    workers.wait()
    return Run(folder, is_new=True)


def _found(spec: Experiment, folder: Path, workers: Workers, data: xr.Dataset) -> Run:
    """A run whose results are there; the model that reports compare it with is as asked for."""
    _clean(folder, workers)
    if workers.first:
        stored = specification(data)
        if stored and stored.get("feedforward") != spec.feedforward:
            stored.pop("feedforward", None)
            if spec.feedforward is not None:
                stored["feedforward"] = spec.feedforward
            text = json.dumps(stored, sort_keys=True, ensure_ascii=False)
            store.write_dataset(data.assign_attrs(spec=text), folder / store.RESULTS)
            write_bytes(Experiment.from_dict(stored).to_toml().encode(), folder / store.SPEC)
    workers.wait()
    return Run(folder, is_new=False)


def _lock(folder: Path) -> FileLock:
    """Held as long as this process works in the folder; it ends with the process, however it ends.

    Raises:
        DataError: if another process holds it.
    """
    lock = FileLock(make_folder(folder / store.PARTS) / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise DataError(
            f"another process is running this experiment in {folder}: wait for it and call again, "
            "or give another folder"
        ) from error
    return lock


def _clean(folder: Path, workers: Workers) -> None:
    if workers.first:
        shutil.rmtree(folder / store.PARTS, ignore_errors=True)


class _Job:
    """The batches of one run."""

    def __init__(
        self,
        spec: Experiment,
        engine: Engine,
        prompts: Prompts,
        folder: Path,
        workers: Workers,
        watch: Watch,
    ) -> None:
        self.spec, self.engine = spec, engine
        self.workers, self.watch = workers, watch
        self.folder = folder / store.PARTS
        self.rows, self.numbers, self.n_cut = tokenize(engine, prompts, spec.prompts.too_long)
        self._check_patterns()
        n_ctx = engine.model.cfg.n_ctx
        if n_left_out := len(prompts.texts) - len(self.rows):
            watch.say(
                f"{n_left_out} of {len(prompts.texts)} prompts are longer than the context of "
                f"{n_ctx} tokens and are left out"
            )
        if self.n_cut:
            watch.say(f"{self.n_cut} prompts were cut to the context of {n_ctx} tokens")

    def _check_patterns(self) -> None:
        """Whether the attention of the first prompt fits a result, before anything runs."""
        if "patterns" not in self.spec.extras:
            return
        cfg, length = self.engine.model.cfg, len(self.rows[0])
        layers = cfg.n_layers
        if self.spec.kind == "looped":
            layers = self.engine.model.loop.with_recurrences(self.spec.recurrences).n_layers
        size = 4 * layers * cfg.n_heads * length**2
        if size > _LARGEST_PATTERNS:
            raise InputError(
                f"extras: patterns of {layers} effective layers, {cfg.n_heads} heads and "
                f"{length} tokens would take {size / 2**30:.1f} GiB of the result, where "
                f"{_LARGEST_PATTERNS / 2**30:.1f} GiB is the most: take a shorter prompt or fewer "
                "recurrences"
            )

    # -- what is to be done -------------------------------------------------------------------

    def plan(self, batch_size: int | str) -> None:
        """Write down the batch size, unless an earlier call did."""
        path = self.folder / "plan.json"
        if self.workers.first and (batch_size != "auto" or not path.exists()):
            size = batch_size if batch_size != "auto" else self._suggested_size()
            write_bytes(json.dumps({"batch_size": size}).encode(), path)
        self.halves = batch_size == "auto"

    def _suggested_size(self) -> int:
        """A power of two whose largest activations take a quarter of the free memory."""
        cfg, longest = self.engine.model.cfg, max(map(len, self.rows))
        # Of a spread model, the fullest device; the metrics are computed on the embedding's.
        devices = {parameter.device for parameter in self.engine.model.parameters()}
        known = [n for n in map(free_bytes, devices) if n is not None]
        free = min(known, default=None)
        kept = max(1, getattr(cfg, "n_core", cfg.n_layers))
        # Two patterns and states of each core layer (the last, the reference), and working space.
        pattern, state = cfg.n_heads * longest**2, longest * (cfg.d_model + (cfg.d_mlp or 0))
        one = 4 * (2 * kept + 8) * (pattern + state)
        size = LARGEST_BATCH
        while free is not None and size > 1 and size * one > free / 4:
            size //= 2
        return size

    def _batches(self) -> list[list[int]]:
        """The batches of this process, less the prompts that are done."""
        size = json.loads((self.folder / "plan.json").read_text())["batch_size"]
        batching = self.spec.batching if self.spec.kind == "looped" else "length"
        options = StreamOptions(batch_size=size, batching=batching)
        planned = self.workers.mine(batches_of([len(row) for row in self.rows], options))
        done = {n for path in self._part_files() for n in self._prompts_of(path)}
        left = [[n for n in batch if n not in done] for batch in planned]
        n_planned, n_left = (sum(map(len, batches)) for batches in (planned, left))
        self.watch.start(n_planned, n_planned - n_left)
        return [batch for batch in left if batch]

    # -- doing it -----------------------------------------------------------------------------

    def run(self) -> None:
        """Run what is left, and save each batch."""
        note = self.folder / f"limit-{self.workers.rank}-of-{self.workers.world}.json"
        limit = json.loads(note.read_text()) if self.halves and note.exists() else None
        queue = self._batches()[::-1]
        while queue:
            batch = queue.pop()
            if limit is not None and len(batch) > limit:
                pieces = [batch[i : i + limit] for i in range(0, len(batch), limit)]
                queue += pieces[::-1]
                continue
            data = self._run_or_none(batch)
            if data is None:
                limit = self._smaller(batch)
                write_bytes(json.dumps(limit).encode(), note)
                queue.append(batch)
                continue
            self._save(data, batch)
            self.watch.advance(len(batch))

    def _run_or_none(self, batch: list[int]) -> xr.Dataset | None:
        """Results of a batch, or None if the memory does not hold it."""
        try:
            return self._run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except clause, whose traceback holds on to the tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _run(self, batch: list[int]) -> xr.Dataset:
        rows = [self.rows[n] for n in batch]
        data = self.engine.run(rows)
        data = data.assign_coords(prompt=[batch[int(n)] for n in data["prompt"]])
        if "spectrum" in self.spec.extras:
            numbers = data["prompt"].values.tolist()
            wanted = [self.rows[n] if n < MOST_SPECTRA else None for n in numbers]
            spectra = self.engine.spectrum(wanted)
            data = beside(data, spectra.assign_coords(prompt=data["prompt"]))
        if "pairwise" in self.spec.extras:
            found = [self.engine.pairwise(row) for row in rows]
            every = xr.concat([one[list(PAIRWISE)] for one in found], "prompt")
            for name in PAIRWISE:
                values = every[name]
                # Without coordinates, which would outlive the matrices when parts are joined.
                data[name + "_sum"] = values.sum("prompt").variable
                data[name + "_count"] = values.notnull().sum("prompt").variable
        return data

    def _smaller(self, batch: list[int]) -> int:
        longest = max(len(self.rows[n]) for n in batch)
        if len(batch) == 1:
            raise DataError(
                f"out of memory with a single prompt of {longest} tokens (prompt {batch[0]}): use "
                "a smaller dtype, fewer metrics or extras, another device, or shorter prompts"
            )
        if not self.halves:
            raise DataError(
                f"out of memory with {len(batch)} prompts of up to {longest} tokens: give a "
                "smaller batch size, or batch size 'auto', which halves by itself. Finished "
                "batches stay"
            )
        limit = len(batch) // 2
        self.watch.say(f"out of memory with {len(batch)} prompts at a time: going on with {limit}")
        return limit

    # -- parts --------------------------------------------------------------------------------

    def _save(self, data: xr.Dataset, batch: list[int]) -> None:
        name = hashlib.sha256(str(batch).encode()).hexdigest()[:12]
        store.write_part(data, self.folder / f"{batch[0]:06d}-{name}{store.PART_SUFFIX}")

    def _part_files(self) -> list[Path]:
        # By the first prompt of each, so that sums over parts have one order.
        return sorted(self.folder.glob("*" + store.PART_SUFFIX))

    def _prompts_of(self, path: Path) -> list[int]:
        """The prompts that a part holds; none, and the part is gone, if it cannot be read."""
        try:
            return [int(n) for n in store.read_part(path)["prompt"].values]
        except DataError as error:
            self.watch.say(f"{error}; its prompts are run again")
            path.unlink(missing_ok=True)
            return []

    def parts(self) -> list[xr.Dataset]:
        """All parts."""
        return [store.read_part(path) for path in self._part_files()]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text
