"""Calls that TransformerLens's users make, by the name in the table of tests/surface.

Each gets a model (``MODEL``), a cache (``CACHE``) or a config, of either package, and its result is
compared. What a call leaves behind in the model is cleaned up by the test.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from comparing import shared
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

Call = Callable[[Any], Any]
STAGES = {"prelude": 1, "core": 2, "coda": 1}
N_LAYERS = sum(STAGES.values())
SIZES = {"d_model": 24, "d_head": 6, "n_heads": 4, "d_mlp": 32, "d_vocab": 31, "n_ctx": 64}
TEXT, TEXTS = "the mat is flat.", ["a cat.", "the mat is flat."]
TOKENS = torch.randint(3, int(SIZES["d_vocab"]), (2, 7), generator=torch.Generator().manual_seed(3))
ONE = TOKENS[:1]
ONTO = torch.randn(
    int(SIZES["d_model"]), 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64
)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def halved(value: Tensor, hook: Any) -> Tensor:
    return value * 0.5


def doubled(value: Tensor, hook: Any) -> Tensor:
    return value * 2.0


def plus_one(value: Tensor, hook: Any) -> Tensor:
    return value + 1.0


Z1, MLP2, RESID = "blocks.1.attn.hook_z", "blocks.2.hook_mlp_out", "blocks.2.hook_resid_pre"


def stream(m: Any) -> Tensor:
    return m(TOKENS, stop_at_layer=2).detach()


def after(m: Any, *steps: Callable[[Any], Any]) -> Tensor:
    """Logits after things were done to the model."""
    for step in steps:
        step(m)
    return m(TOKENS)


def gradients(m: Any, names: list[str], **options: Any) -> dict[str, Tensor]:
    """What backward hooks see."""
    seen: dict[str, Tensor] = {}

    def keep(grad: Tensor, hook: Any) -> None:
        seen[hook.name] = grad.detach().clone()

    with m.hooks(bwd_hooks=[(name, keep) for name in names], **options):
        m(TOKENS, return_type="loss").backward()
    return {name: seen[name] for name in names}


def cached(m: Any, fill: Callable[[Any, dict[str, Tensor]], Any], backward: bool = False) -> Any:
    """A dict that caching hooks fill."""
    store: dict[str, Tensor] = {}
    fill(m, store)
    loss = m(ONE, return_type="loss")
    if backward:
        loss.backward()
    # HookedTransformer calls ln1 three times, and the last of three gradients stays in the dict.
    thrice = [name for name in store if ".ln1." in name and name.endswith("_grad")]
    return {name: store[name] for name in sorted(store) if name not in thrice}


def in_contexts(m: Any) -> list[Tensor]:
    """Logits within nested contexts, and behind each."""
    out = []
    with m.hooks(fwd_hooks=[(Z1, halved)]):
        out.append(m(TOKENS))
        with m.hooks(fwd_hooks=[(MLP2, doubled)]):
            out.append(m(TOKENS))
        out.append(m(TOKENS))
    return [*out, m(TOKENS)]


def kept(m: Any) -> list[Tensor]:
    """Logits behind a context that leaves its hooks, and behind one that takes its own away."""
    with m.hooks(fwd_hooks=[(Z1, halved)], bwd_hooks=[], reset_hooks_end=False):
        pass
    left = m(TOKENS)
    with m.hooks(fwd_hooks=[(MLP2, doubled)], reset_hooks_end=True, clear_contexts=True):
        pass
    return [left, m(TOKENS)]


def with_flag(m: Any, flag: str, name: str) -> Any:
    getattr(m, f"set_{flag}")(True)
    try:
        hooks = [(name, halved)]
        return m.run_with_hooks(TOKENS, fwd_hooks=hooks), m.run_with_cache(TOKENS)[1][name]
    finally:
        getattr(m, f"set_{flag}")(False)


def seeded(m: Any, **options: Any) -> Any:
    torch.manual_seed(11)
    given = {"max_new_tokens": 8, "verbose": False} | options
    return m.generate(given.pop("input", TOKENS), **given)


def plain(text: Any) -> Any:
    """Text without the special tokens, which TransformerLens leaves out of a reply."""
    if isinstance(text, str):
        return text.replace("<s>", "").replace("<pad>", "").replace("</s>", "")
    return [plain(one) for one in text] if isinstance(text, list) else text


def streamed(m: Any, **options: Any) -> Any:
    torch.manual_seed(11)
    given = {"max_new_tokens": 6, "max_tokens_per_yield": 2, "verbose": False} | options
    return list(m.generate_stream(given.pop("input", ONE), **given))


def with_past(m: Any) -> list[Tensor]:
    """Logits of later tokens, of which TransformerLens's own cache holds the earlier ones."""
    past = TransformerLensKeyValueCache.init_cache(m.cfg, "cpu", len(TOKENS))
    return [m(part, past_kv_cache=past) for part in TOKENS.split(3, dim=1)]


