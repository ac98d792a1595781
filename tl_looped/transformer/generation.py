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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.checks import Seed, one_of, whole
from tl_looped.errors import InputError
from tl_looped.model.exit_rules import ExitResult, ExitRule
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.transformer.prompt import Prompt, read_prompt
from tl_looped.transformer.reading import Chats, Tokens, read_input
from tl_looped.transformer.run_options import check_cache, check_state
from tl_looped.transformer.sampling import Sampler
from tl_looped.transformer.stopping import Ends, checked_strings, end_of_turn
from tl_looped.transformer.tokenizing import pad_id

if TYPE_CHECKING:
    from tl_looped.transformer.looped_transformer import LoopedTransformer


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Everything that ``generate`` and ``generate_stream`` take besides prompt and length.

    :meth:`LoopedTransformer.generate` explains them; a test compares its signature with this one.
    """

    stop_at_eos: bool = True
    eos_token_id: int | Sequence[int] | None = None
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
    attention_mask: Any = None
    n_recurrences: int | None = None
    initial_state: Any = None
    state_seed: Seed | None = None
    seed: int | None = None
    past_kv_cache: LoopedKeyValueCache | None = None
    exit_rule: ExitRule | None = None
    stop_strings: Any = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> GenerationOptions:
        """The options among the arguments of a call."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    def sampler(self) -> Sampler:
        """How tokens are chosen."""
        return Sampler(**{field.name: getattr(self, field.name) for field in fields(Sampler)})


@dataclass
class _Job:
    """One call: checked, and in tokens."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    n_new: int
    ends: Ends
    fill: int  # what stands after the end of a row
    cache: LoopedKeyValueCache | None
    options: GenerationOptions
    in_text: bool  # what comes out is text
    many: bool  # ... as a list
    reply_only: bool


def generate(model: LoopedTransformer, input: Any, n_new: int, options: GenerationOptions) -> Any:
    """All new tokens of a prompt at once; see :meth:`LoopedTransformer.generate`."""
    job = _job(model, input, n_new, options)
    steps = list(_new_tokens(model, job))
    new = torch.stack([token for token, _ in steps], 1) if steps else job.tokens[:, :0]
    output = _as_asked(model, job, new, with_prompt=not job.reply_only)
    if options.exit_rule is None:
        return output
    left = [cast(Tensor, exit_step) for _, exit_step in steps]
    return ExitResult(output, torch.stack(left, 1) if left else job.tokens[:, :0])


def generate_stream(
    model: LoopedTransformer, input: Any, n_new: int, n_per_piece: int, options: GenerationOptions
) -> Iterator[Any]:
    """The same in pieces; the call is checked now, and runs when the first piece is taken."""
    job = _job(model, input, n_new, options)
    return _pieces(model, job, whole(n_per_piece, "max_tokens_per_yield", 1))


def _pieces(model: LoopedTransformer, job: _Job, size: int) -> Iterator[Any]:
    piece: list[Tensor] = []
    with_prompt, start = not job.reply_only, 0
    for token, _ in _new_tokens(model, job):
        piece.append(token)
        if len(piece) == size:
            yield _as_asked(model, job, torch.stack(piece, 1), with_prompt, start)
            piece, with_prompt, start = [], False, start + size
    if piece:
        yield _as_asked(model, job, torch.stack(piece, 1), with_prompt, start)


# -- the steps ------------------------------------------------------------------------------------


def _new_tokens(model: LoopedTransformer, job: _Job) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The next token of every row, and where its prediction left the loop."""
    options, cache = job.options, job.cache
    tokens, mask, sampler = job.tokens, job.mask, options.sampler()
    prefix = 0 if cache is None else cache.length
    progress = tqdm(range(job.n_new), disable=not options.verbose, desc="generating")
    for _ in progress:
        start = 0 if cache is None else cache.length - prefix
        with torch.no_grad():
            logits, left = _step(model, job, tokens[:, start:], mask[:, start:], prefix + start)
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
    model: LoopedTransformer, job: _Job, tokens: Tensor, mask: Tensor, start: int
) -> tuple[Tensor, Tensor | None]:
    """Logits of new tokens, the first of which has column ``start``."""
    options, state = job.options, job.options.initial_state
    if isinstance(state, Tensor):
        state = state[:, start : start + tokens.shape[1]]
    out = model(
        tokens,
        attention_mask=mask,
        n_recurrences=options.n_recurrences,
        initial_state=state,
        state_seed=options.state_seed,
        past_kv_cache=job.cache,
        exit_rule=options.exit_rule,
    )
    if isinstance(out, ExitResult):
        return cast(Tensor, out.output), out.recurrence[:, -1]
    return out, None


# -- before and after -----------------------------------------------------------------------------


