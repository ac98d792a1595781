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

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.checks import described, one_of, whole
from tl_looped.errors import InputError, TokenizerError
from tl_looped.model.bos import adds_bos
from tl_looped.model.exit_rules import ExitResult
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.transformer.generation_options import GenerationOptions
from tl_looped.transformer.prompt import Prompt, check_mask, read_prompt
from tl_looped.transformer.reading import Chats, Texts, Tokens, read_input
from tl_looped.transformer.replies import Job, Pieces, activations, whole_output, with_logits
from tl_looped.transformer.run_options import check_cache, check_state
from tl_looped.transformer.stopping import Ends, checked_criteria, checked_strings, end_of_turn
from tl_looped.transformer.tokenizing import SIDES, pad_id

if TYPE_CHECKING:
    from tl_looped.transformer.text_loop import TextLoop

_FORMS = ("input", "str", "tokens", "embeds")


def generate(
    model: TextLoop,
    input: Any,
    n_new: int,
    options: GenerationOptions,
    fill: int | None = None,
    as_dict: bool = False,
) -> Any:
    """All new tokens of a prompt at once; see :meth:`LoopedTransformer.generate`.

    Args:
        model: The model.
        input: The prompt.
        n_new: Most new tokens.
        options: How.
        fill: What fills up a row; as ``generate`` has it if None.
        as_dict: Return transformers' output, even without logits.
    """
    job = _job(model, input, n_new, options)
    job.fill = job.fill if fill is None else fill
    steps = list(_new_tokens(model, job))
    new = torch.stack([step.tokens for step in steps], 1) if steps else job.tokens[:, :0]
    if options.output_logits or as_dict:
        logits = [cast(Tensor, step.logits) for step in steps] if options.output_logits else None
        output = with_logits(job, new, logits)
    else:
        output = whole_output(model, job, new)
    if options.exit_rule is not None:
        left = [cast(Tensor, step.left) for step in steps]
        output = ExitResult(output, torch.stack(left, 1) if left else new)
    more = []
    if options.return_cache:
        more.append(activations(model, job, new))
    if options.return_input_tokens:
        more.append(job.tokens if job.embeds is None else job.embeds)
    return (output, *more) if more else output


def generate_stream(
    model: TextLoop, input: Any, n_new: int, n_per_piece: int, options: GenerationOptions
) -> Iterator[Any]:
    """The same in pieces; the call is checked now, and runs when the first piece is taken."""
    for name in ("output_logits", "return_cache", "return_input_tokens"):
        if getattr(options, name):
            raise InputError(f"{name} is for generate: a stream gives prompt and reply alone")
    if options.return_type == "tensor":  # HookedTransformer's word for it, in streams
        options = replace(options, return_type="tokens")
    job = _job(model, input, n_new, options)
    if job.embeds is not None or job.form == "embeds":
        raise InputError("a stream is of text or tokens: generate takes and gives embeddings")
    return _pieces(model, job, whole(n_per_piece, "max_tokens_per_yield", 1))


def hf_generate(model: TextLoop, input: Any, n_new: int, given: Mapping[str, Any]) -> Any:
    """As transformers would; see :meth:`LoopedTransformer.hf_generate`."""
    options = dict(given)
    if (kept := options.pop("past_key_values", None)) is not None:
        options["past_kv_cache"] = kept
    if options.pop("use_cache", None) is False:
        options["use_past_kv_cache"] = False
    fill = _padding(model, options.pop("pad_token_id", None))
    tokenizer = options.pop("tokenizer", None)  # transformers wants it for stop_strings
    if tokenizer is not None and tokenizer is not model.tokenizer:
        raise InputError("tokenizer= is another one than model.tokenizer: set_tokenizer() sets it")
    options.setdefault("verbose", False)
    asked = GenerationOptions.given(
        "hf_generate", {**options, "return_type": options.get("return_type") or "input"}
    )
    is_text = not isinstance(input, Tensor) and not isinstance(read_input(input), Tokens)
    if is_text and asked.prepend_bos is None and model.tokenizer is not None:
        asked = replace(asked, prepend_bos=adds_bos(model.tokenizer))
    as_dict = asked.output_logits or asked.return_dict_in_generate
    if is_text and asked.return_type != "tokens":
        asked, as_dict = replace(asked, output_logits=False), False
    return generate(model, input, n_new, asked, fill, as_dict)


def _padding(model: TextLoop, given: Any) -> int | None:
    """What ``hf_generate`` fills up rows with: transformers' ``pad_token_id``, or EOS."""
    if given is None:
        return getattr(model.tokenizer, "eos_token_id", None)
    return whole(given, "pad_token_id", 0, model.cfg.d_vocab - 1)


def _pieces(model: TextLoop, job: Job, size: int) -> Iterator[Any]:
    pieces = Pieces(model, job)
    for step in _new_tokens(model, job):
        pieces.add(step.tokens)
        if pieces.waiting >= size:
            yield pieces.take()
    if pieces.waiting:
        yield pieces.take()
    if (rest := pieces.rest()) is not None:
        yield rest


