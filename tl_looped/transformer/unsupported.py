"""Arguments that TransformerLens or transformers take and this model cannot: refused by name.

A value that asks for nothing (None, ``output_attentions=False``, ``num_beams=1``) is no reason to
refuse a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from tl_looped.checks import shown
from tl_looped.errors import ArgumentTypeError

_CACHED = "run_with_cache keeps them, names_filter="
_NO_ENCODER = "the model is a decoder alone"
_ONE_WAY = "each row has one continuation, drawn token by token"

# Name: why not, and what to do; and the values, besides None, that ask for nothing.
_REASONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "pixel_values": ("the model reads text, no images", ()),
    "input_values": ("the model reads text, no audio", ()),
    "shortformer_pos_embed": ("positions are rotary and no part of the stream", ()),
    "input_ids": ("give the tokens as input", ()),
    "inputs_embeds": ("give the embedding as input, with start_at_layer=0", ()),
    "position_ids": (
        "positions are counted from each row's first real token: give attention_mask",
        (),
    ),
    "use_past_kv_cache": ("return_type='logits_and_cache' makes a key-value cache", (False,)),
    "cache_position": ("a key-value cache knows its length", ()),
    "one_zero_attention_mask": ("give attention_mask", ()),
    "decoder_input": (_NO_ENCODER, ()),
    "decoder_input_ids": (_NO_ENCODER, ()),
    "decoder_attention_mask": (_NO_ENCODER, ()),
    "forced_bos_token_id": (_NO_ENCODER, ()),
    "token_type_ids": ("the model has no token types", ()),
    "output_attentions": (f"{_CACHED}'attention'", (False,)),
    "output_hidden_states": (f"{_CACHED}'residual'", (False,)),
    "output_scores": ("the logits are there before sampling alone: output_logits=True", (False,)),
    "return_dict": ("return_type says what is returned", ()),
    "max_length": ("give max_new_tokens", ()),
    "min_length": ("a reply may end at once: stop_at_eos=False", (0,)),
    "min_new_tokens": ("a reply may end at once: stop_at_eos=False", (0,)),
    "pad_token_id": ("what fills up a row is the tokenizer's EOS", ()),
    "num_beams": (_ONE_WAY, (1,)),
    "num_beam_groups": (_ONE_WAY, (1,)),
    "num_return_sequences": ("give the prompt several times", (1,)),
    "penalty_alpha": (_ONE_WAY, (0.0,)),
    "no_repeat_ngram_size": ("freq_penalty and repetition_penalty are there", (0,)),
    "typical_p": ("top_k, top_p and temperature are there", (1.0,)),
    "min_p": ("top_k, top_p and temperature are there", (0.0,)),
    "generation_config": ("give its values by name", ()),
    "logits_processor": ("a hook on the logits does the same", ([],)),
    "streamer": ("generate_stream gives the reply in pieces", ()),
    "assistant_model": ("there is no speculative decoding", ()),
}


def refuse_others(method: str, others: Mapping[str, Any], known: Iterable[str] = ()) -> None:
    """Raise for arguments that a method does not take.

    Args:
        method: Its name.
        others: What it was given besides its own arguments.
        known: The names of those, for a suggestion.

    Raises:
        ArgumentTypeError: for the first that asks for something.
    """
    for name, value in others.items():
        if name in _REASONS:
            reason, nothing = _REASONS[name]
            if value is None or any(type(value) is type(x) and value == x for x in nothing):
                continue
            raise ArgumentTypeError(f"{method} takes no {name}={shown(value)}: {reason}")
        near = get_close_matches(name, [*known, *_REASONS], 1)
        raise ArgumentTypeError(
            f"{method} got an unexpected keyword argument {name!r}"
            + (f": is it {near[0]!r}?" if near else "")
        )
