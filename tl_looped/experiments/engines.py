"""What runs the prompts: a looped model, or a feedforward one for comparison.

Both give the same kind of result, by depth; a feedforward model is a core that runs once.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from tl_looped.bridge.feedforward import load_feedforward
from tl_looped.errors import DataError, InputError, TokenizerError
from tl_looped.experiments.labelling import merged, neuron_variables, pattern_variables
from tl_looped.experiments.prompts import ChosenPrompts
from tl_looped.experiments.sources import FoundModel
from tl_looped.experiments.spec import Experiment
from tl_looped.experiments.stacking import Stacked, layer_hook
from tl_looped.files import is_folder
from tl_looped.interventions import AblateMLP
from tl_looped.metrics import (
    CONVERGENCE,
    StreamOptions,
    convergence_verdict,
    pca_trajectory,
    prediction_suppression,
    stream_batches,
)
from tl_looped.metrics.catalogue import Reads, reads_of, select
from tl_looped.metrics.collector import Collector, SeenAt
from tl_looped.metrics.labels import labelled, run_attributes
from tl_looped.metrics.spectrum import check_silent, loop_spectrum, without_spectrum
from tl_looped.model.config import parse_dtype
from tl_looped.model.geometry import LoopGeometry
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.spreading import PLANS
from tl_looped.transformer.text_length import checked_lengths, is_surely_longer
from tl_looped.transformer.tokenizing import written

MOST_SPECTRA = 32
"""Prompts that get a spectrum, the first ones of a run: each costs hundreds of recurrences."""

_LARGEST_SPILL = 2**30
PAIRWISE = ("pairwise_attention_distance", "pairwise_residual_cosine")
Row = Int[Tensor, " _"]  # of any length, each of its own


class Engine(ABC):
    """A model as the runner uses it."""

    model: Any
    spec: Experiment

    @abstractmethod
    def tokens(self, text: str, is_chat: bool = False) -> tuple[Row, bool]:
        """Tokens of a prompt, cut to the context, and whether they were.

        A chat template writes its own BOS, so ``is_chat`` adds none unless asked to.
        """

    @abstractmethod
    def run(self, rows: list[Row]) -> xr.Dataset:
        """Metrics by depth of one batch; ``prompt`` counts within ``rows``."""

    @abstractmethod
    def pairwise(self, row: Row) -> xr.Dataset:
        """The matrices over all pairs of layers, of one prompt."""

    @abstractmethod
    def spectrum(self, rows: Sequence[Row | None]) -> xr.Dataset:
        """Spectra of the loop's Jacobian over ``prompt``; NaN for None."""

    @abstractmethod
    def path(self, row: Row) -> dict[str, Any]:
        """Variables of the PCA of the last token's path."""

    @abstractmethod
    def patterns(self, row: Row) -> dict[str, Any]:
        """Variables of the attention of one prompt, and its tokens as text."""

    @abstractmethod
    def neurons(self) -> xr.Dataset:
        """Prediction and suppression fractions by unique layer."""


def wanted_metrics(spec: Experiment) -> list[str]:
    """The metrics of a specification and those that its extras are computed from."""
    names = select(spec.metrics)
    names += CONVERGENCE if {"convergence", "confirm"} & set(spec.extras) else ()
    names += ("token_cosine",) if {"tokens", "limiting"} & set(spec.extras) else ()
    return list(dict.fromkeys(names))


def load_engine(
    spec: Experiment, source: FoundModel, device: str | None, model: LoopedTransformer | None = None
) -> Engine:
    """Load the model of a resolved specification.

    Args:
        spec: The specification.
        source: Its model, found.
        device: Where to; one of accelerate's plans, such as ``"auto"``, spreads a looped model over
            all devices.
        model: A model in memory, which stays where it is.
    """
    dtype = parse_dtype(spec.dtype)
    spread = device in PLANS
    if spec.kind == "feedforward":
        assert source.folder is not None
        if spread:
            raise InputError(f"device={device!r} spreads looped models only: name one device")
        habit = None if source.bos is None else source.bos[0]
        bridge = load_feedforward(source.folder, device or "cpu", dtype)
        return FeedforwardEngine(bridge, spec, habit)
    if model is None:
        model = LoopedTransformer.from_pretrained(
            spec.model,
            device=None if spread else device,
            device_map=device if spread else None,
            dtype=dtype,
            revision=spec.revision,
        )
    elif model.cfg.dtype != dtype:
        raise InputError(
            f"dtype: the experiment says {spec.dtype}, the model that was given is in "
            f"{model.cfg.dtype}"
        )
    return LoopedEngine(model, spec)


