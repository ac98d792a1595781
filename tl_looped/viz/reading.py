"""One prompt of a run's cache, without padding, for the views."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import whole
from tl_looped.errors import InputError
from tl_looped.metrics.run_view import RunView
from tl_looped.transformer.reading import Chats, Texts, n_prompts, read_input


class PromptView:
    """One prompt of a run.

    Args:
        cache: Of the run.
        prompt: Row of the batch, 0-based, or from the end if negative.

    Raises:
        InputError: at the first activation that is read, for a ``prompt`` that is out of range.
    """

    def __init__(self, cache: LoopedActivationCache, prompt: int) -> None:
        self.run = RunView(cache)
        self.loop = cache.loop
        self._prompt = prompt

    def activation(self, name: str, i: int) -> Float[Tensor, "..."]:
        """An activation of effective layer ``i``, padding included.

        Raises:
            MissingActivationError: if the cache lacks it.
            InputError: a ``prompt`` that the batch does not have, or a cache of some positions.
        """
        found = self.run(name, i)
        return found[counted("prompt", self._prompt, len(found))].detach()

    def heads(self, i: int) -> Float[Tensor, "head query key"]:
        """The patterns of effective layer ``i``, of real tokens alone."""
        pattern = self.activation("pattern", i)
        real = self.real(pattern.shape[-1])
        if real is None:
            return pattern
        real = real.to(pattern.device)
        return pattern[:, real][:, :, real]

    def real(self, length: int) -> Bool[Tensor, " pos"] | None:
        """Which of the prompt's positions are real; None if all are."""
        mask = self.run.mask
        if mask is None:
            return None
        row = mask[counted("prompt", self._prompt, len(mask))]
        return row if len(row) == length else None

    def tokens(self, given: Any, length: int) -> tuple[str, ...]:
        """The prompt's tokens, one a real position.

        Args:
            given: Strings with or without those of the padding; or the prompt itself, as the model
                takes it: its text, its conversation, its token ids.
            length: Positions of the run, padding included.

        Raises:
            InputError: if they are of several prompts, or their number is not that of the
                positions.
        """
        tokens = self._strings(given)
        real = self.real(length)
        n_real = length if real is None else int(real.sum())
        if len(tokens) == n_real:
            return tuple(tokens)
        if real is not None and len(tokens) == length:
            return tuple(token for token, keep in zip(tokens, real.tolist(), strict=True) if keep)
        padded = "" if real is None else f" ({n_real} without padding)"
        raise InputError(
            f"tokens must be one a position: {length} positions{padded}, {len(tokens)} tokens; "
            "model.to_str_tokens(prompt) gives them, with the run's prepend_bos"
        )

    def _strings(self, given: Any) -> list[str]:
        found = read_input(given)
        if isinstance(found, Texts) and found.many:
            return found.texts
        n = 1 if isinstance(found, Texts) else n_prompts(found)
        if n != 1:
            raise InputError(
                f"tokens must be of the one prompt that is shown, got {n}: give that prompt, or "
                "its tokens as strings"
            )
        if isinstance(found, Chats):
            found = Chats(found.chats, many=False)
        tokens: list[str] = self.run.model.to_str_tokens(found)
        return tokens


def counted(argument: str, index: Any, n: int) -> int:
    """An index from either end as one from the start.

    Raises:
        InputError: if it is out of range, or no integer.
    """
    fix = "tokens and texts are read from the cache" if isinstance(index, str) else ""
    return whole(index, argument, -n, n - 1, fix=fix) % n