# -- the steps ------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """The next token of every row, its logits if asked for, and where it left the loop."""

    tokens: Tensor
    logits: Tensor | None
    left: Tensor | None


def _new_tokens(model: TextLoop, job: Job) -> Iterator[_Step]:
    options, cache = job.options, job.cache
    tokens, mask, sampler = job.tokens, job.mask, options.sampler()
    n_embeds = 0 if job.embeds is None else job.embeds.shape[1]
    prefix = 0 if cache is None else cache.length
    progress = tqdm(range(job.n_new), disable=not options.verbose, desc="generating")
    for _ in progress:
        done = 0 if cache is None else cache.length - prefix
        with torch.no_grad():
            logits, left = _step(model, job, _unread(model, job, tokens, mask, done), prefix + done)
            new = sampler.next_tokens(logits[:, -1], tokens, mask[:, n_embeds:])
        new = torch.where(job.ends.done(new.device), job.fill, new)
        tokens = torch.cat((tokens, new[:, None]), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        job.ends.note(new, job.ends.by_criteria(tokens, logits[:, -1]))
        if cache is not None and options.verbose:
            progress.set_postfix_str(f"KV cache {cache.nbytes / 2**20:.1f} MiB", refresh=False)
        yield _Step(new, logits[:, -1].clone() if options.output_logits else None, left)
        if None not in job.ends.lengths:
            break


def _unread(model: TextLoop, job: Job, tokens: Tensor, mask: Tensor, done: int) -> Prompt:
    """What comes behind the columns that are in the cache."""
    mask = mask[:, done:]
    if job.embeds is None:
        return Prompt(tokens[:, done:], mask)
    n = job.embeds.shape[1]
    if done >= n:
        return Prompt(tokens[:, done - n :], mask)
    return Prompt(tokens, mask, torch.cat((job.embeds[:, done:], model.embed(tokens)), 1))


def _step(model: TextLoop, job: Job, prompt: Prompt, start: int) -> tuple[Tensor, Tensor | None]:
    """Logits of new tokens, the first of which has column ``start``."""
    options, state = job.options, job.options.initial_state
    if isinstance(state, Tensor):
        assert prompt.mask is not None
        state = state[:, start : start + prompt.mask.shape[1]]
    out = model(
        prompt,
        n_recurrences=options.n_recurrences,
        initial_state=state,
        state_seed=options.state_seed,
        past_kv_cache=job.cache,
        exit_rule=options.exit_rule,
    )
    if isinstance(out, ExitResult):
        return cast(Tensor, out.output), out.recurrence[:, -1]
    return out, None


# -- before ---------------------------------------------------------------------------------------


def _job(model: TextLoop, input: Any, n_new: int, options: GenerationOptions) -> Job:
    """Check a call, and turn its prompt into tokens."""
    n_new = whole(n_new, "max_new_tokens")
    options = replace(
        options,
        # A stream goes on as it began, whatever the caller sets in between.
        n_recurrences=model._loop_at(options.n_recurrences).R,
        initial_state=check_state("initial_state", options.initial_state),
        return_type=one_of(options.return_type, "return_type", _FORMS, InputError),
    )
    if options.padding_side is not None:
        one_of(options.padding_side, "padding_side", SIDES)
    options.sampler()  # checks its arguments
    cache = _cache(model, options)
    embeds = input if isinstance(input, Tensor) and input.is_floating_point() else None
    given = None if embeds is not None else read_input(input)
    prompt = _read_embeds(model, embeds, options, cache) if given is None else None
    if given is not None and prompt is None:
        prompt = _read(model, given, options, cache)
    assert prompt is not None
    form = options.return_type
    if form == "input":
        form = "embeds" if given is None else "tokens" if isinstance(given, Tokens) else "str"
    ends = _ends(model, options, len(prompt.tokens), form, given is None)
    job = Job(
        tokens=prompt.tokens,
        embeds=prompt.embeds,
        mask=_left_padded(prompt),
        n_new=n_new,
        ends=ends,
        fill=_fill(model, options, ends.tokens),
        cache=cache,
        options=options,
        form=form,
        many=given is not None and given.many,
        reply_only=isinstance(given, Chats),
    )
    _check_lengths(model, job)
    _check_cached_run(model, job)
    return job


def _read(
    model: TextLoop,
    given: Texts | Chats | Tokens,
    options: GenerationOptions,
    cache: LoopedKeyValueCache | None,
) -> Prompt:
    prepend_bos, side = options.prepend_bos, options.padding_side
    if not isinstance(given, Tokens):
        side = "left"
    if given == Texts([""], many=False) and prepend_bos is None and not (cache and cache.length):
        if model.tokenizer is not None and model.tokenizer.bos_token_id is None:
            raise TokenizerError(
                "without a prompt a text begins with BOS, and the tokenizer has none: give a prompt"
            )
        prepend_bos = True
    if options.attention_mask is not None and isinstance(given, Tokens):
        side = None  # the mask says where the padding is
    return read_prompt(model, given, options.attention_mask, prepend_bos, side, past=cache)


def _read_embeds(
    model: TextLoop,
    embeds: Tensor | None,
    options: GenerationOptions,
    cache: LoopedKeyValueCache | None,
) -> Prompt:
    """A prompt that is given by its embedding."""
    width = model.cfg.d_model
    if embeds is None or embeds.ndim != 3 or embeds.shape[-1] != width or 0 in embeds.shape:
        raise InputError(
            "tokens must be integers of shape [batch, pos], or an embedding [batch, pos, "
            f"{width}] must be given, got {described(embeds)}"
        )
    mask = check_mask(model, options.attention_mask, embeds.shape[0], embeds.shape[1], cache)
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=model.W_E.device)
    none = torch.zeros(len(embeds), 0, dtype=torch.long, device=model.W_E.device)
    return Prompt(none, mask, embeds.to(model.W_E))