def tokens_of_prompts(
    engine: Engine, prompts: ChosenPrompts, too_long: str
) -> tuple[list[Row], list[int], int]:
    """Tokens of the prompts that fit the context.

    Returns:
        The rows, the number of each among ``prompts``, and how many were cut.

    Raises:
        DataError: if none fits, or if one cannot be tokenized.
        TokenizerError: for a conversation, if there is no chat template, or it refuses it.
    """
    rows, numbers, n_cut = [], [], 0
    tokenizer, n_ctx, wanted = engine.model.tokenizer, engine.model.cfg.n_ctx, engine.spec.prompts
    for number, prompt in enumerate(prompts.texts):
        where = f"prompts: row {prompts.rows[number]} of {wanted.file or wanted.label}"
        try:
            text = (
                prompt if isinstance(prompt, str) else written(prompt, tokenizer, engine.spec.model)
            )
            if too_long == "skip" and is_surely_longer(tokenizer, text, n_ctx):
                continue
            row, cut = engine.tokens(text, is_chat=not isinstance(prompt, str))
        except InputError as error:
            raise DataError(f"{where}: {error}") from error
        except TokenizerError as error:
            raise TokenizerError(f"{where}: {error}") from error
        if cut and too_long == "skip":
            continue
        n_cut += cut
        rows.append(row)
        numbers.append(number)
    if not rows:
        raise DataError(
            f"prompts: all {len(prompts.texts)} are longer than the model's context of "
            f'{engine.model.cfg.n_ctx} tokens; too_long = "truncate" cuts them'
        )
    return rows, numbers, n_cut


