"""Lenses: logits from any state of the loop, without running the rest of it.

- The logit lens reads a residual stream through the final norm and the unembedding.
- The coda lens reads it as if the loop ended there: through the norm before the coda where the
  family has one (Huginn, whose final norm stands there too; the retrofits have none), the coda's
  layers, the final norm and the unembedding. At the last recurrence's last layer it gives the
  model's own logits.

No hook fires inside a lens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.cells import State
from tl_looped.model.context import LoopRun, RunContext
from tl_looped.model.exit_gate import ExitReadout
from tl_looped.model.program import Do, Op
from tl_looped.model.running import execute
from tl_looped.transformer.prompt import check_mask, read_prompt

if TYPE_CHECKING:
    from tl_looped.transformer.looped_transformer import LoopedTransformer


def logit_lens(
    model: LoopedTransformer, resid: Float[Tensor, "*stack batch pos d_model"]
) -> Float[Tensor, "*stack batch pos d_vocab"]:
    """Final norm and unembedding of any residual streams."""
    _check_width(model, resid)
    parts = model.silent_parts
    return model._home(parts.unembed(parts.final_norm(resid.to(model.W_E)), False))


def coda_lens(
    model: LoopedTransformer,
    resid: Float[Tensor, "*stack batch pos d_model"],
    attention_mask: Tensor | None,
    after_loop_norm: bool,
) -> Float[Tensor, "*stack batch pos d_vocab"]:
    """Logits if the loop ended with a state."""
    _check_width(model, resid)
    stream = resid.to(model.W_E)
    stack, (batch, length) = stream.shape[:-3], stream.shape[-3:-1]
    mask = check_mask(model, attention_mask, batch, length)
    context = RunContext.build(model.cfg, length, mask, stream.device, stream.dtype)
    program = model.program_at(1)
    ops = program.after_loop
    if not after_loop_norm:
        ops = (*(op for op in program.recurrence(0) if op.do is Do.WRITE), *ops)
    flat = stream.reshape(-1, batch, length, model.cfg.d_model)
    outputs = [_silently(model, ops, x, context) for x in flat]
    return model._home(torch.stack(outputs).reshape(*stack, batch, length, -1))


def _silently(model: LoopedTransformer, ops: Iterable[Op], x: State, context: RunContext) -> Tensor:
    """What steps after the last read give, without hooks."""
    run = LoopRun(context, model.program, None, 0)
    return execute(ops, x, run, model.silent_parts)


def exit_logits(
    model: LoopedTransformer, state: State, run: LoopRun, last_only: bool
) -> Float[Tensor, "batch read d_vocab"]:
    """What the coda lens says of a recurrence's state within a run, for exit rules."""
    *ops, unembed = model.program_at(1).after_loop
    x = _silently(model, ops, state, replace(run.context, peeking=True))
    return _silently(model, [unembed], x[:, -1:] if last_only else x, run.context)


def exits(model: LoopedTransformer, input: Any, **kwargs: Any) -> ExitReadout:
    """Gate logits and exit logits of every recurrence."""
    if not model.cfg.exit_gate:
        raise InputError(f"{model.cfg.model_name} has no exit gate")
    keep = ("hook_exit_gate", "hook_state_out")
    text = (kwargs.pop(name, None) for name in ("attention_mask", "prepend_bos", "padding_side"))
    prompt = read_prompt(model, input, *text)
    _, cache = model.run_with_cache(
        prompt.tokens,
        attention_mask=prompt.mask,
        names_filter=lambda name: name.endswith(keep),
        return_type=None,
        **kwargs,
    )
    gate = cache.stack_recurrences("exit_gate")[..., 0].permute(1, 2, 0)
    states = cache.stack_recurrences("state_out")
    logits = coda_lens(model, states, prompt.mask, after_loop_norm=True)
    return ExitReadout(gate, logits, model.cfg.exit_threshold)


def _check_width(model: LoopedTransformer, resid: Tensor) -> None:
    if resid.ndim < 3 or resid.shape[-1] != model.cfg.d_model or not resid.numel():
        raise InputError(
            f"a lens reads [..., batch, pos, d_model={model.cfg.d_model}], "
            f"got shape {tuple(resid.shape)}"
        )
