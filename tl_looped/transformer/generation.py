"""Text generation.

With the key-value cache (the default) a step runs the newest token alone; without it, the whole
sequence. Both give the same tokens, up to ties that rounding decides: the random initial state is a
function of seed and position, so a new position starts from the same state either way. Hooks that
are attached fire at every step, and with the cache they see one position from the second step on.

With an exit rule and the cache, each row's newest token leaves the loop when the rule says so;
later tokens read its keys and values at the recurrence where it left. Without the cache every step
is a plain forward pass with the rule, in which each position leaves by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.errors import InputError
from tl_looped.model.exit_rules import ExitResult, ExitRule
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.transformer.exiting import ExitingMixin
from tl_looped.transformer.prompt import read_prompt
from tl_looped.transformer.reading import Chats, Given, Tokens, read_input
from tl_looped.transformer.run_options import check_cache
from tl_looped.transformer.sampling import Sampler
from tl_looped.transformer.stopping import Ends, checked_strings, end_of_turn
from tl_looped.transformer.turns import in_turn


@dataclass(kw_only=True)
class GenerationOptions:
    """Everything that ``generate`` and ``generate_stream`` take besides prompt and length."""

    stop_at_eos: bool = True
    eos_token_id: int | list[int] | None = None
    do_sample: bool = True
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 1.0
    freq_penalty: float = 0.0
    repetition_penalty: float = 1.0
    use_past_kv_cache: bool = True
    prepend_bos: bool | None = None
    return_type: str = "input"
    verbose: bool = True
    attention_mask: Tensor | None = None
    n_recurrences: int | None = None
    initial_state: Tensor | str | None = None
    state_seed: int | None = None
    seed: int | None = None
    past_kv_cache: LoopedKeyValueCache | None = None
    exit_rule: ExitRule | None = None
    stop_strings: Any = None

    def sampler(self) -> Sampler:
        """How tokens are chosen."""
        names = (field.name for field in fields(Sampler))
        return Sampler(**{name: getattr(self, name) for name in names})


@dataclass
class _Job:
    """One call: checked, and in tokens."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    n_new: int
    ends: Ends
    fill: int  # what stands behind the end of a row
    cache: LoopedKeyValueCache | None
    options: GenerationOptions
    in_text: bool  # what comes out is text
    many: bool  # ... as a list
    reply_only: bool


