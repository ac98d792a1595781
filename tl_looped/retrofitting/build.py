"""``tl_looped.retrofit``: a feedforward checkpoint becomes a looped model.

After McLeish et al., "Teaching Pretrained Language Models to Think Deeper with Retrofitted
Recurrence". Some layers become the prelude, some the loop, some the coda; the others are dropped.
Before each recurrence an adapter maps the state and the prelude's output to the loop's input,
``x = W [state; e]``. It starts as ``W = [0 | I]``, which takes ``e`` alone: at one recurrence the
model is the feedforward one without its dropped layers, and every further recurrence repeats the
first until training moves ``W``.

The second mode has no adapter: the core is simply run again on its own output, a "virtual loop". At
n recurrences that is the feedforward model in which the core layers stand n times in a row.

Decisions. The unembedding of a retrofit is a copy of its own, as in the published checkpoints, also
where the source ties it. The random initial state has their standard deviation, which they took
over from Huginn; with ``[0 | I]`` it has no effect. Layers keep their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from tl_looped._compat import get_device
from tl_looped.adapters import Source
from tl_looped.adapters.mapping import give_values, problems
from tl_looped.checks import checked, one_of, whole
from tl_looped.errors import CheckpointError, ConfigError, InputError
from tl_looped.model.config import Injection, LoopedConfig, parse_dtype
from tl_looped.retrofitting.families import feedforward_sources, looped_config
from tl_looped.retrofitting.feedforward import Feedforward, open_feedforward
from tl_looped.retrofitting.layers import LayerPlan, plan_layers
from tl_looped.retrofitting.probe import check_against_source, probe
from tl_looped.transformer import LoopedTransformer

_ADAPTER = "[0 | I]"


class Mode(str, Enum):
    """How the loop is closed.

    - ``RETROFIT``: through an adapter ``[0 | I]`` that sees the state and the prelude's output.
    - ``VIRTUAL_LOOP``: the core's output is its next input.
    """

    RETROFIT = "retrofit"
    VIRTUAL_LOOP = "virtual-loop"


@checked
def retrofit(
    model_or_id: Any,
    *,
    core: Iterable[int],
    prelude: Iterable[int] | None = None,
    coda: Iterable[int] | None = None,
    mode: Mode | str = Mode.RETROFIT,
    n_recurrences: int = 4,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    default_prepend_bos: bool | None = None,
) -> LoopedTransformer:
    """Make a looped model of a feedforward one.

    The result is checked against its source at one recurrence before it is returned. The source's
    tensors stay in their files if it comes from a folder or the hub: one model is in memory, and of
    the other one layer at a time. Its tokenizer and its ``generation_config`` are the source's.
    ``model.save_pretrained(folder, format="original")`` saves a retrofit in the format of the
    published ones (Llama, TinyLlama, OLMo-2, Mistral); ``model.save_pretrained(folder)`` saves
    anything in tl_looped's own. Qwen's biases and norms on single heads have no place in the
    former.

    Args:
        model_or_id: A hub id or folder (Llama, TinyLlama, OLMo-2, Mistral, Qwen2, Qwen3), a
            transformers model, or a TransformerBridge whose weights were not processed. Its weights
            are copied.
        core: Layers of the loop, 0-based and increasing: a list, a range.
        prelude: Layers before it; all before the first core layer if None.
        coda: Layers after it; all after the last core layer if None.
        mode: See :class:`Mode`.
        n_recurrences: How often the loop runs, until it is set otherwise. 4 is the smallest number
            that the published retrofits were trained for.
        device: TransformerLens's default device if None. ``"meta"`` gives shapes and no values.
        dtype: fp32 if None, as in ``from_pretrained``.
        tokenizer: In place of the source's own. A transformers model in memory has none.
        revision: Branch, tag or commit on the hub.
        default_prepend_bos: Whether text gets a BOS token; as the tokenizer does by itself if None.
            The model is saved with it.

    Returns:
        A model in evaluation mode. ``cfg.source_layers`` says where its layers came from.

    Raises:
        InputError: layers that do not exist, overlap or are out of order; a wrong mode or number.
        CheckpointError: a checkpoint that cannot be read, or tensors of other shapes or names.
        ConfigError: a family, or a field of its config, that a looped model cannot honour.
    """
    mode = one_of(mode, "mode", Mode)
    n_recurrences = whole(n_recurrences, "n_recurrences", 1)
    wanted = parse_dtype(torch.float32 if dtype is None else dtype)
    prelude, core, coda = (_as_list(layers) for layers in (prelude, core, coda))

    def plan_of(n_layers: int) -> LayerPlan:
        return plan_layers(n_layers, prelude, core, coda)

    source = open_feedforward(model_or_id, wanted, tokenizer, revision, plan_of)
    plan = plan_of(source.n_layers)
    cfg = looped_config(
        source.model.config, plan, source.name, mode is Mode.RETROFIT, n_recurrences
    )
    cfg.dtype = wanted
    if default_prepend_bos is not None:
        cfg.default_prepend_bos, cfg.bos_from = default_prepend_bos, "caller"
    looped = LoopedTransformer(cfg, source.tokenizer)
    looped.generation_config = dict(source.generation_config)
    sources = _sources(looped, source, plan)
    target = torch.device(get_device() if device is None else device)
    if target.type != "meta":
        if source.on_meta:
            raise InputError(
                f"{source.name} is on the meta device and has no values; device='meta' makes a "
                "looped model of shapes only"
            )
        # The source first: what of it is in memory is gone before the looped model is there.
        expected = probe(looped, source, plan)
        with source.reader() as read:
            own = {_ADAPTER: _identity_adapter(cfg)}
            give_values(
                looped,
                sources,
                lambda name: own[name] if name in own else read(name),
                target,
                wanted,
            )
        looped.to(target)  # they are there; cfg learns of it
        check_against_source(looped, source, expected)
    return looped.eval()


def _as_list(layers: Any) -> Any:
    """An iterator is read once, and its layers are looked at twice."""
    return list(layers) if isinstance(layers, Iterator) else layers


def _sources(looped: LoopedTransformer, source: Feedforward, plan: LayerPlan) -> dict[str, Source]:
    """Where every parameter comes from, once the source has exactly those expected."""
    cfg, tied = looped.cfg, bool(source.model.config.tie_word_embeddings)
    sources = feedforward_sources(cfg, source.family, plan, tied)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in source.parameters().items():
        if not tensor.is_floating_point():
            raise ConfigError(
                f"{source.name} is quantised: its {name} is {tensor.dtype}; dequantise it first "
                "(transformers: model.dequantize())"
            )
        # Biases of queries, keys and values are stored by head here.
        if name.endswith("_proj.bias") and len(tensor) % cfg.d_head == 0:
            tensor = tensor.unflatten(0, (-1, cfg.d_head))
        shapes[name] = tuple(tensor.shape)
    dropped = tuple(f"model.layers.{layer}." for layer in plan.dropped)
    optional = {name for name in shapes if name.startswith(dropped)}
    if cfg.injection is Injection.LINEAR:
        sources["injection.weight"] = Source((_ADAPTER,))
        shapes[_ADAPTER] = (cfg.d_model, 2 * cfg.d_model)
    targets = {name: tuple(p.shape) for name, p in looped.named_parameters()}
    wrong = problems(sources, targets, shapes, optional)
    if wrong:
        listed = "\n  ".join(wrong)
        if tied and "lm_head.weight" in shapes:
            listed += (
                "\n  (the config says that embedding and unembedding are tied, and a stored "
                "lm_head.weight differs: set tie_word_embeddings to false if it counts)"
            )
        raise CheckpointError(
            f"{source.name} does not hold the tensors that its config implies:\n  {listed}"
        )
    return sources


def _identity_adapter(cfg: LoopedConfig) -> Tensor:
    """``[0 | I]``, ``[d_model, 2 d_model]``: the state is dropped, the prelude's output kept."""
    d = cfg.d_model
    return torch.cat((torch.zeros(d, d), torch.eye(d)), 1)
