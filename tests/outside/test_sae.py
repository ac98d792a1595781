"""SAELens's autoencoders in looped models: their HookedSAETransformer's numbers, at any (r, l)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import hooked
import pytest
import torch
from closeness import assert_same
from conftest import VARIANTS, exact_config
from refusals import refused
from torch import Tensor

from tl_looped import InputError, LoopedTransformer
from tl_looped import interventions as iv

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    import sae_lens

WIDTH = 24
KINDS: dict[str, dict[str, Any]] = {
    "Standard": {},
    "Standard, layer norm": {"normalize_activations": "layer_norm"},
    "Standard, no b_dec at the input": {"apply_b_dec_to_input": False},
    "Gated": {},
    "JumpReLU": {},
    "TopK": {"k": 5},
}


def autoencoder(kind: str, d_in: int, dtype: str = "float64", **metadata: Any) -> Any:
    """Random weights of every parameter."""
    name, made = kind.split(",")[0], torch.Generator().manual_seed(2)
    cfg = getattr(sae_lens, f"{name}SAEConfig")(
        d_in=d_in, d_sae=WIDTH, device="cpu", dtype=dtype, **KINDS[kind],
        reshape_activations=metadata.pop("reshape", "none"),
        metadata=sae_lens.saes.sae.SAEMetadata(**metadata),
    )  # fmt: skip
    sae = getattr(sae_lens, f"{name}SAE")(cfg)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=made))
    return sae.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoopedTransformer]:
    """SAELens's HookedSAETransformer, and a loop of one recurrence with its weights."""
    made = hooked.make_pair("full", "native", tmp_path_factory.mktemp("pair"))
    theirs = sae_lens.HookedSAETransformer(made.hooked.cfg)
    theirs.load_state_dict(made.hooked.state_dict())
    return theirs.eval(), made.looped


TOKENS = hooked.some_tokens(2, 7) % 50  # fits all models here
PLACES = ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.attn.hook_z"]


def off(features: Tensor, hook: Any) -> Tensor:
    return features * (torch.arange(WIDTH) % 3 != 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error_term", [True, False])
def test_a_splice_is_what_hooked_sae_transformer_does(
    pair: tuple[Any, LoopedTransformer], kind: str, place: str, error_term: bool
) -> None:
    theirs, model = pair
    by_head = place.endswith("_z")
    d_in = model.cfg.n_heads * model.cfg.d_head if by_head else model.cfg.d_model
    sae = autoencoder(kind, d_in, hook_name=place, reshape="hook_z" if by_head else "none")
    point = f"{place}.hook_sae_acts_post"
    with torch.no_grad():
        with theirs.saes(saes=[sae], use_error_term=error_term):
            plain = theirs(TOKENS)
            edited = theirs.run_with_hooks(TOKENS, fwd_hooks=[(point, off)])
            _, cache = theirs.run_with_cache(TOKENS)
        with model.intervening(iv.Splice(sae, error_term=error_term)):
            torch.testing.assert_close(model(TOKENS), plain, **hooked.CLOSE)
            with sae.hooks(fwd_hooks=[("hook_sae_acts_post", off)]):
                torch.testing.assert_close(model(TOKENS), edited, **hooked.CLOSE)
        features: list[Tensor] = []
        collect = iv.Splice(sae, error_term=error_term, features=lambda f, hook: features.append(f))
        with model.intervening(collect):
            model(TOKENS)
    torch.testing.assert_close(features[-1], cache[point], **hooked.CLOSE)
    assert (edited - plain).abs().max() > 1e-4


def test_gradients_at_the_features_are_those_of_hooked_sae_transformer(
    pair: tuple[Any, LoopedTransformer],
) -> None:
    theirs, model = pair
    sae = autoencoder("Standard", model.cfg.d_model, hook_name=PLACES[0])
    kept: list[Tensor] = []

    def keep(features: Tensor, hook: Any) -> None:
        features.retain_grad()
        kept.append(features)

    point = f"{PLACES[0]}.hook_sae_acts_post"
    with theirs.saes(saes=[sae], use_error_term=True):
        theirs.run_with_hooks(TOKENS, fwd_hooks=[(point, keep)]).sum().backward()
    with model.intervening(iv.Splice(sae, features=keep)):
        model(TOKENS).sum().backward()
    assert kept[0].grad is not None
    assert kept[0].grad.abs().max() > 1e-4
    torch.testing.assert_close(kept[1].grad, kept[0].grad, **hooked.CLOSE)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_recurrence_without_an_edit_the_loop_is_itself(name: str, kind: str) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS[name]))
    sae = autoencoder(kind, model.cfg.d_model, "float32")
    with torch.no_grad():
        expected = model(TOKENS, n_recurrences=5)
        with model.intervening(iv.Splice(sae, layers=1)):
            assert torch.equal(model(TOKENS, n_recurrences=5), expected)
            grown = model.generate(TOKENS, max_new_tokens=3, do_sample=False, verbose=False)
        assert torch.equal(
            grown, model.generate(TOKENS, max_new_tokens=3, do_sample=False, verbose=False)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_at_one_recurrence_its_own_forward_goes_on(kind: str) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))
    sae = autoencoder(kind, model.cfg.d_model)
    with torch.no_grad(), model.intervening(iv.Splice(sae, 2, 1, error_term=False)):
        found = model(TOKENS)
    hooks = [("recurrence.2.blocks.1.hook_resid_post", lambda x, hook: sae(x))]
    with torch.no_grad():
        assert_same(found, model.run_with_hooks(TOKENS, fwd_hooks=hooks))


def test_saelens_transcoders_are_refused() -> None:
    cfg = sae_lens.TranscoderConfig(
        d_in=16, d_sae=24, d_out=16, device="cpu", dtype="float32",
        apply_b_dec_to_input=False, metadata=sae_lens.saes.sae.SAEMetadata(
            hook_name="blocks.1.ln2.hook_normalized", hook_name_out="blocks.1.hook_mlp_out"
        ),
    )  # fmt: skip
    with refused(InputError, "blocks.1.hook_mlp_out"):
        iv.Splice(sae_lens.Transcoder(cfg))


def test_an_autoencoder_comes_back_from_its_folder(
    pair: tuple[Any, LoopedTransformer], tmp_path: Path
) -> None:
    _, model = pair
    sae = autoencoder("Standard", model.cfg.d_model, hook_name=PLACES[0])
    sae.save_model(tmp_path)
    loaded = sae_lens.SAE.load_from_disk(tmp_path, device="cpu")
    with torch.no_grad(), model.intervening(iv.Splice(loaded, error_term=False)):
        found = model(TOKENS)
    with torch.no_grad(), model.intervening(iv.Splice(sae, error_term=False)):
        assert torch.equal(found, model(TOKENS))