class GenerationMixin(ExitingMixin):
    """``generate`` and ``generate_stream`` with TransformerLens's arguments."""

    generation_config: dict[str, Any]

    @in_turn
    @torch.no_grad()
    def generate(
        self,
        input: Any,
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | list[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        return_type: str = "input",
        verbose: bool = True,
        attention_mask: Tensor | None = None,
        n_recurrences: int | None = None,
        initial_state: Tensor | str | None = None,
        state_seed: int | None = None,
        seed: int | None = None,
        past_kv_cache: LoopedKeyValueCache | None = None,
        exit_rule: ExitRule | None = None,
        stop_strings: Any = None,
    ) -> Any:
        """Continue one or more prompts.

        Args:
            input: As for the model itself: text, several texts (padded on the left), tokens, or a
                conversation, or several, for the tokenizer's chat template.
            max_new_tokens: Most new tokens a row.
            stop_at_eos: End a row at a stop token; it is filled up with the first of them.
            eos_token_id: Stop token or tokens, in place of :meth:`stop_tokens`.
            do_sample: Sample; otherwise take the most likely token.
            top_k, top_p, temperature, freq_penalty, repetition_penalty: As in TransformerLens; the
                penalties count real tokens only.
            use_past_kv_cache: Keep keys and values of earlier tokens.
            prepend_bos: Overrides ``cfg.default_prepend_bos`` for text. A chat template brings its
                own.
            return_type: ``"input"`` (as the input was), ``"str"`` or ``"tokens"``.
            verbose: Show progress, and the cache's memory.
            attention_mask: Mask of a left-padded token batch.
            n_recurrences: Recurrences of every step.
            initial_state: ``"zeros"``, or a state for every position up to the last generated.
            state_seed: Seed of the random initial state.
            seed: Seed of the sampling; the global generator is left alone if given.
            past_kv_cache: A cache to use, for instance one that shares slots,
                ``LoopedKeyValueCache(recurrence_slots=1)``, or one that holds a prefix already.
            exit_rule: When tokens leave the loop.
            stop_strings: Text or texts that end a row once its reply contains one; the token that
                completes it stays. It is filled up as behind a stop token, or with padding.

        Returns:
            Prompt and continuation, as text or as tokens ``[batch, pos]``; of a conversation the
            reply alone. In text, special tokens of the prompt and the one that ends a row are left
            out; others of the reply are written, so that no marker vanishes from a text that goes
            on behind it. With ``exit_rule`` an :class:`ExitResult` of that and
            the recurrence after which each new token's prediction left the loop ``[batch, new]``.
        """
        options = GenerationOptions(
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            do_sample=do_sample,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            freq_penalty=freq_penalty,
            repetition_penalty=repetition_penalty,
            use_past_kv_cache=use_past_kv_cache,
            prepend_bos=prepend_bos,
            return_type=return_type,
            verbose=verbose,
            attention_mask=attention_mask,
            n_recurrences=n_recurrences,
            initial_state=initial_state,
            state_seed=state_seed,
            seed=seed,
            past_kv_cache=past_kv_cache,
            exit_rule=exit_rule,
            stop_strings=stop_strings,
        )
        job = self._job(input, max_new_tokens, options)
        with self._call_with_recurrences(n_recurrences):
            steps = list(self._new_tokens(job))
        new = torch.stack([token for token, _ in steps], 1) if steps else job.tokens[:, :0]
        output = self._as_asked(job, new, with_prompt=not job.reply_only)
        if exit_rule is None:
            return output
        left = [cast(Tensor, exit_step) for _, exit_step in steps]
        return ExitResult(output, torch.stack(left, 1) if left else job.tokens[:, :0])

    @in_turn
    def generate_stream(
        self,
        input: Any,
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        **options: Any,
    ) -> Iterator[Any]:
        """As :meth:`generate`, piece by piece, in TransformerLens's way.

        Args:
            input, max_new_tokens: As in :meth:`generate`.
            max_tokens_per_yield: Most tokens in a piece.
            **options: As in :meth:`generate`; of an ``exit_rule`` the steps are not returned.

        Yields:
            Tokens ``[batch, n]``, or texts. The first piece includes the prompt (but for a
            conversation), later ones hold new tokens only. The model may be used between them.
        """
        job = self._job(input, max_new_tokens, GenerationOptions(**options))
        if max_tokens_per_yield < 1:
            raise InputError(f"max_tokens_per_yield must be at least 1, got {max_tokens_per_yield}")
        return self._pieces(job, max_tokens_per_yield)

    def _pieces(self, job: _Job, size: int) -> Iterator[Any]:
        piece: list[Tensor] = []
        with_prompt, start = not job.reply_only, 0
        for token, _ in self._new_tokens(job):
            piece.append(token)
            if len(piece) == size:
                yield self._as_asked(job, torch.stack(piece, 1), with_prompt, start)
                piece, with_prompt, start = [], False, start + size
        if piece:
            yield self._as_asked(job, torch.stack(piece, 1), with_prompt, start)

    # -- the steps -------------------------------------------------------------------------------

    def _new_tokens(self, job: _Job) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The next token of every row, and where its prediction left the loop."""
        options, cache = job.options, job.cache
        tokens, mask, sampler = job.tokens, job.mask, options.sampler()
        prefix = 0 if cache is None else cache.length
        progress = tqdm(range(job.n_new), disable=not options.verbose, desc="generating")
        for _ in progress:
            start = 0 if cache is None else cache.length - prefix
            with torch.no_grad():
                logits, left = self._step(job, tokens[:, start:], mask[:, start:], prefix + start)
                new = sampler.next_tokens(logits[:, -1], tokens, mask)
            new = torch.where(job.ends.done(new.device), job.fill, new)
            job.ends.note(new)
            tokens = torch.cat((tokens, new[:, None]), 1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            if cache is not None and options.verbose:
                progress.set_postfix_str(f"KV cache {cache.nbytes / 2**20:.1f} MiB", refresh=False)
            yield new, left
            if None not in job.ends.lengths:
                break

    def _step(
        self, job: _Job, tokens: Tensor, mask: Tensor, start: int
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of new tokens, the first of which has column ``start``."""
        options, state = job.options, job.options.initial_state
        if isinstance(state, Tensor):
            state = state[:, start : start + tokens.shape[1]]
        out = self(
            tokens,
            attention_mask=mask,
            n_recurrences=options.n_recurrences,
            initial_state=state,
            state_seed=options.state_seed,
            past_kv_cache=job.cache,
            exit_rule=options.exit_rule,
        )
        if isinstance(out, ExitResult):
            return cast(Tensor, out.output), out.steps[:, -1]
        return out, None

    # -- before and after ------------------------------------------------------------------------

    def _job(self, input: Any, n_new: int, options: GenerationOptions) -> _Job:
        """Check a call, and turn its prompt into tokens."""
        n_new = _integer("max_new_tokens", n_new)
        if n_new < 0:
            raise InputError(f"max_new_tokens must be at least 0, got {n_new}")
        if options.n_recurrences is None:
            # A stream goes on as it began, whatever the caller sets in between.
            options = replace(options, n_recurrences=self.loop.R)
        kind = options.return_type
        if kind not in ("input", "str", "tokens"):
            raise InputError(f"return_type must be input, str or tokens, got {kind!r}")
        if self.tokenizer is None and kind == "str":
            raise InputError("return_type='str' needs a tokenizer")
        options.sampler()  # checks its arguments
        given = read_input(input)
        in_text, chat = not isinstance(given, Tokens), isinstance(given, Chats)
        cache = self._generation_cache(options)
        tokens, mask = self._left_padded(given, options, cache)
        total = tokens.shape[1] + n_new - 1
        self._check_state_covers(options.initial_state, total + (cache.length if cache else 0))
        self._check_context(mask, cache, n_new)
        to_text = in_text if kind == "input" else kind == "str"
        strings = checked_strings(options.stop_strings)
        if strings and self.tokenizer is None:
            raise InputError("stop_strings need a tokenizer, and the model has none")
        stop = self._stop_tokens(options)
        ends = Ends(len(tokens), stop, strings, self.tokenizer)
        fill = stop[0] if stop else self._pad_id()
        return _Job(tokens, mask, n_new, ends, fill, cache, options, to_text, given.many, chat)

    def _left_padded(
        self, given: Given, options: GenerationOptions, cache: LoopedKeyValueCache | None
    ) -> tuple[Tensor, Tensor]:
        side = None if isinstance(given, Tokens) else "left"
        prompt = read_prompt(
            self, given, options.attention_mask, options.prepend_bos, side, past=cache
        )
        tokens, mask = prompt.tokens, prompt.mask
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if not bool(mask[:, -1].all()):
            raise InputError("generate continues from the last position: pad on the left")
        return tokens, mask

    def _generation_cache(self, options: GenerationOptions) -> LoopedKeyValueCache | None:
        given = options.past_kv_cache
        if not options.use_past_kv_cache:
            if given is not None:
                raise InputError("past_kv_cache is given, but use_past_kv_cache is False")
            return None
        check_cache(self, given)
        if given is not None and given.frozen:
            raise InputError("past_kv_cache is frozen, and generation extends it: unfreeze() it")
        return LoopedKeyValueCache() if given is None else given

    def _stop_tokens(self, options: GenerationOptions) -> list[int]:
        if not options.stop_at_eos:
            return []
        given = options.eos_token_id
        if given is None:
            found = self.stop_tokens()
            if not found and self.tokenizer is not None and not options.stop_strings:
                raise InputError("stop_at_eos=True, but there is no EOS token: pass eos_token_id=")
            return found
        return [_integer("eos_token_id", token) for token in _listed(given)]

    def stop_tokens(self) -> list[int]:
        """Tokens that end a generated text, unless ``eos_token_id`` says otherwise.

        The tokenizer's EOS; those of the checkpoint's ``generation_config.json``; and the special
        token that the chat template writes behind a reply, the end of a turn.
        """
        name = "eos_token_id"
        of_file = [_integer(name, token) for token in _listed(self.generation_config.get(name))]
        own = getattr(self.tokenizer, name, None)
        turn = None if self.tokenizer is None else end_of_turn(self.tokenizer)
        found = [own, *of_file, turn]
        return list(dict.fromkeys(int(token) for token in found if token is not None))

    def _check_context(self, mask: Tensor, cache: LoopedKeyValueCache | None, n_new: int) -> None:
        longest = int(mask.sum(-1).max()) + n_new - 1
        if cache is not None and cache.mask is not None:
            longest += int(cache.mask.sum(-1).max())
        if longest > self.cfg.n_ctx:
            raise InputError(
                f"max_new_tokens={n_new} would run the model on {longest} tokens, its context "
                f"holds {self.cfg.n_ctx}"
            )

    def _check_state_covers(self, state: Tensor | str | None, length: int) -> None:
        if isinstance(state, Tensor) and (state.ndim != 3 or state.shape[1] < length):
            raise InputError(
                f"initial_state must cover all {length} positions of the generation, "
                f"got shape {tuple(state.shape)}"
            )

    def _as_asked(
        self, job: _Job, new: Int[Tensor, "batch new"], with_prompt: bool, start: int = 0
    ) -> Any:
        """New tokens, the first of which is number ``start``, with the prompt or without it."""
        if not job.in_text:
            return torch.cat((job.tokens, new), 1) if with_prompt else new
        texts = []
        for row, reply in enumerate(new.tolist()):
            length = job.ends.lengths[row]
            ids = reply if length is None else reply[: max(0, length - start)]
            if with_prompt:
                prompt = job.tokens[row][job.mask[row]].tolist()
                ids = [token for token in prompt if token not in job.ends.special] + ids
            texts.append(str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
        return texts if job.many or len(texts) > 1 else texts[0]


def _listed(value: Any) -> list[Any]:
    """One or several values, or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _integer(name: str, value: Any) -> int:
    """An integer, numpy's too; True and False are none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be an integer, got {value!r}") from None
