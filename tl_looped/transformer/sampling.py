"""From logits to the next token, with TransformerLens's own sampling.

Penalties count the real tokens of a row: what padding a batch happens to have changes nothing.
With a seed the draws are those of that seed, and the global generator is left as it was, even
between the steps of a stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped._compat import sample_logits
from tl_looped.checks import at_most_one, number, whole


@dataclass
class Sampler:
    """How the next token is chosen.

    Args:
        do_sample: Sample; otherwise take the most likely token (after the repetition penalty).
        top_k, top_p, temperature, freq_penalty, repetition_penalty: As in TransformerLens.
        seed: Seed of the draws; the global generator if None.
    """

    do_sample: bool = True
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 1.0
    freq_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        at_most_one(top_k=self.top_k, top_p=self.top_p)
        if self.top_k is not None:
            whole(self.top_k, "top_k", 1)
        if self.top_p is not None:
            number(self.top_p, "top_p", above=0, most=1)
        if self.seed is not None:
            whole(self.seed, "seed", least=None)
        number(self.temperature, "temperature", 0)
        number(self.freq_penalty, "freq_penalty", 0)
        number(self.repetition_penalty, "repetition_penalty", above=0)
        self._state: Tensor | None = None

    def next_tokens(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"],
    ) -> Int[Tensor, " batch"]:
        """The next token of every row; ``tokens`` and ``mask`` are what came before."""
        devices = [logits.device] if logits.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=self.seed is not None):
            if self.seed is not None:
                self._restore(logits.device)
            chosen = self._choose(logits.float(), tokens, mask)
            if self.seed is not None:
                on_gpu = logits.device.type == "cuda"
                self._state = (
                    torch.cuda.get_rng_state(logits.device) if on_gpu else torch.get_rng_state()
                )
        return chosen

    def _restore(self, device: torch.device) -> None:
        assert self.seed is not None
        if self._state is None:
            torch.manual_seed(self.seed)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(self._state, device)
        else:
            torch.set_rng_state(self._state)

    def _choose(self, logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        temperature = self.temperature if self.do_sample else 0.0
        filters: dict[str, Any] = (
            {"top_k": self.top_k, "top_p": self.top_p} if self.do_sample else {}
        )
        if self.repetition_penalty == 1.0 and self.freq_penalty == 0.0:
            return sample_logits(logits, temperature=temperature, **filters)
        filters |= {
            "freq_penalty": self.freq_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        rows = [
            sample_logits(row[None], temperature=temperature, tokens=t[m][None], **filters)
            for row, t, m in zip(logits, tokens, mask, strict=True)
        ]
        return torch.cat(rows)
