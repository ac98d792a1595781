"""The batches of one run: planned once, run one by one, each saved as a part.

``PARTS/plan.json`` holds the batch size, ``limit-RANK-of-WORLD.json`` every reduction for want of
memory, the other files are the parts; see ``tl_looped.experiments.run`` for why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import xarray as xr

from tl_looped.errors import DataError, InputError
from tl_looped.experiments import store
from tl_looped.experiments.engines import MOST_SPECTRA, PAIRWISE, Engine, tokenize
from tl_looped.experiments.labelling import beside
from tl_looped.experiments.parallel import Workers
from tl_looped.experiments.prompts import Prompts
from tl_looped.experiments.spec import Experiment
from tl_looped.files import write_bytes
from tl_looped.metrics import StreamOptions
from tl_looped.metrics.streaming import batches_of
from tl_looped.transformer.cache_size import free_bytes

LARGEST_BATCH = 32
_LARGEST_PATTERNS = 2**29


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


class Job:
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
