"""Autoencoders in the place of activations: exact with the error term, by hand without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import VARIANTS, exact_config
from refusals import refused
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from tl_looped import (
    ArgumentTypeError,
    GatedHookError,
    HookNameError,
    InputError,
    InvalidDecompositionError,
    LayerIndexError,
    LoopedKeyValueCache,
    LoopedTransformer,
)
from tl_looped import interventions as iv

TOKENS = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


class Dictionary(HookedRootModule):
    """Twelve features; hook points as in SAELens, in the dtype of its weights."""

    def __init__(self, width: int = 16, dtype: torch.dtype = torch.float64, **cfg: Any) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(7)
        self.W_enc = nn.Parameter(torch.randn(width, 12, generator=made).to(dtype))
        self.W_dec = nn.Parameter(torch.randn(12, width, generator=made).to(dtype))
        self.hook_sae_acts_post = HookPoint()
        self.cfg = SimpleNamespace(**cfg)
        self.seen: list[Tensor] = []
        self.setup()

    def encode(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.hook_sae_acts_post((x @ self.W_enc).relu())

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.W_dec


class Bare:
    """The two methods and nothing else."""

    def __init__(self, encode: Any = lambda x: x, decode: Any = lambda x: x) -> None:
        self.encode, self.decode = encode, decode


@pytest.fixture(scope="module")
def model() -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))


@pytest.fixture
def sae(model: LoopedTransformer) -> Dictionary:
    return Dictionary(model.cfg.d_model)


def logits(model: LoopedTransformer, *interventions: iv.Intervention, **run: Any) -> Tensor:
    with torch.no_grad(), model.intervening(*interventions):
        found = model(TOKENS, **run)
    assert isinstance(found, Tensor)
    return found


def by_hand(model: LoopedTransformer, names: list[str], f: Any, **run: Any) -> Tensor:
    with torch.no_grad():
        found = model.run_with_hooks(
            TOKENS, fwd_hooks=[(name, lambda x, hook: f(x)) for name in names], **run
        )
    assert isinstance(found, Tensor)
    return found


def reconstruct(sae: Dictionary) -> Any:
    return lambda x: (x @ sae.W_enc).relu() @ sae.W_dec


PLACES: list[tuple[dict[str, Any], list[str]]] = [
    ({"recurrences": 1, "layers": 0}, ["recurrence.1.blocks.0.hook_resid_post"]),
    ({"layers": 1}, [f"recurrence.{r}.blocks.1.hook_resid_post" for r in range(3)]),
    ({"recurrences": -1, "layers": [0, 1], "name": "mlp_out"},
     [f"recurrence.2.blocks.{i}.hook_mlp_out" for i in (0, 1)]),
    ({"name": "state_out", "recurrences": slice(1, None)},
     [f"recurrence.{r}.hook_state_out" for r in (1, 2)]),
    ({"name": "hook_state_in"}, [f"recurrence.{r}.hook_state_in" for r in range(3)]),
    ({"name": "prelude.0.hook_resid_post"}, ["prelude.0.hook_resid_post"]),
    ({"name": "hook_embed"}, ["hook_embed"]),
    ({"name": "recurrence.1.blocks.1.hook_attn_out"}, ["recurrence.1.blocks.1.hook_attn_out"]),
    ({"name": "recurrence.1.blocks.1.hook_attn_out", "recurrences": [0, 2]},
     [f"recurrence.{r}.blocks.1.hook_attn_out" for r in (0, 2)]),
    ({"name": "recurrence.1.blocks.1.hook_attn_out", "layers": 0},
     [f"recurrence.{r}.blocks.0.hook_attn_out" for r in range(3)]),
    ({"name": "recurrence.1.hook_injected", "recurrences": [0, 2]},
     [f"recurrence.{r}.hook_injected" for r in (0, 2)]),
]  # fmt: skip


@pytest.mark.parametrize(("place", "names"), PLACES, ids=lambda value: str(value)[:60])
def test_without_an_error_term_the_reconstruction_goes_on(
    model: LoopedTransformer, sae: Dictionary, place: dict[str, Any], names: list[str]
) -> None:
    sae.W_dec.data *= 0.1
    found = logits(model, iv.Splice(sae, error_term=False, **place), n_recurrences=3)
    assert_same(found, by_hand(model, names, reconstruct(sae), n_recurrences=3))
    assert (found - logits(model, n_recurrences=3)).abs().max() > 1e-6


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_with_it_the_model_is_itself_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS[name])).to(dtype)
    sae = Dictionary(model.cfg.d_model, torch.float32)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for where in ({}, {"name": "state_out"}, {"recurrences": -1, "layers": 0}):
        change = iv.Splice(sae, **where)
        for run in ({}, {"n_recurrences": 5}, {"attention_mask": mask}):
            assert torch.equal(logits(model, change, **run), logits(model, **run))
        with torch.no_grad(), model.intervening(change):
            _, cache = model.run_with_cache(TOKENS)
        assert not cache.edits.names
    assert all(x.dtype == torch.float32 for x in sae.seen)
    assert len(sae.seen) > 6


def test_an_edit_of_features_is_carried_and_the_error_stays(
    model: LoopedTransformer, sae: Dictionary
) -> None:
    seen: list[tuple[int | None, int | None, tuple[int, ...]]] = []

    def off(features: Tensor, hook: Any) -> None:
        seen.append((hook.recurrence, hook.layer_in_stage, tuple(features.shape)))
        features[..., 3] = 0.0

    def edited(x: Tensor) -> Tensor:
        features = (x @ sae.W_enc).relu()
        kept = features * (torch.arange(12) != 3)
        return kept @ sae.W_dec + (x - features @ sae.W_dec)

    names = [f"recurrence.{r}.blocks.1.hook_resid_post" for r in (0, 2)]
    change = iv.Splice(sae, [0, 2], 1, features=off)
    found = logits(model, change, n_recurrences=3)
    assert_same(found, by_hand(model, names, edited, n_recurrences=3), scale=10.0)
    assert (found - logits(model, n_recurrences=3)).abs().max() > 1e-6
    assert seen == [(0, 1, (2, 5, 12)), (2, 1, (2, 5, 12))]
    returned = iv.Splice(sae, [0, 2], 1, features=lambda f, hook: f * (torch.arange(12) != 3))
    assert torch.equal(logits(model, returned, n_recurrences=3), found)
    with model.intervening(change):  # what an autoencoder keeps for its gradient is not edited
        model(TOKENS).square().sum().backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad[:, 3].eq(0).all()
    assert sae.W_enc.grad[:, 4].ne(0).any()


def test_hook_points_of_the_autoencoder_fire_and_the_error_is_without_them(
    model: LoopedTransformer, sae: Dictionary
) -> None:
    fired: list[Tensor] = []

    def off(features: Tensor, hook: Any) -> Tensor:
        fired.append(features)
        return features * (torch.arange(12) != 3)

    plain = iv.Splice(sae, 1, 1, features=lambda f, hook: f * (torch.arange(12) != 3))
    expected = logits(model, plain)
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", off)]):
        found = logits(model, iv.Splice(sae, 1, 1))
        assert len(fired) == 1
        assert sae.hook_sae_acts_post.fwd_hooks
        assert logits(model, iv.Splice(sae, 1, 1)).equal(found)
    assert torch.equal(found, expected)
    assert len(fired) == 2


@pytest.mark.parametrize("error_term", [True, False])
def test_the_error_term_has_no_gradient(
    model: LoopedTransformer, sae: Dictionary, error_term: bool
) -> None:
    rebuilt, place = reconstruct(sae), "recurrence.1.blocks.0.hook_resid_post"

    def by_hand(x: Tensor, hook: Any) -> Tensor:
        return rebuilt(x) + (x - rebuilt(x)).detach() * error_term

    def gradient(*interventions: iv.Intervention, hooks: Any = ()) -> Tensor:
        start = torch.zeros(2, 5, model.cfg.d_model, dtype=torch.float64, requires_grad=True)
        add = ("hook_embed", lambda x, hook: x + start)
        with model.intervening(*interventions):
            out = model.run_with_hooks(TOKENS, fwd_hooks=[add, *hooks])
        (found,) = torch.autograd.grad(out.square().sum(), start)
        return found

    found = gradient(iv.Splice(sae, 1, 0, error_term))
    assert_same(found, gradient(hooks=[(place, by_hand)]))
    assert (found - gradient()).abs().max() > 1e-6


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_generation_with_a_cache_is_that_without(
    model: LoopedTransformer, sae: Dictionary, padded: bool
) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]) if padded else torch.ones(2, 5).long()
    sae.W_dec.data *= 0.1
    change = iv.Splice(sae, layers=0, features=lambda f, hook: 2.0 * f)
    with torch.no_grad(), model.intervening(change):
        whole = model(TOKENS, attention_mask=mask)
        past = LoopedKeyValueCache()
        steps = [
            model(TOKENS[:, a:b], past_kv_cache=past, attention_mask=mask[:, a:b])
            for a, b in ((0, 3), (3, 4), (4, 5))
        ]
        assert_same(torch.cat(steps, 1)[mask.bool()], whole[mask.bool()])
        common = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
        with_cache = model.generate(TOKENS, **common)
        without = model.generate(TOKENS, **common, use_past_kv_cache=False)
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, model.generate(TOKENS, **common))


def test_the_autoencoders_own_configuration_names_the_place(model: LoopedTransformer) -> None:
    width = model.cfg.d_model
    place = "blocks.3.hook_resid_post"
    r, layer = model.loop.locate(3).recurrence, model.loop.locate(3).layer
    for cfg in ({"hook_name": place}, {"metadata": SimpleNamespace(hook_name=place)},
                {"metadata": {"hook_name": place}}):  # fmt: skip
        told = Dictionary(width, **cfg)
        found = logits(model, iv.Splice(told, error_term=False))
        assert_same(found, by_hand(model, [place], reconstruct(told)))
        everywhere = iv.Splice(told, slice(None), error_term=False)
        names = [f"recurrence.{i}.blocks.{layer}.hook_resid_post" for i in range(model.loop.R)]
        assert_same(logits(model, everywhere), by_hand(model, names, reconstruct(told)))
        other = iv.Splice(told, r, layer, error_term=False, name="mlp_out")
        assert_same(logits(model, other),
                    by_hand(model, ["blocks.3.hook_mlp_out"], reconstruct(told)))  # fmt: skip


def test_activations_by_head_keep_their_shape(model: LoopedTransformer) -> None:
    heads = model.cfg.n_heads * model.cfg.d_head
    sae = Dictionary(heads, d_in=heads)
    flat = Bare(
        lambda z: sae.encode(z.flatten(2)),
        lambda f: sae.decode(f).unflatten(2, (model.cfg.n_heads, model.cfg.d_head)),
    )
    found = logits(model, iv.Splice(flat, 0, 1, error_term=False, name="z"))
    expected = by_hand(model, ["recurrence.0.blocks.1.attn.hook_z"],
                       lambda z: reconstruct(sae)(z.flatten(2)).view_as(z))  # fmt: skip
    assert_same(found, expected)
    assert torch.equal(logits(model, iv.Splice(flat, name="attn.hook_z")), logits(model))


def test_a_decomposition_of_a_spliced_run_is_refused_where_it_was_changed(
    model: LoopedTransformer, sae: Dictionary
) -> None:
    plain = LoopedTransformer.from_config(exact_config())
    with torch.no_grad(), plain.intervening(iv.Splice(sae, 0, 1)):
        _, kept = plain.run_with_cache(TOKENS)
    assert_same(kept.decompose_resid().sum(0), kept["resid_post", -1])
    with torch.no_grad(), plain.intervening(iv.Splice(sae, 0, 1, error_term=False)):
        _, changed = plain.run_with_cache(TOKENS)
    with refused(InvalidDecompositionError, "Splice(Dictionary"):
        changed.decompose_resid()


def test_where_interventions_are_refused_so_is_a_splice(
    model: LoopedTransformer, sae: Dictionary
) -> None:
    with model.intervening(iv.Splice(sae, 0, 0)):
        with refused(InputError, "Splice(Dictionary"):
            model.loop_map(TOKENS)
        with refused(InputError, "Splice(Dictionary"):
            model.to_bridge()


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: iv.Splice(3), InputError, "encode and decode"),
    (lambda: iv.Splice(Dictionary), InputError, "encode and decode"),
    (lambda: iv.Splice(Bare(decode=None)), InputError, "encode and decode"),
    (lambda: iv.Splice(Bare(), features=3), ArgumentTypeError, "features"),
    (lambda: iv.Splice(Dictionary(hook_head_index=2)), InputError, "head 2"),
    (lambda: iv.Splice(Dictionary(hook_name="a", hook_name_out="b")), InputError, "transcoder"),
    (lambda: iv.Splice(Bare(), 9), LayerIndexError, "recurrence 9"),
    (lambda: iv.Splice(Bare(), layers=9), LayerIndexError, "core layer 9"),
    (lambda: iv.Splice(Bare(), name="state_out", layers=0), InputError, "leave layers out"),
    (lambda: iv.Splice(Bare(), 0, name="hook_embed"), InputError, "runs once"),
    (lambda: iv.Splice(Bare(), 0, name="coda.0.hook_resid_post"), InputError, "runs once"),
    (lambda: iv.Splice(Bare(), name="resid_pots"), HookNameError, "hook_resid_post"),
    (lambda: iv.Splice(Bare(), name="result"), GatedHookError, "use_attn_result"),
    (lambda: iv.Splice(Dictionary(4, d_in=4)), InputError, "reads 4 dimensions"),
    (lambda: iv.Splice(Bare(lambda x: x.tolist())), InputError, "encode must return a tensor"),
    (lambda: iv.Splice(Bare(decode=lambda x: x[:, :1])), InputError, "decode must return"),
    (lambda: iv.Splice(Bare(decode=lambda x: 1)), InputError, "decode must return"),
]


@pytest.mark.parametrize(("make", "kind", "part"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_does_not_fit_is_refused(
    model: LoopedTransformer, make: Any, kind: Any, part: str
) -> None:
    with refused(kind, part):
        logits(model, make())
    assert not model.interventions
