"""Text generation by whole forward passes.

Every new token runs the model on the whole sequence, so any hook and any initial state are seen as
in a plain forward pass. The random initial state is a function of seed and position, so a position
has the same state at every step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped._compat import sample_logits
from tl_looped.errors import InputError
from tl_looped.transformer.lenses import LensesMixin
from tl_looped.transformer.tokens import is_text


class GenerationMixin(LensesMixin):
    """``generate`` with TransformerLens's arguments."""

    @torch.inference_mode()
    def generate(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"],
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        prepend_bos: bool | None = None,
        return_type: str = "input",
        verbose: bool = True,
        attention_mask: Tensor | None = None,
        n_recurrences: int | None = None,
        initial_state: Tensor | str | None = None,
        state_seed: int | None = None,
        seed: int | None = None,
    ) -> Any:
        """Continue one or more prompts.

        Args:
            input: Text, several texts (padded on the left) or tokens.
            max_new_tokens: Most new tokens a row.
            stop_at_eos: End a row at the EOS token; it is filled up with it.
            eos_token_id: EOS token; the tokenizer's if None.
            do_sample: Sample; otherwise take the most likely token.
            top_k, top_p, temperature, freq_penalty, repetition_penalty: As in TransformerLens.
            prepend_bos: Overrides ``cfg.default_prepend_bos`` for text.
            return_type: ``"input"`` (as the input was), ``"str"`` or ``"tokens"``.
            verbose: Show progress.
            attention_mask: Mask of a left-padded token batch.
            n_recurrences: Recurrences of every step.
            initial_state: ``"zeros"``, or a state for every position up to the last generated.
            state_seed: Seed of the random initial state.
            seed: Seed of the sampling; the global generator is left alone if given.

        Returns:
            Prompt and continuation, as text without special tokens or as tokens ``[batch, pos]``.
        """
        if return_type not in ("input", "str", "tokens"):
            raise InputError(f"return_type must be input, str or tokens, got {return_type!r}")
        text = is_text(input)
        if self.tokenizer is None and return_type == "str":
            raise InputError("return_type='str' needs a tokenizer")
        if text:
            tokens, mask = self.tokenize(cast(Any, input), prepend_bos, padding_side="left")
        else:
            tokens, found = self._check_tokens(input), attention_mask
            found = self._padding(tokens, prepend_bos) if found is None else found
            given = self._check_mask(found, *tokens.shape)
            mask = torch.ones_like(tokens, dtype=torch.bool) if given is None else given
            if not bool(mask[:, -1].all()):
                raise InputError("generate continues from the last position: pad on the left")
        if eos_token_id is None:
            eos_token_id = getattr(self.tokenizer, "eos_token_id", None)
        if stop_at_eos and eos_token_id is None and self.tokenizer is not None:
            raise InputError("stop_at_eos=True, but there is no EOS token: pass eos_token_id=")
        eos = eos_token_id if stop_at_eos else None
        self._check_state_covers(initial_state, tokens.shape[1] + max_new_tokens - 1)
        longest = int(mask.sum(-1).max()) + max_new_tokens - 1
        if longest > self.cfg.n_ctx:
            raise InputError(
                f"max_new_tokens={max_new_tokens} would run the model on {longest} tokens, its "
                f"context holds {self.cfg.n_ctx}"
            )

        def step(tokens: Tensor, mask: Tensor) -> Tensor:
            state = initial_state
            if isinstance(state, Tensor):
                state = state[:, : tokens.shape[1]]
            logits = self(
                tokens,
                attention_mask=mask,
                initial_state=state,
                state_seed=state_seed,
            )[:, -1]
            if not do_sample:
                return logits.argmax(-1)
            return sample_logits(
                logits.float(),
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                freq_penalty=freq_penalty,
                repetition_penalty=repetition_penalty,
                tokens=tokens,
            )

        devices = [tokens.device] if tokens.device.type == "cuda" else []
        with (
            self.recurrences(n_recurrences),
            torch.random.fork_rng(devices=devices, enabled=seed is not None),
        ):
            if seed is not None:
                torch.manual_seed(seed)
            out, mask = self._extend(tokens, mask, max_new_tokens, step, eos, verbose)
        if return_type == "tokens" or (return_type == "input" and not text):
            return out
        texts = [
            self.tokenizer.decode(
                row[keep].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for row, keep in zip(out, mask, strict=True)
        ]
        return texts if isinstance(input, list) or len(texts) > 1 else texts[0]

    def _extend(
        self, tokens: Tensor, mask: Tensor, n_new: int, step: Any, eos: int | None, verbose: bool
    ) -> tuple[Tensor, Tensor]:
        done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        for _ in tqdm(range(n_new), disable=not verbose, desc="generating"):
            new = step(tokens, mask)
            if eos is not None:
                new = torch.where(done, torch.full_like(new, eos), new)
                done |= new == eos
            tokens = torch.cat((tokens, new[:, None]), 1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            if bool(done.all()):
                break
        return tokens, mask

    def _check_state_covers(self, state: Tensor | str | None, length: int) -> None:
        if isinstance(state, Tensor) and (state.ndim != 3 or state.shape[1] < length):
            raise InputError(
                f"initial_state must cover all {length} positions of the generation, "
                f"got shape {tuple(state.shape)}"
            )