FORWARD: list[Call] = [
    lambda m: m(TOKENS),
    lambda m: m(TOKENS[0]),
    lambda m: m(ONE, return_type="logits"),
    lambda m: m(TOKENS, "loss"),
    lambda m: m(TOKENS, "both"),
    lambda m: m(TOKENS, None),
    lambda m: m(TOKENS, "loss", True),
    lambda m: m(TOKENS, return_type="loss", loss_per_token=True),
    lambda m: m(TOKENS, return_type="both", loss_per_token=True),
    lambda m: m(TOKENS, return_type="both").loss,
    lambda m: m(TEXT),
    lambda m: m(TEXTS[:1], prepend_bos=False),
    lambda m: m(TEXT, "logits", False, False),
    lambda m: m(TEXT, "logits", False, None, "right"),
    lambda m: m(TEXTS, padding_side="left")[1],
    lambda m: m(input=TEXT, return_type="loss"),
    lambda m: m(TOKENS, stop_at_layer=0),
    lambda m: m(TOKENS, stop_at_layer=2),
    lambda m: m(TOKENS, stop_at_layer=-1),
    lambda m: m(TOKENS, stop_at_layer=N_LAYERS),
    lambda m: m(stream(m), start_at_layer=2),
    lambda m: m(stream(m), start_at_layer=2, stop_at_layer=3),
    lambda m: m(stream(m), start_at_layer=-2),
    lambda m: m(stream(m), start_at_layer=2, tokens=TOKENS, return_type="loss"),
    lambda m: m(stream(m), start_at_layer=2, shortformer_pos_embed=None),
    lambda m: m(TOKENS, attention_mask=MASK),
    lambda m: m(TOKENS, attention_mask=MASK, return_type="loss"),
    lambda m: m(TOKENS, past_kv_cache=None),
    with_past,
]

CACHES: list[Call] = [
    lambda m: m.run_with_cache(TOKENS),
    lambda m: m.run_with_cache(TOKENS, return_type="loss"),
    lambda m: m.run_with_cache(TOKENS, "loss", True),
    lambda m: m.run_with_cache(TOKENS, return_cache_object=False),
    lambda m: m.run_with_cache(ONE, remove_batch_dim=True),
    lambda m: m.run_with_cache(TOKENS, names_filter=Z1),
    lambda m: m.run_with_cache(TOKENS, names_filter=[Z1, MLP2]),
    lambda m: m.run_with_cache(TOKENS, names_filter=lambda name: "resid_post" in name),
    lambda m: m.run_with_cache(TOKENS, names_filter=Z1, device="cpu"),
    lambda m: m.run_with_cache(TOKENS, stop_at_layer=2),
    lambda m: m.run_with_cache(stream(m), start_at_layer=2),
    lambda m: m.run_with_cache(TOKENS, names_filter=[Z1], pos_slice=-1),
    lambda m: m.run_with_cache(TOKENS, names_filter=[Z1, MLP2], pos_slice=(1, 4)),
    lambda m: m.run_with_cache(TOKENS, names_filter=Z1, return_type="loss", incl_bwd=True)[1],
    lambda m: m.run_with_cache(TOKENS, names_filter=Z1, reset_hooks_end=False)[1],
    lambda m: m.run_with_cache(TOKENS, names_filter=Z1, clear_contexts=True)[1],
    lambda m: m.run_with_cache(TEXT, prepend_bos=False)[1],
]