class LoopedEngine(Engine):
    """A looped model, through ``tl_looped.metrics.stream_batches``."""

    model: LoopedTransformer

    def __init__(self, model: LoopedTransformer, spec: Experiment) -> None:
        self.model, self.spec = model, spec
        self.metrics = wanted_metrics(spec)
        self._ablations = [AblateMLP(name) for name in spec.ablate_mlp]
        for ablation in self._ablations:
            ablation.place(model)  # before anything runs
        if "spectrum" in spec.extras:
            check_silent(model)  # likewise

    @contextmanager
    def _running(self, n_recurrences: int | None) -> Iterator[None]:
        """The model with so many recurrences, and the ablations of the experiment."""
        with (
            self.model.turn,
            self.model.intervening(*self._ablations),
            self.model.with_recurrences(n_recurrences),
        ):
            yield

    def tokens(self, text: str, is_chat: bool = False) -> tuple[Row, bool]:
        """See :class:`Engine`."""
        bos = False if is_chat and self.spec.prepend_bos is None else self.spec.prepend_bos
        row = self.model.tokenize(text, bos, truncate=True)[0][0]
        if len(row) < self.model.cfg.n_ctx:
            return row, False
        try:
            return self.model.tokenize(text, bos)[0][0], False
        except InputError:  # the one thing that can be wrong with it now is its length
            return row, True

    @property
    def _start(self) -> dict[str, Any]:
        if self.spec.initial_state == "zeros":
            return {"initial_state": "zeros"}
        return {"state_seed": self.spec.state_seed}

    def run(self, rows: list[Row]) -> xr.Dataset:
        """See :class:`Engine`; the rows must be what may share a batch."""
        data = self._stream(rows, self.metrics, self.spec.recurrences)
        extras = set(self.spec.extras)
        if not {"convergence", "confirm"} & extras:
            return data
        longer = None
        if "confirm" in extras:
            assert self.spec.recurrences is not None  # resolved
            metrics = list(CONVERGENCE)
            if "pattern" in reads_of(self.metrics):
                metrics.append("sink_rate")  # patterns that are read take other kernels
            longer = self._stream(rows, metrics, 2 * self.spec.recurrences)
        return merged(data, convergence_verdict(data, longer, same_start=True))

    def _stream(
        self, rows: list[Row], metrics: Sequence[str], n_recurrences: int | None
    ) -> xr.Dataset:
        options = StreamOptions(
            n_recurrences=n_recurrences,
            reference_recurrences=self.spec.reference_recurrences,
            batch_size=len(rows),
            batching=self.spec.batching,
            skip_first=self.spec.skip_first or 0,
            **self._start,
        )
        with self._running(n_recurrences):
            if self._fits_on_disk(rows):
                try:
                    on_disk = replace(options, states="disk")
                    return next(stream_batches(self.model, rows, metrics, on_disk))
                except DataError:  # no room after all
                    pass
            return next(stream_batches(self.model, rows, metrics, options))

    def _fits_on_disk(self, rows: list[Row]) -> bool:
        """Whether a second run for the fixed points can be saved; the numbers are the same bits."""
        if self.spec.reference_recurrences is not None:
            return False
        cfg, loop, longest = self.model.cfg, self.model.loop, max(map(len, rows))
        a_layer = len(rows) * longest * (cfg.d_model + cfg.n_heads * longest)
        size = a_layer * self.model.cfg.dtype.itemsize * loop.k * loop.R
        if size > _LARGEST_SPILL:
            return False
        return shutil.disk_usage(tempfile.gettempdir()).free > 4 * size

    @torch.inference_mode()
    def _cache(self, row: Row, kept: tuple[str, ...], pos_slice: int | None = None) -> Any:
        """Cache of a run of one prompt, with the activations whose names end so."""
        with self._running(self.spec.recurrences):
            _, cache = self.model.run_with_cache(
                row[None],
                names_filter=lambda n: n.endswith(kept),
                pos_slice=pos_slice,
                attention_mask=torch.ones_like(row[None]),
                return_type=None,
                **self._start,
            )
        return cache

    @torch.inference_mode()
    def pairwise(self, row: Row) -> xr.Dataset:
        """See :class:`Engine`."""
        with self._running(self.spec.recurrences):
            kept = Stacked(self.model.loop.n_layers)
            with self.model.readers(kept.hooks()):
                self.model(
                    row[None],
                    attention_mask=torch.ones_like(row[None]),
                    return_type=None,
                    **self._start,
                )
        return kept.matrices()

    def spectrum(self, rows: Sequence[Row | None]) -> xr.Dataset:
        """See :class:`Engine`; the state is the loop map's own, with the ablations of the run."""
        found = [
            without_spectrum(1)
            if row is None
            else loop_spectrum(
                self.model,
                row[None],
                n_recurrences=self.spec.recurrences,
                without_mlp=self.spec.ablate_mlp,
                **self._start,
            )
            for row in rows
        ]
        data = xr.concat(found, "prompt", combine_attrs="identical")
        return data.assign_attrs(spectrum_most_prompts=MOST_SPECTRA)

    def patterns(self, row: Row) -> dict[str, Any]:
        """See :class:`Engine`."""
        cache = self._cache(row, ("attn.hook_pattern",))
        every = cache.stack_activation("pattern")[:, 0]
        return pattern_variables(every, cast(list[str], self.model.to_str_tokens(row)))

    def path(self, row: Row) -> dict[str, Any]:
        """See :class:`Engine`."""
        cache = self._cache(row, ("hook_resid_post",), pos_slice=-1)
        states = cache.stack_recurrences("resid_post")
        points = states.reshape(*states.shape[:2], states.shape[-1])
        n = min(3, points.shape[0] * points.shape[1], points.shape[-1])
        found = pca_trajectory(points, n)
        return {
            "pca": (("recurrence", "layer", "component"), found.coordinates.cpu().numpy()),
            "pca_explained": ("component", found.explained_variance_ratio.cpu().numpy()),
        }

    def neurons(self) -> xr.Dataset:
        """See :class:`Engine`."""
        return neuron_variables(prediction_suppression(self.model))


