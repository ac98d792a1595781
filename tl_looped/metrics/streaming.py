"""All metrics of a run while it runs, for hundreds of recurrences and prompts.

Nothing is cached: readers look at each activation as it comes by, and hold one recurrence of states
and patterns, and the reference one. Where a metric compares with the last recurrence, there are two
ways to come by it:

- ``states="recompute"``: a first run keeps only the last recurrence, a second one compares. Twice
  the compute, no disk. Both runs take the same kernels, so that the last recurrence of the second
  is the reference bit for bit where the device is deterministic.
- ``states="disk"``: one run puts the core's states into a temporary file, to be read again.

Numbers are those of ``from_cache``: prompts of one length form a batch, or are padded to one under
a mask, and a random initial state depends on the seed and the position alone. A run begins at the
prompt and ends before the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from tl_looped.checks import Seed, at_most_one, checked, one_of, whole
from tl_looped.errors import InputError
from tl_looped.metrics.catalogue import DEFAULT_METRICS, Reads, select
from tl_looped.metrics.collector import STATE_OUT, Collector, SeenAt
from tl_looped.metrics.labels import Arrangement, by_recurrence, labelled, run_attributes
from tl_looped.metrics.spill import Spill
from tl_looped.model.config import InitialState
from tl_looped.progress import Progress, advancing
from tl_looped.transformer import LoopedTransformer

Keeping = Literal["recompute", "disk"]
Batching = Literal["length", "padded"]
Look = Callable[[SeenAt, Reads, Tensor], None]

_HOOKS: dict[Reads, str] = {"resid_post": "hook_resid_post", "pattern": "attn.hook_pattern"}


@checked
@dataclass(frozen=True)
class StreamOptions:
    """How prompts are run.

    Args:
        n_recurrences: Recurrences; the model's present number if None.
        reference_recurrences: Take the fixed points from a run of so many recurrences instead, for
            instance twice as many; needs ``states="recompute"``.
        batch_size: Prompts a batch.
        batching: ``"length"``: only prompts of one length share a batch. ``"padded"``: neighbours
            in length do, padded under a mask.
        states: See the module.
        folder: Where the temporary file of ``states="disk"`` is made.
        state_seed: Seed of random initial states; the model's if None.
        initial_state: ``"zeros"`` in place of the model's own; needs no seed then.
        skip_first: Tokens at the beginning of every prompt that metrics of states leave out of
            their means; see ``tl_looped.metrics.inputs``.
    """

    n_recurrences: int | None = None
    reference_recurrences: int | None = None
    batch_size: int = 8
    batching: Batching | str = "length"
    states: Keeping | str = "recompute"
    folder: Path | None = None
    state_seed: Seed | None = None
    initial_state: str | None = None
    skip_first: int = 0

    def __post_init__(self) -> None:
        one_of(self.states, "states", get_args(Keeping))
        one_of(self.batching, "batching", get_args(Batching))
        whole(self.batch_size, "batch_size", 1)
        at_most_one(initial_state=self.initial_state, state_seed=self.state_seed)
        if self.reference_recurrences is not None and self.states == "disk":
            raise InputError("reference_recurrences is a run of its own: it needs states=recompute")


@checked
def stream(
    model: LoopedTransformer,
    prompts: Any,
    metrics: str | Iterable[str] = DEFAULT_METRICS,
    by: Arrangement | str = "recurrence",
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    progress: Progress | bool = False,
    **options: Any,
) -> xr.Dataset:
    """Metrics of many prompts, labelled as by ``from_cache``.

    Args:
        model: The model; its hooks, if any, act as in every run.
        prompts: As :meth:`LoopedTransformer.token_rows` takes them: texts, tokens, sequences of any
            lengths.
        metrics: Names and groups, see ``tl_looped.metrics.catalogue``.
        by: ``"recurrence"`` or ``"depth"``, see ``tl_looped.metrics.labels``.
        attention_mask, prepend_bos: See :meth:`LoopedTransformer.token_rows`.
        progress: Show a bar over prompts, or tell a :class:`~tl_looped.progress.Progress`.
        **options: Fields of :class:`StreamOptions`: ``n_recurrences``, ``batch_size``, …

    Returns:
        One variable a metric; ``prompt`` counts the prompts in the order given.
    """
    rows = model.token_rows(prompts, attention_mask, prepend_bos)
    one_of(by, "by", get_args(Arrangement))
    batches = []
    with advancing(progress, len(rows), "prompt") as advance:
        for batch in stream_batches(model, rows, metrics, StreamOptions(**options)):
            batches.append(batch)
            advance(batch.sizes["prompt"])
    data = join_batches(batches)
    return by_recurrence(data) if by == "recurrence" else data


@checked
def stream_batches(
    model: LoopedTransformer,
    rows: list[Tensor],
    metrics: str | Iterable[str] = DEFAULT_METRICS,
    options: StreamOptions | None = None,
) -> Iterator[xr.Dataset]:
    """The results by depth, batch by batch, for callers that save each one.

    Args:
        model: The model.
        rows: Tokens of every prompt, from :meth:`LoopedTransformer.token_rows`.
        metrics: As in :func:`stream`.
        options: How to run.

    Yields:
        Results whose ``prompt`` counts within ``rows``.
    """
    options = options or StreamOptions()
    names = select(metrics)
    by_row = [change for change in model.interventions if change.across_rows]
    if by_row:
        raise InputError(
            f"{by_row} depend on which row of a batch a prompt is, and prompts are batched here by "
            "length: run_with_cache and from_cache keep the rows that you give"
        )
    for numbers in batches_of([len(row) for row in rows], options):
        yield _run_batch(model, rows, numbers, names, options)


@checked
def join_batches(batches: list[xr.Dataset]) -> xr.Dataset:
    """The results of :func:`stream_batches` as one, in the order of the prompts.

    Where there are numbers for each token, shorter prompts have NaN behind their last one.
    """
    if not batches:
        raise InputError("batches holds no result")
    data = xr.concat(batches, "prompt", data_vars="minimal", coords="minimal", join="outer")
    return data.sortby("prompt")


def batches_of(lengths: list[int], options: StreamOptions) -> list[list[int]]:
    """Numbers of the prompts of every batch, shortest prompts first."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        last = batches[-1] if batches else []
        fits = 0 < len(last) < options.batch_size
        if fits and options.batching == "length":
            fits = lengths[last[0]] == lengths[number]
        if fits:
            last.append(number)
        else:
            batches.append([number])
    return batches


