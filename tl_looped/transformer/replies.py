"""What a generation gives back: tokens, an embedding or text; whole, or in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.transformer.generation_options import GenerationOptions
from tl_looped.transformer.stopping import Ends

if TYPE_CHECKING:
    from tl_looped.transformer.text_loop import TextLoop

_HALF = "\ufffd"  # what a tokenizer writes for a part of a character


@dataclass
class Job:
    """One call of ``generate``: checked, and in tokens.

    Args:
        tokens: Of the prompt; none of an embedding.
        embeds: The embedding that was given in place of tokens.
        mask: Real positions of the prompt.
        n_new: Most new tokens.
        ends: Where each row's reply ends.
        fill: What stands after the end of a row.
        cache: Keys and values that the steps keep.
        options: As asked for.
        form: ``"str"``, ``"tokens"`` or ``"embeds"``.
        many: Texts come as a list even if there is one.
        reply_only: The prompt is left out.
    """

    tokens: Int[Tensor, "batch ids"]
    embeds: Float[Tensor, "batch pos d_model"] | None
    mask: Bool[Tensor, "batch pos"]
    n_new: int
    ends: Ends
    fill: int
    cache: LoopedKeyValueCache | None
    options: GenerationOptions
    form: str
    many: bool
    reply_only: bool


def whole_output(model: TextLoop, job: Job, new: Int[Tensor, "batch new"]) -> Any:
    """Prompt and reply, in the form that was asked for."""
    if job.form == "str":
        return job_texts(model, job, new)
    if job.form == "embeds":
        prompt = model.embed(job.tokens) if job.embeds is None else job.embeds
        return torch.cat((prompt, model.embed(new)), 1)
    return new if job.reply_only else torch.cat((job.tokens, new), 1)


def with_logits(job: Job, new: Int[Tensor, "batch new"], logits: Sequence[Tensor] | None) -> Any:
    """All tokens and, if there are any, the logits of each step, as transformers gives them."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    sequences: Any = torch.cat((job.tokens, new), 1)
    steps: Any = None if logits is None else tuple(logits)
    return GenerateDecoderOnlyOutput(sequences=sequences, logits=steps)


def activations(model: TextLoop, job: Job, new: Int[Tensor, "batch new"]) -> Any:
    """The cache of a run of prompt and reply."""
    options, tokens = job.options, torch.cat((job.tokens, new), 1)
    state = options.initial_state
    _, cache = model.run_with_cache(
        tokens,
        attention_mask=torch.cat((job.mask, torch.ones_like(new, dtype=torch.bool)), 1),
        n_recurrences=options.n_recurrences,
        initial_state=state[:, : tokens.shape[1]] if isinstance(state, Tensor) else state,
        state_seed=options.state_seed,
        names_filter=options.names_filter,
        device=options.device,
    )
    return cache


def job_texts(model: TextLoop, job: Job, new: Int[Tensor, "batch new"]) -> str | list[str]:
    """Text of every row up to its end."""
    texts = [_text(model, job, row, reply) for row, reply in enumerate(new.tolist())]
    return texts if job.many or len(texts) > 1 else texts[0]


def _text(model: TextLoop, job: Job, row: int, reply: list[int]) -> str:
    length = job.ends.lengths[row]
    ids = reply if length is None else reply[:length]
    if not job.reply_only and job.embeds is None:
        prompt = job.tokens[row][job.mask[row]].tolist()
        ids = [token for token in prompt if token not in job.ends.special] + ids
    return str(model.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class Pieces:
    """A reply in pieces, which together are the whole output.

    A tokenizer may write a token after others otherwise than alone, and a character may be of
    several tokens. So what there is so far is written each time, and a piece of text is what came
    anew, up to the last whole character.

    Args:
        model: Its tokenizer writes.
        job: Of the call.
    """

    def __init__(self, model: TextLoop, job: Job) -> None:
        self.model, self.job = model, job
        self.new = job.tokens[:, :0]
        self._given = 0  # tokens in earlier pieces
        self._written = [0] * len(job.tokens)  # characters of each row in earlier pieces

    def add(self, token: Int[Tensor, " batch"]) -> None:
        """Take in the next token of every row."""
        self.new = torch.cat((self.new, token[:, None]), 1)

    @property
    def waiting(self) -> int:
        """Tokens for the next piece."""
        n = self.new.shape[1] - self._given
        begins = self._given == 0 and not self.job.reply_only
        return n + self.job.tokens.shape[1] if begins and n else n

    def take(self) -> Any:
        """The next piece."""
        begins, start = self._given == 0, self._given
        self._given = self.new.shape[1]
        if self.job.form == "str":
            return self._text(last=False)
        new = self.new[:, start:]
        with_prompt = begins and not self.job.reply_only
        return torch.cat((self.job.tokens, new), 1) if with_prompt else new

    def rest(self) -> Any:
        """Text of a part of a character at the end, or None."""
        if self.job.form != "str":
            return None
        text = self._text(last=True)
        return text if any(text) else None

    def _text(self, last: bool) -> str | list[str]:
        pieces = []
        for row, reply in enumerate(self.new.tolist()):
            text = _text(self.model, self.job, row, reply)
            text = text if last else text.rstrip(_HALF)
            pieces.append(text[self._written[row] :])
            self._written[row] = max(self._written[row], len(text))
        return pieces if self.job.many or len(pieces) > 1 else pieces[0]