HOOKS: dict[str, list[Call]] = {
    "model.run_with_hooks": [
        lambda m: m.run_with_hooks(TOKENS, fwd_hooks=[(Z1, halved)]),
        lambda m: m.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=[(Z1, halved)]),
        lambda m: m.run_with_hooks(TOKENS, "loss", fwd_hooks=[(Z1, halved), (Z1, plus_one)]),
        lambda m: m.run_with_hooks(TOKENS, fwd_hooks=[(lambda n: n.endswith("hook_z"), halved)]),
        lambda m: m.run_with_hooks(TOKENS, fwd_hooks=[(MLP2, doubled)], stop_at_layer=3),
        lambda m: (
            m.run_with_hooks(TOKENS, fwd_hooks=[(Z1, halved)], reset_hooks_end=False),
            m(TOKENS),
        ),
        lambda m: m.run_with_hooks(TOKENS, fwd_hooks=[(Z1, halved)], clear_contexts=True),
        lambda m: m.run_with_hooks(TOKENS, bwd_hooks=[(Z1, lambda grad, hook: None)]),
    ],
    "model.hooks": [
        in_contexts,
        kept,
        lambda m: gradients(m, [Z1, MLP2, RESID]),
        lambda m: gradients(m, [Z1], reset_hooks_end=True, clear_contexts=False),
        lambda m: gradients(m, ["hook_embed"], fwd_hooks=[(Z1, halved)]),
    ],
    "model.add_hook": [
        lambda m: after(m, lambda m: m.add_hook(Z1, halved)),
        lambda m: after(m, lambda m: m.add_hook(name=Z1, hook=halved, dir="fwd")),
        lambda m: after(m, lambda m: m.add_hook(lambda n: n == Z1, halved)),
        lambda m: after(
            m, lambda m: m.add_hook(Z1, halved), lambda m: m.add_hook(Z1, plus_one, prepend=True)
        ),
        lambda m: after(
            m, lambda m: m.add_hook(Z1, halved, is_permanent=True), lambda m: m.reset_hooks()
        ),
        lambda m: after(
            m,
            lambda m: m.add_hook(Z1, halved, level=1),
            lambda m: m.add_hook(MLP2, halved, level=2),
            lambda m: m.reset_hooks(level=1),
        ),
    ],
    "model.add_perma_hook": [
        lambda m: after(m, lambda m: m.add_perma_hook(Z1, halved), lambda m: m.reset_hooks()),
        lambda m: after(m, lambda m: m.add_perma_hook(name=Z1, hook=halved, dir="fwd")),
    ],
    "model.check_and_add_hook": [
        lambda m: after(
            m,
            lambda m: m.check_and_add_hook(
                hook_point=m.hook_dict[Z1],
                hook_point_name=Z1,
                hook=halved,
                dir="fwd",
                is_permanent=False,
                level=None,
                prepend=False,
            ),
        ),
    ],
    "model.check_hooks_to_add": [
        lambda m: m.check_hooks_to_add(
            hook_point=m.hook_dict[Z1],
            hook_point_name=Z1,
            hook=halved,
            dir="fwd",
            is_permanent=False,
            prepend=False,
        ),
    ],
    "model.reset_hooks": [
        lambda m: after(m, lambda m: m.add_hook(Z1, halved), lambda m: m.reset_hooks()),
        lambda m: after(
            m, lambda m: m.add_hook(Z1, halved), lambda m: m.reset_hooks(direction="bwd")
        ),
        lambda m: after(
            m, lambda m: m.add_perma_hook(Z1, halved), lambda m: m.reset_hooks(True, "both", True)
        ),
        lambda m: after(
            m,
            lambda m: m.add_perma_hook(Z1, halved),
            lambda m: m.reset_hooks(clear_contexts=False, including_permanent=True, level=None),
        ),
    ],
    "model.remove_all_hook_fns": [
        lambda m: after(m, lambda m: m.add_hook(Z1, halved), lambda m: m.remove_all_hook_fns()),
        lambda m: after(
            m,
            lambda m: m.add_perma_hook(Z1, halved),
            lambda m: m.remove_all_hook_fns(direction="fwd", including_permanent=True, level=None),
        ),
    ],
    "model.clear_contexts": [lambda m: m.clear_contexts()],
    "model.add_caching_hooks": [
        lambda m: cached(
            m,
            lambda m, store: m.add_caching_hooks(
                names_filter=[Z1, MLP2], incl_bwd=False, device="cpu", cache=store
            ),
        ),
        lambda m: cached(
            m,
            lambda m, store: m.add_caching_hooks(
                Z1, incl_bwd=True, remove_batch_dim=True, cache=store
            ),
            backward=True,
        ),
        lambda m: type(m.add_caching_hooks(Z1)),
    ],
    "model.get_caching_hooks": [
        lambda m: [
            len(part)
            for part in m.get_caching_hooks(
                names_filter=[Z1, MLP2],
                incl_bwd=True,
                device=None,
                remove_batch_dim=False,
                cache=None,
                pos_slice=None,
            )
        ],
    ],
    "model.cache_all": [
        lambda m: cached(m, lambda m, store: m.cache_all(store)),
        lambda m: cached(
            m,
            lambda m, store: m.cache_all(
                cache=store, incl_bwd=True, device="cpu", remove_batch_dim=True
            ),
            backward=True,
        ),
    ],
    "model.cache_some": [
        lambda m: cached(m, lambda m, store: m.cache_some(store, lambda name: name == Z1)),
        lambda m: cached(
            m,
            lambda m, store: m.cache_some(
                cache=store,
                names=lambda name: name == Z1,
                incl_bwd=True,
                device="cpu",
                remove_batch_dim=True,
            ),
            backward=True,
        ),
    ],
    "model.hook_dict": [lambda m: m.hook_dict[Z1].name],
    "model.hook_points": [lambda m: len(list(m.hook_points())) > 50],
    "model.mod_dict": [lambda m: [name in m.mod_dict for name in ("embed", "blocks.1.attn", Z1)]],
    "model.is_caching": [lambda m: m.is_caching],
    "model.context_level": [lambda m: m.context_level],
    "model.hook_embed": [lambda m: m.hook_embed.name],
    "model.embed": [lambda m: m.embed(TOKENS)],
    "model.unembed": [lambda m: m.unembed(m(TOKENS, stop_at_layer=N_LAYERS))],
    "model.ln_final": [lambda m: m.ln_final(m(TOKENS, stop_at_layer=N_LAYERS))],
    "model.blocks": [lambda m: len(m.blocks), lambda m: m.blocks[1](stream(m))],
    "model.set_use_attn_result": [
        lambda m: with_flag(m, "use_attn_result", "blocks.1.attn.hook_result"),
        lambda m: m.set_use_attn_result(use_attn_result=False),
    ],
    "model.set_use_split_qkv_input": [
        lambda m: with_flag(m, "use_split_qkv_input", "blocks.1.hook_q_input"),
        lambda m: m.set_use_split_qkv_input(use_split_qkv_input=False),
    ],
    "model.set_use_hook_mlp_in": [
        lambda m: with_flag(m, "use_hook_mlp_in", "blocks.1.hook_mlp_in"),
        lambda m: m.set_use_hook_mlp_in(use_hook_mlp_in=False),
    ],
    "model.set_use_attn_in": [lambda m: m.set_use_attn_in(use_attn_in=False)],
    "model.setup": [lambda m: (m.setup(), len(shared(m.hook_dict)) > 50)[1]],
}

