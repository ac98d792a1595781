"""Checks of what a run is given: tokens, masks, layers, states."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.exit_rules import ExitRule
from tl_looped.model.geometry import LayerLike
from tl_looped.model.kv_cache import KVRun, LoopedKeyValueCache
from tl_looped.model.masks import real_tokens
from tl_looped.transformer.reading import (
    Chats,
    Rows,
    Texts,
    Tokens,
    integers,
    read_input,
    read_rows,
    read_tokens,
)
from tl_looped.transformer.tokens import TokensMixin


class InputsMixin(TokensMixin):
    """Every argument of a run is checked before anything is computed."""

    def _layer_or_end(self, layer: LayerLike) -> int:
        return self.loop.n_layers if layer == self.loop.n_layers else self.loop.resolve(layer)

    def _tokens_and_mask(
        self,
        input: Any,
        mask: Tensor | None,
        prepend_bos: bool | None,
        padding_side: str | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens of any input, and its mask: the given one, its own, or what pad tokens tell."""
        given = read_input(input)
        if padding_side is not None and isinstance(given, Tokens):
            raise InputError(
                f"padding_side={padding_side!r} is for text; the padding of tokens is read from "
                "them, on either side: pass attention_mask= to say where it is"
            )
        if not isinstance(given, Tokens):
            tokens, own_mask = self.tokenize(given, prepend_bos, padding_side)
            return tokens, own_mask if mask is None else mask
        if given.mask is not None and mask is not None:
            raise InputError(
                "attention_mask is given twice, as an argument and within the input: leave one out"
            )
        mask = given.mask if mask is None else mask
        tokens = self._check_tokens(given.tokens)
        return tokens, self._padding(tokens, prepend_bos) if mask is None else mask

    def token_rows(
        self, prompts: Any, attention_mask: Tensor | None = None, prepend_bos: bool | None = None
    ) -> list[Tensor]:
        """The real tokens of every prompt, without padding, each ``[pos]``.

        Args:
            prompts: Whatever the model takes (``tl_looped.transformer.reading``); or a list of
                token sequences of any lengths, which are taken as they are.
            attention_mask: ``[batch, pos]`` of tokens, zero at padding; read off the pad tokens, as
                in a run, if None.
            prepend_bos: See :meth:`to_tokens`.

        Raises:
            InputError: without any prompt or token, or beyond the context; the prompt's number is
                given.
        """
        given = read_rows(prompts)
        if isinstance(given, (Texts, Chats)):
            texts, prepend_bos = self._texts(given, prepend_bos)
            rows = [self.tokenize(text, prepend_bos)[0][0] for text in texts]
        elif isinstance(given, Rows):
            if attention_mask is not None:
                raise InputError("attention_mask is for tokens [batch, pos], not for a list")
            rows = [self._token_row(number, row) for number, row in enumerate(given.rows)]
        else:
            tokens, mask = self._tokens_and_mask(given, attention_mask, prepend_bos, None)
            mask = self._check_mask(mask, *tokens.shape)
            rows = list(tokens)
            if mask is not None:
                rows = [row[real] for row, real in zip(tokens, mask, strict=True)]
        for number, row in enumerate(rows):
            if len(row) > self.cfg.n_ctx:
                raise InputError(
                    f"prompt {number} has {len(row)} tokens, more than the context of "
                    f"{self.cfg.n_ctx}: leave it out or cut it"
                )
        return rows

    def _token_row(self, number: int, row: Any) -> Int[Tensor, " pos"]:
        """One sequence of a list of them."""
        try:
            given = read_input(row)
        except InputError as error:
            raise InputError(f"prompt {number} must be a sequence of token ids: {error}") from error
        if not isinstance(given, Tokens) or given.tokens.ndim != 1:
            shape = tuple(given.tokens.shape) if isinstance(given, Tokens) else "text"
            raise InputError(f"prompt {number} must be one sequence of token ids, got {shape}")
        return self._check_tokens(given.tokens)[0]

    def _check_loop_arguments(
        self,
        start: int | None,
        stop: int | None,
        initial_state: Tensor | str | None,
        state_seed: int | None,
        prelude_output: Tensor | None,
    ) -> bool:
        """Whether the run enters the loop; arguments that it would not read are an error."""
        before = start is None or start < self.loop.p
        if before and prelude_output is not None:
            raise InputError(
                "prelude_output is for a start_at_layer behind the prelude; this run computes its "
                "own. To change what is injected, hook the prelude's last hook_resid_post."
            )
        enters = before and (stop is None or stop >= self.loop.p)
        if not enters and (initial_state is not None or state_seed is not None):
            raise InputError(
                "initial_state and state_seed have no effect: with start_at_layer="
                f"{start} and stop_at_layer={stop} the run does not enter the loop (at layer "
                f"{self.loop.p})"
            )
        return enters

    def _check_tokens(self, tokens: Any) -> Int[Tensor, "batch pos"]:
        tokens = integers(tokens) if isinstance(tokens, Tensor) else read_tokens(tokens)
        if tokens.dtype != torch.int64 or tokens.ndim not in (1, 2):
            raise InputError(
                f"tokens must be integers of shape [batch, pos], got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)} (a residual stream needs start_at_layer=)"
            )
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if tokens.numel() == 0:
            raise InputError(f"there is no token in an input of shape {tuple(tokens.shape)}")
        if tokens.device.type != "meta":
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.cfg.d_vocab:
                raise InputError(
                    f"token ids must be 0..{self.cfg.d_vocab - 1}, got {low if low < 0 else high}"
                )
        return tokens.to(self.W_E.device, torch.long)

    def _check_mask(
        self, mask: Any, batch: int, length: int, rows_continue: bool = False
    ) -> Tensor | None:
        """A boolean mask ``[batch, pos]``, with a real token in every row unless rows continue."""
        if mask is None:
            return None
        try:
            mask = torch.as_tensor(mask)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"attention_mask must be 1 at real tokens and 0 at padding, a tensor or rows of "
                f"numbers of shape {(batch, length)}, got {mask!r}"
            ) from error
        if tuple(mask.shape) != (batch, length):
            raise InputError(
                f"attention_mask must have shape {(batch, length)} like the tokens, "
                f"got {tuple(mask.shape)}"
            )
        mask = real_tokens(mask).to(self.W_E.device)
        if not rows_continue:
            self._check_rows(mask)
        return mask

    def _check_rows(self, mask: Bool[Tensor, "batch key"]) -> None:
        if not bool(mask.any(-1).all()):
            empty = (~mask.any(-1)).nonzero().flatten().tolist()
            raise InputError(f"attention_mask leaves rows {empty} without any token")

    def _refuse_offloaded(self) -> None:
        """Raise if accelerate has taken the weights away until their own module is called."""
        if self.W_E.device.type == "meta" and any(hasattr(m, "_hf_hook") for m in self.modules()):
            raise InputError(
                "the weights are offloaded (accelerate's cpu_offload, disk_offload or "
                "dispatch_model), which brings them back when their module is called, and here "
                "every layer computes with the weights of another one. Load the model with "
                "LoopedTransformer.from_pretrained(..., device_map='auto', max_memory=...): a "
                "device of it may be the CPU"
            )

    def _check_cache(self, cache: Any) -> None:
        """Raise if these are no keys and values of this model as it is now."""
        if cache is None:
            return
        if not isinstance(cache, LoopedKeyValueCache):
            raise InputError(
                f"past_kv_cache must be a LoopedKeyValueCache, which has a slot for each "
                f"recurrence and layer, got {type(cache).__name__}: begin with "
                "past_kv_cache=LoopedKeyValueCache()"
            )
        cache.check_owner(self, self.cfg)

    def _check_whole(self, cache: LoopedKeyValueCache | None, rule: ExitRule | None) -> None:
        """A part of the layers can neither extend a cache nor leave the loop early."""
        for name, value in (("past_kv_cache", cache), ("exit_rule", rule)):
            if value is not None:
                raise InputError(
                    f"{name} is for whole runs: leave out start_at_layer and stop_at_layer"
                )

    def _kv_run(
        self,
        cache: LoopedKeyValueCache | None,
        x: Float[Tensor, "batch pos d_model"],
        mask: Bool[Tensor, "batch pos"] | None,
    ) -> KVRun | None:
        """The pass of new tokens over a cache, which is checked already."""
        if cache is None:
            return None
        if self.loop.R == 0 and cache.n_recurrences > 0:
            raise InputError(
                "a run of no recurrence would leave its tokens without keys in the loop, where the "
                "cached ones have some: use a cache of its own"
            )
        batch, length = x.shape[:2]
        new = torch.ones(batch, length, dtype=torch.bool, device=x.device) if mask is None else mask
        if cache.mask is not None:
            if cache.mask.shape[0] != batch:
                raise InputError(
                    f"past_kv_cache holds {cache.mask.shape[0]} rows, the input has {batch}"
                )
            new = torch.cat((cache.mask, new), 1)
        self._check_rows(new)
        return KVRun(cache, new, length)