def _job(model: LoopedTransformer, input: Any, n_new: int, options: GenerationOptions) -> _Job:
    """Check a call, and turn its prompt into tokens."""
    n_new = whole(n_new, "max_new_tokens")
    options = replace(
        options,
        # A stream goes on as it began, whatever the caller sets in between.
        n_recurrences=model._loop_at(options.n_recurrences).R,
        initial_state=check_state("initial_state", options.initial_state),
        return_type=one_of(options.return_type, "return_type", ("input", "str", "tokens")),
    )
    options.sampler()  # checks its arguments
    given, strings = read_input(input), checked_strings(options.stop_strings)
    if model.tokenizer is None:
        if options.return_type == "str":
            raise InputError("return_type='str' needs a tokenizer")
        if strings:
            raise InputError("stop_strings need a tokenizer, and the model has none")
    cache = _cache(model, options)
    side = None if isinstance(given, Tokens) else "left"
    prompt = read_prompt(
        model, given, options.attention_mask, options.prepend_bos, side, past=cache
    )
    tokens, mask = prompt.tokens, _left_padded(prompt)
    _check_lengths(model, mask, cache, n_new, options.initial_state)
    stop = _stop_tokens(model, options)
    in_text = not isinstance(given, Tokens)
    return _Job(
        tokens=tokens,
        mask=mask,
        n_new=n_new,
        ends=Ends(len(tokens), stop, strings, model.tokenizer),
        fill=stop[0] if stop else pad_id(model),
        cache=cache,
        options=options,
        in_text=in_text if options.return_type == "input" else options.return_type == "str",
        many=given.many,
        reply_only=isinstance(given, Chats),
    )


def _left_padded(prompt: Prompt) -> Bool[Tensor, "batch pos"]:
    """The mask of a prompt that ends in real tokens."""
    if prompt.mask is None:
        return torch.ones_like(prompt.tokens, dtype=torch.bool)
    if not bool(prompt.mask[:, -1].all()):
        raise InputError("generate continues from the last position: pad on the left")
    return prompt.mask


def _cache(model: LoopedTransformer, options: GenerationOptions) -> LoopedKeyValueCache | None:
    given = options.past_kv_cache
    if not options.use_past_kv_cache:
        if given is not None:
            raise InputError("past_kv_cache is given, but use_past_kv_cache is False")
        return None
    check_cache(model, given)
    if given is not None and given.frozen:
        raise InputError("past_kv_cache is frozen, and generation extends it: unfreeze() it")
    return LoopedKeyValueCache() if given is None else given


def _check_lengths(
    model: LoopedTransformer,
    mask: Bool[Tensor, "batch pos"],
    cache: LoopedKeyValueCache | None,
    n_new: int,
    state: Tensor | str | None,
) -> None:
    """Raise if the context or a given initial state does not hold prompt and reply."""
    n_columns = mask.shape[1] + n_new - 1 + (cache.length if cache else 0)
    if isinstance(state, Tensor) and (state.ndim != 3 or state.shape[1] < n_columns):
        raise InputError(
            f"initial_state must cover all {n_columns} positions of the generation, "
            f"got shape {tuple(state.shape)}"
        )
    n_tokens = int(mask.sum(-1).max()) + n_new - 1
    if cache is not None and cache.mask is not None:
        n_tokens += int(cache.mask.sum(-1).max())
    if n_tokens > model.cfg.n_ctx:
        raise InputError(
            f"max_new_tokens={n_new} would run the model on {n_tokens} tokens, its context "
            f"holds {model.cfg.n_ctx}"
        )


def _stop_tokens(model: LoopedTransformer, options: GenerationOptions) -> list[int]:
    if not options.stop_at_eos:
        return []
    if options.eos_token_id is not None:
        return _ids(options.eos_token_id)
    found = stop_tokens(model)
    if not found and model.tokenizer is not None and not options.stop_strings:
        raise InputError("stop_at_eos=True, but there is no EOS token: pass eos_token_id=")
    return found


def stop_tokens(model: LoopedTransformer) -> list[int]:
    """Tokens that end a generated text; see :meth:`LoopedTransformer.stop_tokens`."""
    tokenizer = model.tokenizer
    found = [
        *_ids(getattr(tokenizer, "eos_token_id", None)),
        *_ids(model.generation_config.get("eos_token_id")),
        *_ids(None if tokenizer is None else end_of_turn(tokenizer)),
    ]
    return list(dict.fromkeys(found))


def _ids(value: Any) -> list[int]:
    """One or several token ids, or none."""
    if value is None:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [whole(token, "eos_token_id", least=None) for token in values]


def _as_asked(
    model: LoopedTransformer,
    job: _Job,
    new: Int[Tensor, "batch new"],
    with_prompt: bool,
    start: int = 0,
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
        texts.append(str(model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
    return texts if job.many or len(texts) > 1 else texts[0]