TEXT_CALLS: dict[str, list[Call]] = {
    "model.tokenizer": [lambda m: m.tokenizer.decode([3, 4])],
    "model.to_tokens": [
        lambda m: m.to_tokens(TEXT),
        lambda m: m.to_tokens(
            input=TEXTS, prepend_bos=False, padding_side="left", move_to_device=True, truncate=True
        ),
        lambda m: m.to_tokens(TEXTS, True, "right", False, True),
        lambda m: m.to_tokens(""),
        lambda m: m.to_tokens("a" * 100, truncate=True),
    ],
    "model.to_string": [
        lambda m: m.to_string(m.to_tokens(TEXT)),
        lambda m: m.to_string(tokens=TOKENS),
        lambda m: m.to_string(TOKENS[0]),
        lambda m: m.to_string(7),
        lambda m: m.to_string(torch.tensor(7)),
        lambda m: m.to_string([3, 4, 5]),
        lambda m: m.to_string([[3, 4], [5, 6]]),
        lambda m: m.to_string(TOKENS.numpy()),
    ],
    "model.to_str_tokens": [
        lambda m: m.to_str_tokens(TEXT),
        lambda m: m.to_str_tokens(input=TEXT, prepend_bos=False, padding_side="right"),
        lambda m: m.to_str_tokens(TEXTS),
        lambda m: m.to_str_tokens(TOKENS[0]),
        lambda m: m.to_str_tokens(ONE),
        lambda m: m.to_str_tokens(TOKENS[0].numpy()),
    ],
    "model.to_single_token": [
        lambda m: m.to_single_token("q"),
        lambda m: m.to_single_token(string="q"),
    ],
    "model.to_single_str_token": [
        lambda m: m.to_single_str_token(7),
        lambda m: m.to_single_str_token(int_token=7),
    ],
    "model.get_token_position": [
        lambda m: m.get_token_position("t", TEXT),
        lambda m: m.get_token_position(m.to_single_token("t"), TEXT, "last"),
        lambda m: m.get_token_position(
            single_token="t", input=TEXT, mode="last", prepend_bos=False, padding_side="right"
        ),
        lambda m: m.get_token_position(int(TOKENS[0, 2]), TOKENS[0]),
        lambda m: m.get_token_position(int(TOKENS[0, 2]), ONE),
    ],
    "model.tokens_to_residual_directions": [
        lambda m: m.tokens_to_residual_directions("q"),
        lambda m: m.tokens_to_residual_directions(7),
        lambda m: m.tokens_to_residual_directions(torch.tensor(7)),
        lambda m: m.tokens_to_residual_directions(tokens=TOKENS),
    ],
    "model.loss_fn": [
        lambda m: m.loss_fn(m(TOKENS), TOKENS),
        lambda m: m.loss_fn(logits=m(TOKENS), tokens=TOKENS, attention_mask=MASK, per_token=True),
        lambda m: m.loss_fn(m(TOKENS), TOKENS, None, True),
    ],
    "model.input_to_embed": [
        lambda m: m.input_to_embed(TOKENS)[:2],
        lambda m: m.input_to_embed(
            input=TEXTS,
            prepend_bos=False,
            padding_side="left",
            attention_mask=None,
            past_kv_cache=None,
        )[:2],
        lambda m: m.input_to_embed(TOKENS, attention_mask=MASK),
    ],
    "model.get_pos_offset": [
        lambda m: m.get_pos_offset(None, 2),
        lambda m: m.get_pos_offset(past_kv_cache=None, batch_size=2),
    ],
    "model.get_residual": [
        lambda m: m.get_residual(m.embed(TOKENS), 0),
        lambda m: m.get_residual(
            embed=m.embed(TOKENS),
            pos_offset=0,
            prepend_bos=None,
            attention_mask=None,
            tokens=TOKENS,
            return_shortformer_pos_embed=False,
            device=None,
        ),
    ],
    "model.set_tokenizer": [
        lambda m: m.set_tokenizer(m.tokenizer, default_padding_side="right"),
        lambda m: m.set_tokenizer(tokenizer=m.tokenizer),
    ],
}