class FeedforwardEngine(Engine):
    """A TransformerBridge, read layer by layer as it runs: a core that runs once.

    No pattern outlives its layer. The states of all layers are kept, for comparison with the last
    ones, which they are themselves.
    """

    def __init__(self, bridge: Any, spec: Experiment, habit: bool | None = None) -> None:
        self.model, self.spec, self._habit = bridge, spec, habit
        self.metrics = wanted_metrics(spec)

    def tokens(self, text: str, is_chat: bool = False) -> tuple[Row, bool]:
        """See :class:`Engine`; BOS as its looped sisters have it, which TransformerLens ignores."""
        (text,) = checked_lengths(self.model.tokenizer, [text], None)
        bos = self.spec.prepend_bos
        if bos is None:
            bos = False if is_chat else self._habit
        row = self.model.to_tokens(text, prepend_bos=bos, truncate=False)[0]
        bos = self.model.tokenizer.bos_token_id
        if bos is not None and row[:2].tolist() == [bos, bos]:
            row = row[1:]  # the text begins with one itself
        n = self.model.cfg.n_ctx
        return row[:n], len(row) > n

    def run(self, rows: list[Row]) -> xr.Dataset:
        """See :class:`Engine`; the rows must be of one length."""
        tokens = torch.stack(rows)
        loop = LoopGeometry(0, self.model.cfg.n_layers, 0, 1)
        collector = Collector(loop, self.metrics, None, self.spec.skip_first or 0)
        states: dict[int, Tensor] = {}

        def look(i: int, name: Reads, x: Tensor) -> None:
            compared = name in collector.needs_reference
            if compared:
                collector.refer(i, name, x)
            collector.see(SeenAt.of_layer(loop, i), name, x, compare=compared and name == "pattern")
            if name == "pattern":
                collector.forget(i, name)
            elif compared:
                states[i] = x

        self._run(tokens, sorted(collector.reads), look)
        for i, state in states.items():
            collector.compare(SeenAt.of_layer(loop, i), "resid_post", state)
        n_tokens = torch.full((len(tokens),), tokens.shape[1])
        attributes = run_attributes(self.model, loop)
        data = labelled(collector, n_tokens, self.model.cfg.d_model, attributes)
        # As looped models are called: a hub id, or the last part of a folder and not where it lies.
        name = self.spec.model
        return data.assign_attrs(model=Path(name).name if is_folder(name) else name)

    @torch.inference_mode()
    def _run(
        self,
        tokens: Int[Tensor, "prompt pos"],
        names: Sequence[Reads],
        look: Callable[[int, Reads, Tensor], None],
    ) -> None:
        """Let a function look at activations of every layer, in the order of the forward pass."""

        def reader(i: int, name: Reads) -> Callable[..., None]:
            return lambda x, hook: look(i, name, x)

        layers = range(self.model.cfg.n_layers)
        self.model.run_with_hooks(
            tokens,
            # Given, so that no token of a text is taken for padding.
            attention_mask=torch.ones_like(tokens),
            fwd_hooks=[(layer_hook(i, name), reader(i, name)) for i in layers for name in names],
            return_type=None,
        )

    @torch.inference_mode()
    def pairwise(self, row: Row) -> xr.Dataset:
        """See :class:`Engine`."""
        kept = Stacked(self.model.cfg.n_layers)
        self._run(row[None], ("pattern", "resid_post"), kept.put)
        return kept.matrices()

    def patterns(self, row: Row) -> dict[str, Any]:
        """See :class:`Engine`."""
        kept = Stacked(self.model.cfg.n_layers)
        self._run(row[None], ("pattern",), kept.put)
        return pattern_variables(kept["pattern"], self.model.to_str_tokens(row))

    def spectrum(self, rows: Sequence[Row | None]) -> xr.Dataset:
        """Refused by the specification."""
        raise InputError("extras: a feedforward model has no loop, and so no spectrum of one")

    def path(self, row: Row) -> dict[str, Any]:
        """Refused by the specification."""
        raise InputError("extras: a feedforward model has no path over recurrences")

    def neurons(self) -> xr.Dataset:
        """See :class:`Engine`."""
        return neuron_variables(prediction_suppression(self.model))
