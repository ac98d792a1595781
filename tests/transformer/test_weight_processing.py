"""TransformerLens's weight processing: what a model shows, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import VARIANTS, exact_config, with_gains
from refusals import refused
from torch import Tensor

from tl_looped import InputError, LoopedTransformer
from tl_looped.exits import ExitAt

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> LoopedTransformer:
    return with_gains(LoopedTransformer.from_config(exact_config(**VARIANTS[request.param])))


def centered(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def ways_out(model: LoopedTransformer, tokens: Tensor) -> dict[str, Tensor]:
    """Logits from every door that gives some."""
    logits, cache = model.run_with_cache(tokens)
    x, run = model.start_run(tokens, 0)
    *_, last = model.unroll(x, run)
    core_out = cache["resid_post", model.loop.p + model.loop.k * model.loop.R - 1]
    out = {
        "forward": logits,
        "hook": cache["unembed.hook_out"],
        "read_out": model.read_out(last, run),
        "logit_lens": model.logit_lens(cache["resid_post", 1]),
        "coda_lens": model.coda_lens(core_out),
        "exit_rule": model(tokens, exit_rule=ExitAt(1)).output,
        "unembed": model.unembed(model.ln_final(cache["resid_post", -1])),
        "zero": model(tokens, n_recurrences=model.cfg.min_recurrences),
        "W_U": cache["ln_final.hook_normalized"] @ (model.ln_final.w[:, None] * model.W_U),
    }
    if model.cfg.exit_gate:
        out["exits"] = model.exits(tokens).exit_logits
    return out


@pytest.mark.parametrize("fold", [False, True])
def test_centred_logits_are_the_logits_without_their_mean(
    model: LoopedTransformer, tokens: Tensor, fold: bool
) -> None:
    before = ways_out(model, tokens)
    losses = model(tokens, return_type="loss", loss_per_token=True)
    model.enable_compatibility_mode(fold_ln=fold, center_unembed=True)
    after = ways_out(model, tokens)
    for name, logits in after.items():
        assert_same(logits, centered(before[name]), float(before[name].abs().max()))
    assert_same(model(tokens, return_type="loss", loss_per_token=True), losses)
    model.enable_compatibility_mode(no_processing=True)
    assert all(torch.equal(x, before[name]) for name, x in ways_out(model, tokens).items())


@pytest.mark.parametrize("fold", [False, True])
def test_a_centred_matrix_is_centred_wherever_it_is_read(
    model: LoopedTransformer, tokens: Tensor, fold: bool
) -> None:
    plain = model.unembed.matrix.T.clone()
    model.enable_compatibility_mode(fold_ln=fold, center_unembed=True)
    gain = model.final_norm.w[:, None] if fold else 1.0
    assert_same(model.W_U, gain * (plain - plain.mean(-1, keepdim=True)))
    assert torch.equal(model.unembed.matrix.T, plain)
    assert torch.equal(model.tl_parameters()["unembed.W_U"], model.W_U)
    ids = torch.tensor([[7, 9], [3, 3]])
    assert_same(model.tokens_to_residual_directions(ids), model.W_U.T[ids])
    logits, cache = model.run_with_cache(tokens)
    parts = cache.decompose_resid()
    assert_same(cache.logit_attrs(parts, 7).sum(0), logits[..., 7])


def test_views_and_what_is_said_follow(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config())
    _, cache = model.run_with_cache(tokens)
    assert not model.cfg.center_unembed
    model.enable_compatibility_mode(center_unembed=True)
    assert model.cfg.center_unembed
    assert cache.model.cfg.center_unembed
    assert_same(model(tokens, n_recurrences=2).sum(-1), torch.zeros(2, 9).double(), scale=50.0)
    model.enable_compatibility_mode(fold_ln=False)  # says nothing of the unembedding
    assert model.cfg.center_unembed
    assert "center_unembed" not in model.cfg.to_json()
    new = LoopedTransformer.from_config(model.cfg)
    assert not new.cfg.center_unembed
    assert not new.unembed.centered
    view = model.view_at(2)
    view.enable_compatibility_mode(center_unembed=False)
    assert not model.unembed.centered
    assert not view.cfg.center_unembed


def test_what_a_looped_model_cannot_be_processed_to() -> None:
    model = LoopedTransformer.from_config(exact_config(v_bias=True))
    with refused(InputError, "refactor_factored_attn_matrices", "rotary"):
        model.enable_compatibility_mode(refactor_factored_attn_matrices=True)
    with refused(InputError, "fold_value_biases=True", "attn.b_V"):
        model.enable_compatibility_mode(fold_value_biases=True)
    assert model.cfg.normalization_type == "RMS"  # nothing was done by halves
    without: Any = LoopedTransformer.from_config(exact_config())
    without.enable_compatibility_mode(fold_value_biases=True)
    assert without.cfg.normalization_type == "RMSPre"


def test_what_the_defaults_of_each_method_do(tokens: Tensor) -> None:
    """TransformerLens's defaults, but for the switch that changes nothing else of a run."""
    for kind, method, folds, centres in (
        ("pre", "enable_compatibility_mode", True, False),
        ("pre", "process_weights", True, True),
        ("pre", "process_weights_", True, True),
    ):
        model = with_gains(LoopedTransformer.from_config(exact_config(**VARIANTS[kind])))
        before = model(tokens)
        assert getattr(model, method)() is None
        assert (model.compatibility_mode, model.cfg.center_unembed) == (folds, centres)
        expected = centered(before) if centres else before
        assert_same(model(tokens), expected, float(before.abs().max()))
    biased = LoopedTransformer.from_config(exact_config(v_bias=True))
    biased.enable_compatibility_mode()
    assert biased.compatibility_mode