GENERATION: dict[str, list[Call]] = {
    "model.generate": [
        lambda m: seeded(m),
        lambda m: seeded(m, do_sample=False),
        lambda m: plain(seeded(m, input=TEXT)),
        lambda m: plain(seeded(m, input=TEXT, prepend_bos=False)),
        lambda m: plain(seeded(m, input=TEXTS, do_sample=False, padding_side="left")),
        lambda m: plain(seeded(m, input="", prepend_bos=True)),
        lambda m: seeded(m, top_k=5, temperature=0.7),
        lambda m: seeded(m, top_p=0.8),
        lambda m: seeded(m, freq_penalty=1.0),
        lambda m: seeded(m, temperature=0.0),
        lambda m: seeded(m, stop_at_eos=False),
        lambda m: seeded(m, eos_token_id=9, max_new_tokens=30),
        lambda m: seeded(m, eos_token_id=[9, 10], max_new_tokens=30),
        lambda m: seeded(m, use_past_kv_cache=False),
        lambda m: seeded(m, input=TEXT, return_type="tokens"),
        lambda m: plain(seeded(m, input=TEXT, return_type="str")),
        lambda m: plain(seeded(m, return_type="str")),
        lambda m: seeded(m, return_type="input"),
        lambda m: seeded(m, output_logits=True).sequences,
        lambda m: seeded(m, output_logits=True).logits,
        lambda m: (
            torch.manual_seed(2),
            plain(m.generate(TEXT, 5, False, None, True, 6, None, 0.9, 0.5, verbose=False)),
        )[1],
        lambda m: (torch.manual_seed(2), plain(m.generate(max_new_tokens=4, verbose=False)))[1],
        lambda m: m.generate(input=ONE, max_new_tokens=2, do_sample=False, verbose=True),
    ],
    "model.generate_stream": [
        lambda m: streamed(m, max_new_tokens=5, max_tokens_per_yield=3),
        lambda m: streamed(m, do_sample=False, stop_at_eos=False),
        lambda m: streamed(m, input=TEXT, return_type="tokens", prepend_bos=False),
        lambda m: streamed(m, top_k=4, temperature=0.8, freq_penalty=0.5),
        lambda m: streamed(m, top_p=0.9, verbose=True),
        lambda m: streamed(m, eos_token_id=9, use_past_kv_cache=False, padding_side="right"),
        lambda m: (
            torch.manual_seed(4),
            list(m.generate_stream(ONE, 5, 2, False, None, True, 6, None, 0.9, 0.5)),
        )[1],
    ],
}