@torch.inference_mode()
def _run_batch(
    model: LoopedTransformer,
    rows: list[Tensor],
    numbers: list[int],
    names: list[str],
    options: StreamOptions,
) -> xr.Dataset:
    """Metrics of one batch, by depth."""
    tokens, mask = _padded([rows[n] for n in numbers])
    with model.turn, model.with_recurrences(options.n_recurrences):
        collector = Collector(model.loop, names, mask, options.skip_first)
        if options.states == "disk" and collector.needs_reference:
            _through_the_disk(model, tokens, collector, options)
        else:
            if collector.needs_reference:
                _keep_references(model, tokens, collector, options)
            see = partial(collector.see, compare=True)
            with _watching(model, collector.reads, see):
                _forward(model, tokens, mask, options)
        random = model.cfg.initial_state is InitialState.RANDOM and options.initial_state is None
        seed = model.state_seed if options.state_seed is None else options.state_seed
        attributes = run_attributes(model, model.loop, seed if random else None)
        if options.initial_state is not None:
            attributes["initial_state"] = options.initial_state
        if options.reference_recurrences is not None:
            attributes["reference_recurrences"] = options.reference_recurrences
        n_tokens = torch.tensor([len(rows[n]) for n in numbers])
        data = labelled(collector, n_tokens, model.cfg.d_model, attributes)
    return data.assign_coords(prompt=numbers)


def _padded(
    rows: list[Tensor],
) -> tuple[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"] | None]:
    """Rows padded on the right, and their mask if any is shorter."""
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if all(len(row) == tokens.shape[1] for row in rows):
        return tokens, None
    n = torch.tensor([len(row) for row in rows], device=tokens.device)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device)[None] < n[:, None]


def _forward(
    model: LoopedTransformer, tokens: Tensor, mask: Tensor | None, options: StreamOptions
) -> None:
    """Run all layers, without logits where a coda ends the run."""
    # An unpadded batch gets a full mask, so that no pad token in a text is taken for padding.
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    random = options.initial_state is None
    model(
        tokens,
        attention_mask=mask,
        return_type=None,
        stop_at_layer=model.loop.n_layers if model.loop.c else None,
        state_seed=options.state_seed if random else None,
        initial_state=options.initial_state,
    )


def _watching(
    model: LoopedTransformer, reads: set[Reads], look: Look
) -> AbstractContextManager[None]:
    """Call ``look`` with every activation that is read, in the order of the forward pass."""
    loop = model.loop

    def reader(site: SeenAt, name: Reads) -> Callable[[Tensor, Any], None]:
        return lambda x, hook: look(site, name, x)

    readers: list[tuple[str, Callable[[Tensor, Any], None]]] = [
        (f"blocks.{i}.{_HOOKS[name]}", reader(SeenAt.of_layer(loop, i), name))
        for i in range(loop.n_layers)
        for name in sorted(reads)
    ]
    if model.cfg.loop_norm and "resid_post" in reads:
        readers += [
            (f"recurrence.{r}.hook_state_out", reader(SeenAt(r, STATE_OUT, r), "resid_post"))
            for r in range(loop.R)
        ]
    return model.readers(readers) if readers else nullcontext()


def _keep_references(
    model: LoopedTransformer, tokens: Tensor, collector: Collector, options: StreamOptions
) -> None:
    """A first run, of which only the last recurrence stays."""
    needed = collector.needs_reference
    with model.with_recurrences(options.reference_recurrences):
        last = model.loop.R - 1

        def look(site: SeenAt, reads: Reads, x: Tensor) -> None:
            if site.recurrence == last and site.slot is not None and reads in needed:
                collector.refer(site.slot, reads, x)

        # All that the second run reads is watched, so that both take the same kernels.
        with _watching(model, collector.reads, look):
            _forward(model, tokens, collector.mask, options)


def _through_the_disk(
    model: LoopedTransformer, tokens: Tensor, collector: Collector, options: StreamOptions
) -> None:
    """One run; what is to be compared goes to the disk and comes back."""
    needed, last = collector.needs_reference, model.loop.R - 1
    kept: list[tuple[SeenAt, Reads]] = []
    with Spill(options.folder) as spill:

        def look(site: SeenAt, reads: Reads, x: Tensor) -> None:
            collector.see(site, reads, x, compare=False)
            if site.slot is None or reads not in needed:
                return
            spill.put((site, reads), x)
            kept.append((site, reads))
            if site.recurrence == last:
                collector.refer(site.slot, reads, x)

        with _watching(model, collector.reads, look):
            _forward(model, tokens, collector.mask, options)
        for site, reads in kept:
            collector.compare(site, reads, spill.get((site, reads)))