def _left_padded(prompt: Prompt) -> Bool[Tensor, "batch pos"]:
    """The mask of a prompt that ends in real tokens."""
    if prompt.mask is None:
        return torch.ones_like(prompt.tokens, dtype=torch.bool)
    if not bool(prompt.mask[:, -1].all()):
        raise InputError("generate continues from the last position: pad on the left")
    return prompt.mask


def _cache(model: TextLoop, options: GenerationOptions) -> LoopedKeyValueCache | None:
    given = check_cache(model, options.past_kv_cache)
    if not options.use_past_kv_cache:
        if given is not None:
            raise InputError("past_kv_cache is given, but use_past_kv_cache is False")
        return None
    if given is not None and given.frozen:
        raise InputError("past_kv_cache is frozen, and generation extends it: unfreeze() it")
    return LoopedKeyValueCache() if given is None else given


def _check_lengths(model: TextLoop, job: Job) -> None:
    """Raise if the context or a given initial state does not hold prompt and reply."""
    # The last token is not run, unless for the activations.
    n_run = job.n_new if job.options.return_cache else job.n_new - 1
    cache, state = job.cache, job.options.initial_state
    n_columns = job.mask.shape[1] + n_run + (cache.length if cache else 0)
    if isinstance(state, Tensor) and (state.ndim != 3 or state.shape[1] < n_columns):
        raise InputError(
            f"initial_state must cover all {n_columns} positions of the generation, "
            f"got shape {tuple(state.shape)}"
        )
    n_tokens = int(job.mask.sum(-1).max()) + n_run
    if cache is not None and cache.mask is not None:
        n_tokens += int(cache.mask.sum(-1).max())
    if n_tokens > model.cfg.n_ctx:
        raise InputError(
            f"max_new_tokens={job.n_new} would run the model on {n_tokens} tokens, its context "
            f"holds {model.cfg.n_ctx}"
        )


def _check_cached_run(model: TextLoop, job: Job) -> None:
    """Raise if a run of prompt and reply would not be the generation's own, or cannot be kept."""
    options = job.options
    if options.device is not None:
        try:
            torch.device(options.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"device is where return_cache keeps activations: {error}") from error
    if not options.return_cache:
        return
    model.view_at(options.n_recurrences).names_filter_set(options.names_filter)
    differs = {
        "past_kv_cache": options.past_kv_cache is not None,
        "exit_rule": options.exit_rule is not None,
        "an embedding as input": job.embeds is not None,
    }
    for what, is_so in differs.items():
        if is_so:
            raise InputError(
                f"return_cache runs the tokens of prompt and reply once more, which with {what} "
                "is not the run that made them: cache the steps by model.add_caching_hooks()"
            )


# -- the end --------------------------------------------------------------------------------------


def _ends(
    model: TextLoop, options: GenerationOptions, n_rows: int, form: str, from_embeds: bool
) -> Ends:
    """When rows end, in tokens."""
    strings = checked_strings(options.stop_strings)
    criteria = checked_criteria(options.stopping_criteria)
    if model.tokenizer is None:
        if form == "str":
            raise InputError("return_type='str' needs a tokenizer, and the model has none")
        if strings:
            raise InputError("stop_strings need a tokenizer, and the model has none")
    if from_embeds and criteria:
        raise InputError("stopping_criteria read the prompt's tokens: an embedding has none")
    return Ends(n_rows, _stop_tokens(model, options), strings, model.tokenizer, criteria)


def _stop_tokens(model: TextLoop, options: GenerationOptions) -> list[int]:
    if not options.stop_at_eos:
        return []
    if options.eos_token_id is not None:
        return _ids(options.eos_token_id)
    found = stop_tokens(model)
    otherwise = options.stop_strings or options.stopping_criteria
    if not found and model.tokenizer is not None and not otherwise:
        raise InputError("stop_at_eos=True, but there is no EOS token: pass eos_token_id=")
    return found


def _fill(model: TextLoop, options: GenerationOptions, stop: list[int]) -> int:
    """What stands after the end of a row, as in TransformerLens."""
    eos = getattr(model.tokenizer, "eos_token_id", None)
    if not stop:
        return pad_id(model)
    several = options.eos_token_id is not None and len(stop) > 1
    return int(eos) if several and eos is not None else stop[0]


def stop_tokens(model: TextLoop) -> list[int]:
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