def named(m: Any) -> dict[str, Tensor]:
    """Weights under TransformerLens's names, as a state dict of HookedTransformer has them."""
    own = m.tl_parameters() if hasattr(m, "tl_parameters") else dict(m.named_parameters())
    return {name: weight.detach().clone() for name, weight in own.items()}


def some(state: dict[str, Tensor]) -> list[Tensor]:
    return [state[name] for name in ("blocks.1.attn.W_Q", "blocks.1.mlp.W_gate", "unembed.W_U")]


def processed(m: Any, **options: Any) -> list[Tensor]:
    """Logits and weights of a copy whose weights were processed."""
    m = deepcopy(m)
    m.process_weights_(**options)
    return [m(TOKENS), m.W_Q, m.W_in, m.W_U]


def loaded(m: Any, **options: Any) -> list[Tensor]:
    """The same of a copy into which another state dict was loaded."""
    m = deepcopy(m)
    state = {name: weight * 0.5 for name, weight in named(m).items()}
    m.load_and_process_state_dict(state_dict=state, **options)
    return [m(TOKENS), m.W_Q, m.W_in, m.W_U]


def sampled(m: Any, **options: Any) -> Any:
    m.dataset = [{"text": text} for text in (*TEXTS, "the end.")]
    np.random.seed(5)
    return m.sample_datapoint(**options)


