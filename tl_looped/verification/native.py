"""transformers' own model of a checkpoint, in this process: no other environment, no foreign code.

A model that was made of a feedforward one (``cfg.source_layers``) is that one without its dropped
layers when its loop runs once: a virtual loop always, a retrofit as long as its adapter is the
``[0 | I]`` that it was made with. A feedforward folder is compared as the virtual loop of all its
layers.

Families of looped models that transformers itself has (HRM-Text) belong here too: their adapter
declares nothing, and their model is opened by its class as the feedforward ones are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.progress import Progress
from tl_looped.retrofitting.families import feedforward_sources
from tl_looped.retrofitting.feedforward import Feedforward, open_feedforward
from tl_looped.retrofitting.layers import LayerPlan
from tl_looped.retrofitting.probe import dropped_logits
from tl_looped.transformer import LoopedTransformer
from tl_looped.verification.certificate import Finding
from tl_looped.verification.parity import Runs, Theirs, norms_of, parity, plan_runs, run_ours


def compare_with_source(
    model: LoopedTransformer, source: str, tokens: Tensor, progress: Progress
) -> Finding:
    """Compare a model at one recurrence with the feedforward model that it was made of.

    Args:
        model: Its ``cfg.source_layers`` says which layers; left as it was.
        source: Hub id or folder of the feedforward model.
        tokens: ``[batch, pos]``; some are taken.
        progress: What is told on the way.

    Raises:
        InputError: the model was not made of a feedforward one, or was trained since.
        CheckpointError, ConfigError: a source that cannot be read.
    """
    layers = model.cfg.source_layers
    if layers is None:
        raise InputError(
            f"--source {source}: {model.cfg.model_name} does not say that it was made of a "
            "feedforward model (source_layers); leave it out"
        )
    if model.cfg.trained_recurrences is not None:
        raise InputError(
            f"--source {source}: {model.cfg.model_name} was trained since it was made of "
            f"{layers.get('model')}, so its weights are others; leave it out"
        )
    feedforward = open_feedforward(source, torch.float32)
    plan = LayerPlan(
        tuple(layers["prelude"]),
        tuple(layers["core"]),
        tuple(layers["coda"]),
        feedforward.n_layers,
    )
    if max(plan.kept) >= plan.n_layers:
        raise InputError(
            f"--source {source} has {plan.n_layers} layers, and the model says that it was made of "
            f"layer {max(plan.kept)} of {layers.get('model')}"
        )
    runs = _at_one_recurrence(plan_runs(model, tokens))
    progress.start(3, 0)
    names = [f"blocks.{i}.hook_resid_post" for i in range(len(plan.kept))]
    ours = run_ours(model, runs, names, progress.advance)
    sources = feedforward_sources(
        model.cfg, feedforward.family, plan, bool(feedforward.model.config.tie_word_embeddings)
    )
    norms = norms_of(model, sources)
    theirs = _theirs(feedforward, plan, runs, norms)
    progress.advance(1)
    kind = type(feedforward.model).__name__
    about = {
        "class": f"transformers.{kind}",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "source": feedforward.name,
        "layers": list(plan.kept),
    }
    how = (
        f"transformers {transformers.__version__}'s {kind} of {feedforward.name}, "
        f"{len(plan.kept)} of its {plan.n_layers} layers"
    )
    return parity(model, norms, runs, ours, theirs, how, about)


def _at_one_recurrence(runs: Runs) -> Runs:
    return Runs(runs.tokens, runs.prompt, runs.n_greedy, (1,), None)


def _theirs(feedforward: Feedforward, plan: LayerPlan, runs: Runs, norms: dict[str, str]) -> Theirs:
    model = feedforward.model
    with _outputs_of(model, plan) as outputs:
        logits = dropped_logits(model, plan, runs.tokens)
        kept = {f"blocks.{i}.hook_resid_post": value for i, value in enumerate(outputs)}
    tokens = runs.prompt
    for _ in range(runs.n_greedy):
        following = dropped_logits(model, plan, tokens)[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, following), 1)
    eps = {ours: float(model.get_submodule(at).variance_epsilon) for ours, at in norms.items()}
    frequencies = model.model.rotary_emb.inv_freq.detach().cpu().float()
    return Theirs({1: logits}, kept, tokens, eps, frequencies)


@contextmanager
def _outputs_of(model: Any, plan: LayerPlan) -> Iterator[list[Tensor]]:
    """The residual stream after every layer that is kept, in their order, while the model runs."""
    outputs: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handles = [model.model.layers[i].register_forward_hook(keep) for i in plan.kept]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
