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
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.cells import State
from tl_looped.model.context import LoopRun, RunContext
from tl_looped.model.exit_gate import ExitReadout
from tl_looped.model.program import Do, Op
from tl_looped.model.running import execute
from tl_looped.transformer.loop import LoopMixin
from tl_looped.transformer.prompt import check_mask, read_prompt


class LensesMixin(LoopMixin):
    """Logit lens, coda lens and exit readout."""

    def logit_lens(
        self, resid: Float[Tensor, "*stack batch pos d_model"]
    ) -> Float[Tensor, "*stack batch pos d_vocab"]:
        """Final norm (recomputed for each vector) and unembedding.

        Args:
            resid: Block outputs or any other residual streams, with any leading dimensions.
        """
        self._check_width(resid)
        parts = self.silent_parts
        return self._home(parts.unembed(parts.final_norm(resid.to(self.W_E)), False))

    def coda_lens(
        self,
        resid: Float[Tensor, "*stack batch pos d_model"],
        attention_mask: Tensor | None = None,
        after_loop_norm: bool = False,
    ) -> Float[Tensor, "*stack batch pos d_vocab"]:
        """Logits if the loop ended with this state.

        Args:
            resid: Output of a core layer, ``cache["resid_post", (r, l)]``, or several of them
                stacked in front, as from ``cache.stack_recurrences("resid_post")``. Every position
                from the first is needed: the coda's layers attend.
            attention_mask: ``[batch, pos]``, as in the run; needed for padded batches.
            after_loop_norm: ``resid`` is a ``hook_state_out``, already past the loop norm. Only
                matters in models whose last loop norm is the final norm (Ouro).
        """
        self._check_width(resid)
        stream = resid.to(self.W_E)
        stack, (batch, length) = stream.shape[:-3], stream.shape[-3:-1]
        mask = check_mask(self, attention_mask, batch, length)
        context = RunContext.build(self.cfg, length, mask, stream.device, stream.dtype)
        program = self.program_at(1)
        ops = program.after_loop
        if not after_loop_norm:
            ops = (*(op for op in program.recurrence(0) if op.do is Do.WRITE), *ops)
        flat = stream.reshape(-1, batch, length, self.cfg.d_model)
        outputs = [self._silently(ops, x, context) for x in flat]
        return self._home(torch.stack(outputs).reshape(*stack, batch, length, -1))

    def _silently(self, ops: Iterable[Op], x: State, context: RunContext) -> Tensor:
        """What steps after the last read give, without hooks."""
        run = LoopRun(context, self.program, None, 0)
        return execute(ops, x, run, self.silent_parts)

    def _exit_logits(
        self, state: State, run: LoopRun, last_only: bool
    ) -> Float[Tensor, "batch read d_vocab"]:
        """What the coda lens says of a recurrence's state within a run, for exit rules."""
        *ops, unembed = self.program_at(1).after_loop
        x = self._silently(ops, state, replace(run.context, peeking=True))
        return self._silently([unembed], x[:, -1:] if last_only else x, run.context)

    def exits(self, input: Any, **kwargs: Any) -> ExitReadout:
        """Gate logits and exit logits of every recurrence (Ouro).

        Args:
            input: Text or tokens; further arguments as for the model.

        Raises:
            InputError: if the model has no exit gate.
        """
        if not self.cfg.exit_gate:
            raise InputError(f"{self.cfg.model_name} has no exit gate")
        keep = ("hook_exit_gate", "hook_state_out")
        text = (
            kwargs.pop(name, None) for name in ("attention_mask", "prepend_bos", "padding_side")
        )
        prompt = read_prompt(self, input, *text)
        _, cache = self.run_with_cache(
            prompt.tokens,
            attention_mask=prompt.mask,
            names_filter=lambda name: name.endswith(keep),
            return_type=None,
            **kwargs,
        )
        gate = cache.stack_recurrences("exit_gate")[..., 0].permute(1, 2, 0)
        states = cache.stack_recurrences("state_out")
        logits = self.coda_lens(states, prompt.mask, after_loop_norm=True)
        return ExitReadout(gate, logits, self.cfg.exit_threshold)

    def _check_width(self, resid: Tensor) -> None:
        if resid.ndim < 3 or resid.shape[-1] != self.cfg.d_model:
            raise InputError(
                f"a lens reads [..., batch, pos, d_model={self.cfg.d_model}], "
                f"got shape {tuple(resid.shape)}"
            )