PROCESSING: dict[str, list[Call]] = {
    "model.process_weights_": [
        lambda m: processed(m),
        lambda m: processed(m, fold_ln=True, center_unembed=False),
        lambda m: processed(
            m,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=True,
            refactor_factored_attn_matrices=False,
        ),
    ],
    "model.load_and_process_state_dict": [
        lambda m: loaded(m, fold_value_biases=False),
        lambda m: loaded(
            m,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
            refactor_factored_attn_matrices=False,
        ),
    ],
    "model.fill_missing_keys": [
        lambda m: some(m.fill_missing_keys({"unembed.W_U": named(m)["unembed.W_U"]})),
        lambda m: some(m.fill_missing_keys(state_dict={})),
    ],
    "model.fold_layer_norm": [
        lambda m: some(
            m.fold_layer_norm(state_dict=named(m), fold_biases=False, center_weights=False)
        ),
    ],
    "model.fold_value_biases": [lambda m: some(m.fold_value_biases(state_dict=named(m)))],
    "model.center_unembed": [lambda m: some(m.center_unembed(state_dict=named(m)))],
    "model.dataset": [lambda m: (setattr(m, "dataset", [{"text": "a"}]), len(m.dataset))[1]],
    "model.sample_datapoint": [
        lambda m: sampled(m),
        lambda m: sampled(m, tokenize=True, prepend_bos=False, padding_side="right"),
    ],
    "model.set_ungroup_grouped_query_attention": [
        lambda m: with_flag(m, "ungroup_grouped_query_attention", "blocks.1.attn.hook_k"),
        lambda m: m.set_ungroup_grouped_query_attention(ungroup_grouped_query_attention=False),
    ],
}

WEIGHTS = ["W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_gate"]
WEIGHTS += ["b_U", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "QK", "OV"]


def reading(name: str) -> Call:
    return lambda m: getattr(m, name)


WEIGHT_CALLS: dict[str, list[Call]] = {f"model.{name}": [reading(name)] for name in WEIGHTS} | {
    "model.accumulated_bias": [
        lambda m: m.accumulated_bias(2).float(),
        lambda m: m.accumulated_bias(layer=2, mlp_input=True, include_mlp_biases=False).float(),
        lambda m: m.accumulated_bias(0).float(),
    ],
    "model.all_composition_scores": [
        lambda m: m.all_composition_scores("Q"),
        lambda m: m.all_composition_scores(mode="K"),
        lambda m: m.all_composition_scores("V"),
    ],
    "model.cpu": [lambda m: m.cpu()(TOKENS)],
    "model.to": [
        lambda m: m.to("cpu")(TOKENS),
        lambda m: m.to(torch.float64, print_details=False)(TOKENS),
    ],
    "model.move_model_modules_to_device": [lambda m: m.move_model_modules_to_device()],
}

MODEL: dict[str, list[Call]] = {
    "model.forward": FORWARD,
    "model.run_with_cache": CACHES,
    **HOOKS,
    **TEXT_CALLS,
    **GENERATION,
    **WEIGHT_CALLS,
    **PROCESSING,
}


def of_cache(name: str, *options: dict[str, Any]) -> list[Call]:
    def call(given: dict[str, Any]) -> Call:
        return lambda c: getattr(c, name)(**given)

    return [call(given) for given in options]


