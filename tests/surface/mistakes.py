"""Mistakes that TransformerLens's users make: both packages must raise, and of one family."""

from __future__ import annotations

from typing import Any

import torch
from calls import N_LAYERS, TEXT, TOKENS, Z1, Call, halved, seeded


def without_tokenizer(call: Call) -> Call:
    def done(m: Any) -> Any:
        tokenizer, m.tokenizer = m.tokenizer, None
        try:
            return call(m)
        finally:
            m.tokenizer = tokenizer

    return done


MISTAKES: dict[str, Call] = {
    "a hook that does not exist": lambda m: m.add_hook("blocks.0.hook_nothing", halved),
    "a hook of no layer": lambda m: m.run_with_hooks(
        TOKENS, fwd_hooks=[(f"blocks.{N_LAYERS}.hook_resid_pre", halved)]
    ),
    "a hook behind a flag": lambda m: m.add_hook("blocks.0.attn.hook_result", halved),
    "a hook behind the other flag": lambda m: m.add_hook("blocks.0.hook_mlp_in", halved),
    "a hook of a model with positions": lambda m: m.add_hook("hook_pos_embed", halved),
    "a missing activation": lambda m: m.run_with_cache(TOKENS, names_filter=Z1)[1]["q", 0],
    "a layer out of range in a cache": lambda m: m.run_with_cache(TOKENS)[1]["z", N_LAYERS],
    "no attention mask of this shape": lambda m: m(TOKENS, attention_mask=torch.ones(2, 3)),
    "several tokens as one": lambda m: m.to_single_token("mat"),
    "text without a tokenizer": without_tokenizer(lambda m: m(TEXT)),
    "tokens of text without a tokenizer": without_tokenizer(lambda m: m.to_tokens(TEXT)),
    "text of tokens without a tokenizer": without_tokenizer(lambda m: m.to_string(TOKENS)),
    "parts of text without a tokenizer": without_tokenizer(lambda m: m.to_str_tokens(TEXT)),
    "one token without a tokenizer": without_tokenizer(lambda m: m.to_single_token("q")),
    "generation of text without a tokenizer": without_tokenizer(
        lambda m: m.generate(TEXT, max_new_tokens=1, verbose=False)
    ),
    "no token at this position": lambda m: m.get_token_position("z", TEXT),
    "no position mode": lambda m: m.get_token_position("t", TEXT, mode="middle"),
    "no such kind of result": lambda m: seeded(m, return_type="tensor"),
    "a share above one": lambda m: seeded(m, top_p=1.5),
    "no token to choose from": lambda m: seeded(m, top_k=0),
    "a batch dimension of two": lambda m: m.run_with_cache(TOKENS)[1].remove_batch_dim(),
    "no composition mode": lambda m: m.all_composition_scores("X"),
    "positional embeddings": lambda m: m.W_pos,
    "embeddings with positions": lambda m: m.W_E_pos,
    "no such way to factor": lambda m: m.load_and_process_state_dict(
        m.state_dict(), False, False, False, False, refactor_factored_attn_matrices=True
    ),
}

# What TransformerLens lets pass: a result without meaning, or None.
REFUSED_HERE: dict[str, Call] = {
    "no return type": lambda m: m(TOKENS, return_type="probabilities"),
    "two rows without a batch dimension": lambda m: m.run_with_cache(TOKENS, remove_batch_dim=True),
    "a temperature below zero": lambda m: seeded(m, temperature=-1.0),
    "two ways to choose among tokens": lambda m: seeded(m, top_k=3, top_p=0.5),
}
