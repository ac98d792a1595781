"""Running an experiment, so that it can be stopped at any time and loses at most one batch.

``OUT/RUN/parts/`` gets one file for each batch of prompts, written beside its place and renamed.
A call first looks at what is there: a run with results is not run again; one with parts goes on
with the prompts that no part has. At the end the parts become tables and ``results.nc``, in this
order, and are deleted.

Whatever is read back is checked against the run's hash and its own checksum. What does not hold is
said and set aside, and the run goes on with the rest.

Which prompts share a batch may change the last bits of a number, so it is decided once: the plan
(batch size) is written down before the first batch, and so is every reduction for want of memory.
A run that was stopped and went on therefore has the numbers of one that was not, bit for bit, on
the same machine with the same number of processes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr

from tl_looped.checks import checked, whole
from tl_looped.errors import DataError, InputError
from tl_looped.experiments import store
from tl_looped.experiments.engines import load_engine
from tl_looped.experiments.identity import run_hash
from tl_looped.experiments.jobs import Job
from tl_looped.experiments.joining import joined
from tl_looped.experiments.locking import lock_folder
from tl_looped.experiments.parallel import Workers
from tl_looped.experiments.prompts import load_prompts
from tl_looped.experiments.reading import specification
from tl_looped.experiments.sources import FoundModel, find_model
from tl_looped.experiments.spec import Experiment
from tl_looped.experiments.tables import TABLES, table_files, write_run_tables
from tl_looped.files import write_bytes
from tl_looped.model.bos import bos_sentence
from tl_looped.progress import SILENT, Progress
from tl_looped.transformer import LoopedTransformer

_LIMITING_WINDOW = 64
_LONGEST_NAME, _CUT_NAME = 200, 80  # bytes; file systems take names of 255


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: Where its files are.
        is_new: Whether anything was computed for it in this call.
        digest: Its hash, which its results carry.
    """

    folder: Path
    is_new: bool
    digest: str

    def load(self) -> xr.Dataset:
        """Its results.

        Raises:
            DataError: if they are not there any more, damaged, or of another run.
        """
        data, problem = store.read_if_usable(self.folder / store.RESULTS, self.digest)
        if data is None:
            raise DataError(problem or f"there is no {self.folder / store.RESULTS} any more")
        return data


def resolve(
    spec: Experiment, model: LoopedTransformer | None = None
) -> tuple[Experiment, FoundModel]:
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


def _bos(spec: Experiment, source: FoundModel) -> tuple[bool, str] | None:
    """Whether the run's prompts begin with BOS, and who says so; None if only the model knows."""
    return source.bos if spec.prepend_bos is None else (spec.prepend_bos, "caller")


def run_folder(spec: Experiment, digest: str) -> str:
    """Name of a resolved run's folder: model, prompts, recurrences, beginning of the hash."""
    plain = (Path(spec.model).name, spec.prompts.label)
    names = ["".join(c if c.isalnum() or c in "-._" else "-" for c in t) for t in plain]
    ending = f"r{spec.recurrences}_{digest[:8]}"
    if len("_".join((*names, ending)).encode()) > _LONGEST_NAME:
        names = [t.encode()[:_CUT_NAME].decode(errors="ignore") for t in names]
    return "_".join((*names, ending))


@checked
def run_experiment(
    spec: Experiment,
    out: str | Path,
    *,
    model: LoopedTransformer | None = None,
    device: str | None = None,
    batch_size: int | str = "auto",
    progress: Progress = SILENT,
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
        progress: Told of prompts and notices.

    Raises:
        DataError: no prompt, no room on the disk, no memory for the given batch size.
        InputError, ConfigError, CheckpointError: see the parts of the specification.
    """
    if batch_size != "auto":
        batch_size = whole(batch_size, "batch_size", 1, fix="or give 'auto'")
    workers = Workers.here(device)
    prompts = load_prompts(spec.prompts)
    spec, source = resolve(spec, model)
    bos = _bos(spec, source)
    differs = bos is not None and bos[0] != source.bos_before
    said = bos[0] if bos and differs else None
    digest = run_hash(spec, prompts, source.identity, said, source.chat_template)
    folder = Path(out) / run_folder(spec, digest)
    results = folder / store.RESULTS
    data, problem = store.read_if_usable(results, digest)
    workers.wait()  # before the first process touches anything
    if data is not None:
        return _found(spec, folder, workers, data, progress)
    lock = lock_folder(folder / store.PARTS) if workers.first else None
    if workers.first:
        if problem:
            kept = store.set_aside(results)
            progress.say(f"{problem}. It is kept as {kept.name}; the run starts anew")
        write_bytes(spec.to_toml().encode(), folder / store.SPEC_FILE)
    engine = load_engine(spec, source, workers.device, model)
    job = Job(spec, engine, prompts, folder, workers, progress, digest)
    job.plan(batch_size)
    workers.wait()
    job.run()
    workers.wait()
    if workers.first:
        identity: dict[str, Any] = {"hash": digest, "model_identity": source.identity}
        if bos is not None:
            identity["prepend_bos"] = int(bos[0])
            identity["bos"] = bos_sentence(engine.model.tokenizer, *bos, source.adds_bos)
            if prompts.has_chats and spec.prepend_bos is None:
                identity["bos"] += "; conversations as their template writes them"
        parts = job.parts.read()
        data = joined(spec, engine, prompts, parts, job.rows, job.numbers, job.n_cut)
        data = data.assign_attrs(identity)
        # The results come last: a call that finds them need not ask whether the tables are whole.
        write_run_tables(data, folder / TABLES)
        store.write_dataset(data, results)
    _clean(folder, workers)
    if lock is not None:
        lock.release()
    workers.wait()
    return Run(folder, is_new=True, digest=digest)


def _found(
    spec: Experiment, folder: Path, workers: Workers, data: xr.Dataset, progress: Progress
) -> Run:
    """A run whose results are there; the model that reports compare it with is as asked for."""
    _clean(folder, workers)
    if workers.first:
        if not store.has_checksum(data):
            notice = store.no_checksum_notice(str(folder / store.RESULTS))
            progress.say(f"{notice}. Remove it to run the experiment again")
        stored = specification(data)
        if stored and stored.get("feedforward") != spec.feedforward:
            stored.pop("feedforward", None)
            if spec.feedforward is not None:
                stored["feedforward"] = spec.feedforward
            text = json.dumps(stored, sort_keys=True, ensure_ascii=False)
            store.write_dataset(data.assign_attrs(spec=text), folder / store.RESULTS)
            write_bytes(Experiment.from_dict(stored).to_toml().encode(), folder / store.SPEC_FILE)
        if not all(path.is_file() for path in table_files(data, folder / TABLES)):
            write_run_tables(data, folder / TABLES)
    workers.wait()
    return Run(folder, is_new=False, digest=str(data.attrs["hash"]))


def _clean(folder: Path, workers: Workers) -> None:
    if workers.first:
        shutil.rmtree(folder / store.PARTS, ignore_errors=True)