CACHE: dict[str, list[Call]] = {
    "cache.__getitem__": [
        lambda c: c[Z1],
        lambda c: c["z", 1],
        lambda c: c["embed"],
        lambda c: c["k1"],
        lambda c: c["resid_post", -1],
        lambda c: c["scale", 1, "ln1"],
        lambda c: c["normalized", 1, "ln2"],
        lambda c: c["post", 2, "mlp"],
        lambda c: c[("pattern", 1, "attn")],
    ],
    "cache.__len__": [lambda c: len(c) > 50],
    "cache.__iter__": [lambda c: shared(iter(c))],
    "cache.keys": [lambda c: shared(c.keys())],
    "cache.values": [lambda c: [x.dim() for k, x in c.items() if shared([k])]],
    "cache.items": [lambda c: {k: x for k, x in c.items() if shared([k])}],
    "cache.cache_dict": [lambda c: c.cache_dict],
    "cache.has_batch_dim": [lambda c: c.has_batch_dim],
    "cache.has_embed": [lambda c: c.has_embed],
    "cache.has_pos_embed": [lambda c: c.has_pos_embed],
    "cache.model": [lambda c: c.model.cfg.n_layers],
    "cache.to": [lambda c: c.to("cpu"), lambda c: c.to(device="cpu")],
    "cache.toggle_autodiff": [lambda c: (c.toggle_autodiff(mode=False), torch.is_grad_enabled())],
    "cache.apply_slice_to_batch_dim": [
        lambda c: c.apply_slice_to_batch_dim(1),
        lambda c: c.apply_slice_to_batch_dim(batch_slice=(0, 1)),
    ],
    "cache.remove_batch_dim": [lambda c: c.apply_slice_to_batch_dim((0, 1)).remove_batch_dim()],
    "cache.stack_activation": of_cache(
        "stack_activation", {"activation_name": "z"}, {"activation_name": "resid_mid", "layer": 3},
        {"activation_name": "scale", "layer": 2, "sublayer_type": "ln1"},
    ),
    "cache.accumulated_resid": of_cache(
        "accumulated_resid", {"layer": None}, {"layer": 2, "incl_mid": True, "mlp_input": True},
        {"layer": -1, "apply_ln": True, "pos_slice": -1}, {"layer": 3, "pos_slice": (1, 4)},
    ),
    "cache.logit_attrs": [
        lambda c: c.logit_attrs(c.decompose_resid(), tokens=4),
        lambda c: c.logit_attrs(residual_stack=c.accumulated_resid(pos_slice=-1),
                                tokens=torch.tensor([3, 4]),
                                incorrect_tokens=torch.tensor([5, 6]), pos_slice=-1,
                                batch_slice=None, has_batch_dim=True),
        lambda c: c.logit_attrs(c.decompose_resid(pos_slice=-1), "q", incorrect_tokens="c",
                                pos_slice=-1),
    ],
    "cache.decompose_resid": of_cache(
        "decompose_resid", {}, {"layer": 2, "mlp_input": True, "mode": "attn"}, {"mode": "mlp"},
        {"apply_ln": True, "pos_slice": -1, "incl_embeds": False},
    ),
    "cache.compute_head_results": [lambda c: (c.compute_head_results(), c["result", 1])[1]],
    "cache.stack_head_results": of_cache(
        "stack_head_results", {}, {"layer": 2}, {"layer": 2, "incl_remainder": True},
        {"apply_ln": True, "pos_slice": -1},
    ),
    "cache.get_neuron_results": of_cache(
        "get_neuron_results", {"layer": 1}, {"layer": 1, "neuron_slice": (0, 5), "pos_slice": -1},
        {"layer": 1, "project_output_onto": ONTO},
    ),
    "cache.stack_neuron_results": of_cache(
        "stack_neuron_results", {"layer": 2}, {"layer": -1, "neuron_slice": (0, 3)},
        {"layer": 2, "pos_slice": -1, "incl_remainder": True, "apply_ln": True},
        {"layer": 2, "project_output_onto": ONTO},
    ),
    "cache.apply_ln_to_stack": [
        lambda c: c.apply_ln_to_stack(c.decompose_resid(layer=2), layer=2),
        lambda c: c.apply_ln_to_stack(residual_stack=c.decompose_resid(layer=2, mlp_input=True),
                                      layer=2, mlp_input=True, pos_slice=None, batch_slice=None,
                                      has_batch_dim=True),
        lambda c: c.apply_ln_to_stack(c.decompose_resid(layer=-1), layer=-1,
                                      recompute_ln=True),
    ],
    "cache.get_full_resid_decomposition": of_cache(
        "get_full_resid_decomposition", {"expand_neurons": False}, {"layer": 2, "pos_slice": -1},
        {"layer": 1, "mlp_input": True, "apply_ln": True, "expand_neurons": True},
    ),
}  # fmt: skip


def done(call: Call, model: Any, subject: Any = None) -> Any:
    """A call's result; hooks and gradients are gone behind it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(model if subject is None else subject)
    finally:
        model.reset_hooks(including_permanent=True)
        model.zero_grad()
        model.is_caching = False
        torch.set_grad_enabled(True)
