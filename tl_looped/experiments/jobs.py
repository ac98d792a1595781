"""The batches of one run: planned once, run one by one, each saved as a part.

What the folder of parts holds is looked after by ``tl_looped.experiments.parts``.
"""

from __future__ import annotations

from pathlib import Path

import torch
import xarray as xr

from tl_looped.errors import DataError, InputError
from tl_looped.experiments.engines import MOST_SPECTRA, PAIRWISE, Engine, tokens_of_prompts
from tl_looped.experiments.labelling import merged
from tl_looped.experiments.parallel import Workers
from tl_looped.experiments.parts import BatchParts
from tl_looped.experiments.prompts import ChosenPrompts
from tl_looped.experiments.spec import Experiment
from tl_looped.experiments.stacking import bytes_of_matrices
from tl_looped.metrics import StreamOptions
from tl_looped.metrics.streaming import batches_of
from tl_looped.progress import Progress
from tl_looped.transformer.cache_size import free_bytes, readable

LARGEST_BATCH = 32
_LARGEST_PATTERNS = 2**29


class Job:
    """The batches of one run."""

    def __init__(
        self,
        spec: Experiment,
        engine: Engine,
        prompts: ChosenPrompts,
        folder: Path,
        workers: Workers,
        progress: Progress,
        digest: str,
    ) -> None:
        self.spec, self.engine = spec, engine
        self.workers, self.progress = workers, progress
        self.rows, self.numbers, self.n_cut = tokens_of_prompts(
            engine, prompts, spec.prompts.too_long
        )
        self.parts = BatchParts(folder, digest, len(self.rows))
        self._check_patterns()
        self._check_memory()
        n_ctx = engine.model.cfg.n_ctx
        if n_left_out := len(prompts.texts) - len(self.rows):
            progress.say(
                f"{n_left_out} of {len(prompts.texts)} prompts are longer than the context of "
                f"{n_ctx} tokens and are left out"
            )
        if self.n_cut:
            progress.say(f"{self.n_cut} prompts were cut to the context of {n_ctx} tokens")

    def _check_patterns(self) -> None:
        """Whether the attention of the first prompt fits a result, before anything runs."""
        if "patterns" not in self.spec.extras:
            return
        cfg, length, layers = self.engine.model.cfg, len(self.rows[0]), self._n_layers()
        size = 4 * layers * cfg.n_heads * length**2
        if size > _LARGEST_PATTERNS:
            raise InputError(
                f"extras: patterns of {layers} effective layers, {cfg.n_heads} heads and "
                f"{length} tokens would take {size / 2**30:.1f} GiB of the result, where "
                f"{_LARGEST_PATTERNS / 2**30:.1f} GiB is the most: take a shorter prompt or fewer "
                "recurrences"
            )

    def _n_layers(self) -> int:
        """Effective layers of the run."""
        if self.spec.kind == "looped":
            return int(self.engine.model.loop.with_recurrences(self.spec.recurrences).n_layers)
        return int(self.engine.model.cfg.n_layers)

    def _check_memory(self) -> None:
        """Whether the longest prompt can be run alone, as far as can be told before it runs."""
        cfg, longest = self.engine.model.cfg, max(map(len, self.rows))
        size = next(self.engine.model.parameters()).element_size()
        needed = 2 * size * cfg.n_heads * longest**2  # scores and pattern of one layer
        what = f"the attention of {longest} tokens"
        if "pairwise" in self.spec.extras:
            layers = self._n_layers()
            needed += bytes_of_matrices(layers, cfg.n_heads, cfg.d_model, longest, size)
            what += f" at {layers} effective layers, which pairwise compares,"
        free = self._free()
        if free is not None and needed > free:
            raise InputError(
                f"{what} takes {readable(needed)} of memory at least, and {readable(free)} are "
                "free: take shorter prompts or fewer recurrences, a smaller dtype, another device"
            )

    def _free(self) -> int | None:
        """Free memory: of a spread model, on the fullest device; None where it is not known."""
        devices = {parameter.device for parameter in self.engine.model.parameters()}
        known = [n for n in map(free_bytes, devices) if n is not None]
        return min(known, default=None)

    # -- what is to be done -------------------------------------------------------------------

    def plan(self, batch_size: int | str) -> None:
        """Write down the batch size, unless an earlier call did; first, what is there is checked.

        What is damaged, or of another run, is set aside and said.
        """
        if self.workers.first:
            self.parts.check(self.progress.say)
            if batch_size != "auto":
                self.parts.write_plan(int(batch_size))
            elif self.parts.planned is None:
                self.parts.write_plan(self._suggested_size())
        self.halves = batch_size == "auto"

    def _suggested_size(self) -> int:
        """A power of two whose largest activations take a quarter of the free memory."""
        cfg, longest = self.engine.model.cfg, max(map(len, self.rows))
        free = self._free()
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
        size = self.parts.plan()
        batching = self.spec.batching if self.spec.kind == "looped" else "length"
        options = StreamOptions(batch_size=size, batching=batching)
        planned = self.workers.mine(batches_of([len(row) for row in self.rows], options))
        done = self.parts.prompts()
        left = [[n for n in batch if n not in done] for batch in planned]
        n_planned, n_left = (sum(map(len, batches)) for batches in (planned, left))
        self.progress.start(n_planned, n_planned - n_left)
        return [batch for batch in left if batch]

    # -- doing it -----------------------------------------------------------------------------

    def run(self) -> None:
        """Run what is left, and save each batch."""
        name = f"{self.workers.rank}-of-{self.workers.world}"
        limit = self.parts.limit(name) if self.halves else None
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
                self.parts.write_limit(name, limit)
                queue.append(batch)
                continue
            self.parts.save(data, batch)
            self.progress.advance(len(batch))

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
            data = merged(data, spectra.assign_coords(prompt=data["prompt"]))
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
        self.progress.say(
            f"out of memory with {len(batch)} prompts at a time: going on with {limit}"
        )
        return limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text
