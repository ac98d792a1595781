"""transformers' own model of a checkpoint, in this process: no other environment, no foreign code.

A model that was made of a feedforward one (``cfg.source_layers``) is that one without its dropped
layers when its loop runs once: a virtual loop always, a retrofit as long as its adapter is the
``[0 | I]`` that it was made with. A feedforward folder is compared as the virtual loop of all its
layers. transformers loads the model itself, by nothing of this package but the names of the norms.

Families of looped models that transformers has a class for (HRM-Text) belong here too: they are
opened the same way, and differ in how the number of recurrences is set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor, nn

from tl_looped.checkpoints import HubOptions, download, read_config, without_bars
from tl_looped.errors import CheckpointError, InputError
from tl_looped.files import is_folder
from tl_looped.model.config import LoopedConfig
from tl_looped.progress import Progress
from tl_looped.retrofitting.families import family_of, feedforward_sources
from tl_looped.retrofitting.layers import LayerPlan
from tl_looped.transformer import LoopedTransformer
from tl_looped.verification.certificate import Finding
from tl_looped.verification.parity import Runs, Theirs, norms_of, parity, plan_runs, run_ours


def compare_with_source(
    model: LoopedTransformer,
    source: str,
    tokens: Int[Tensor, "batch pos"],
    hub: HubOptions | None,
    progress: Progress,
) -> Finding:
    """Compare a model at one recurrence with the feedforward model that it was made of.

    Args:
        model: Its ``cfg.source_layers`` says which layers; left as it was.
        source: Hub id or folder of the feedforward model.
        tokens: Some are taken.
        hub: How the hub is asked.
        progress: What is told on the way: one step per run.

    Raises:
        InputError: the model was not made of such a model, or was trained since.
        CheckpointError, ConfigError: a source that cannot be read.
    """
    refuse_other_models(model.cfg, source, model.cfg.model_name)
    name = Path(source).resolve().name if is_folder(source) else source
    theirs = _open(source, hub)
    plan = _plan(model.cfg, theirs.config.num_hidden_layers, name)
    tied = bool(theirs.config.tie_word_embeddings)
    family = family_of(theirs.config.model_type, name)
    norms = norms_of(model, feedforward_sources(model.cfg, family, plan, tied))
    eps = {ours: float(theirs.get_submodule(at).variance_epsilon) for ours, at in norms.items()}
    _keep_layers(theirs, plan)
    runs = plan_runs(model, tokens)
    runs = Runs(runs.tokens, runs.prompt, runs.n_greedy, (1,), None)
    progress.start(3, 0)
    computed = _run_theirs(theirs, runs, eps)
    progress.advance(1)
    ours = run_ours(model, runs, list(computed.activations), progress.advance)
    kind = type(theirs).__name__
    about = {
        "class": f"transformers.{kind}",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "source": name,
        "layers": list(plan.kept),
    }
    how = (
        f"transformers {transformers.__version__}'s {kind} of {name}, {len(plan.kept)} of its "
        f"{plan.n_layers} layers"
    )
    return parity(model, norms, runs, ours, computed, how, about)


def refuse_other_models(cfg: LoopedConfig, source: str, name: str) -> None:
    """Refuse a model that does not compute what its source does.

    Raises:
        InputError: it was not made of a feedforward one, or was trained since.
    """
    if cfg.source_layers is None:
        raise InputError(
            f"--source {source}: {name} does not say that it was made of a feedforward model "
            "(source_layers); leave it out"
        )
    if cfg.trained_recurrences is not None:
        raise InputError(
            f"--source {source}: {name} was trained since it was made of "
            f"{cfg.source_layers.get('model')}, so its weights are others; leave it out"
        )


def _open(source: str, hub: HubOptions | None) -> Any:
    """The feedforward model as transformers loads it, in fp32."""
    folder = Path(source) if is_folder(source) else download(source, None, hub)
    family_of(read_config(folder).get("model_type"), source)
    try:
        with without_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except Exception as error:  # whatever transformers raises about a config or a file
        raise CheckpointError(
            f"transformers cannot load {source} ({type(error).__name__}: {error})"
        ) from error
    return model.eval()


def _plan(cfg: LoopedConfig, n_layers: int, name: str) -> LayerPlan:
    """Which of its layers the looped model has."""
    layers = cfg.source_layers or {}
    prelude, core, coda = (tuple(layers[stage]) for stage in ("prelude", "core", "coda"))
    plan = LayerPlan(prelude, core, coda, n_layers)
    if max(plan.kept) >= n_layers:
        raise InputError(
            f"--source {name} has {n_layers} layers, and the model says that it was made of layer "
            f"{max(plan.kept)} of {layers.get('model')}"
        )
    return plan


def _keep_layers(theirs: Any, plan: LayerPlan) -> None:
    """Leave out the layers that the looped model does not have."""
    theirs.model.layers = nn.ModuleList(theirs.model.layers[i] for i in plan.kept)
    theirs.config.num_hidden_layers = len(plan.kept)


def _run_theirs(theirs: Any, runs: Runs, eps: dict[str, float]) -> Theirs:
    with torch.no_grad():
        with _outputs_of(theirs) as outputs:
            logits = theirs(runs.tokens, use_cache=False).logits
        tokens = runs.prompt
        for _ in range(runs.n_greedy):
            following = theirs(tokens, use_cache=False).logits[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, following), 1)
    activations = {f"blocks.{i}.hook_resid_post": value for i, value in enumerate(outputs)}
    frequencies = theirs.model.rotary_emb.inv_freq.detach().float()
    return Theirs({1: logits}, activations, tokens, eps, frequencies)


@contextmanager
def _outputs_of(theirs: Any) -> Iterator[list[Tensor]]:
    """The residual stream after every layer, while the model runs."""
    outputs: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handles = [layer.register_forward_hook(keep) for layer in theirs.model.layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
