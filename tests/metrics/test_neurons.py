"""Prediction and suppression neurons: closed forms, scipy's moments, every family's gains."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from closeness import rounding_bound
from conftest import VARIANTS, exact_config
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config, PretrainedConfig

from tl_looped import InputError, LoopedTransformer
from tl_looped.metrics.neurons import (
    prediction_suppression,
    prediction_suppression_fraction,
)


def cloud(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def indicator(n_hit: int, n: int) -> tuple[Tensor, Tensor]:
    """A neuron along the first ``n_hit`` of ``n`` columns, at a right angle to the rest."""
    columns = torch.eye(2)[[0] * n_hit + [1] * (n - n_hit)].T
    return torch.tensor([[3.0, 0.0]]), columns


@pytest.mark.parametrize(("percent", "counts"), [(2, True), (8, True), (9, False), (50, False)])
def test_indicator_scores(percent: int, counts: bool) -> None:
    p, q = percent / 100, 1 - percent / 100
    found = prediction_suppression_fraction(*indicator(percent, 100))
    assert found.kurtosis.item() == pytest.approx(1 / (p * q) - 3)
    assert found.skew.item() == pytest.approx((q - p) / math.sqrt(p * q), abs=1e-12)
    assert (found.prediction, found.suppression) == (float(counts), 0.0)
    assert (found.n_tokens, found.threshold) == (100, 10.0)
    at = found.kurtosis.item()
    higher = prediction_suppression_fraction(*indicator(percent, 100), threshold=at)
    assert higher.prediction == 0.0  # above, not at, the threshold
    assert prediction_suppression_fraction(*indicator(2, 100), threshold=50.0).prediction == 0.0


def test_the_kurtosis_of_the_two_sides_of_the_threshold() -> None:
    for percent, expected in ((8, 10.587), (9, 9.210)):
        found = prediction_suppression_fraction(*indicator(percent, 100))
        assert found.kurtosis.item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("n", [20, 4096])
def test_one_hot_scores(n: int) -> None:
    found = prediction_suppression_fraction(*indicator(1, n))
    assert found.kurtosis.item() == pytest.approx(n - 2 + 1 / (n - 1))


def test_gaussian_scores_are_neither() -> None:
    found = prediction_suppression_fraction(cloud(200, 64), cloud(64, 4000, seed=1))
    assert (found.prediction, found.suppression) == (0.0, 0.0)
    # Cosines of random directions in d dimensions: 3 d / (d + 2).
    assert found.kurtosis.mean().item() == pytest.approx(3 * 64 / 66, rel=0.01)


def test_fractions_and_negation() -> None:
    columns = torch.eye(30).index_fill(1, torch.arange(20, 30), 0) + 0.01 * cloud(30, 30)
    w = torch.cat((torch.eye(30)[:3], -torch.eye(30)[3:4], cloud(4, 30)))
    found = prediction_suppression_fraction(w, columns)
    assert (found.prediction, found.suppression) == (3 / 8, 1 / 8)
    negated = prediction_suppression_fraction(-w, columns)
    assert (negated.prediction, negated.suppression) == (1 / 8, 3 / 8)
    assert torch.equal(negated.skew, -found.skew)
    assert torch.equal(negated.kurtosis, found.kurtosis)


@pytest.mark.parametrize("mean", [0.0, 0.99])
def test_moments_are_those_of_scipy(mean: float) -> None:
    # With a mean far above the spread a one-pass formula loses all digits.
    w, columns = cloud(5, 16).double(), cloud(16, 300, seed=1).double().exp()
    direction = (2 * w[:1] + w[1:2]).T / w[0].norm()
    columns = (1 - mean) * columns / columns.norm(dim=0) + mean * 50 * direction
    scores = (w @ columns / columns.norm(dim=0) / w.norm(dim=-1, keepdim=True)).numpy()
    found = prediction_suppression_fraction(w, columns)
    assert found.kurtosis.tolist() == pytest.approx(stats.kurtosis(scores, axis=1, fisher=False))
    assert found.skew.tolist() == pytest.approx(stats.skew(scores, axis=1))
    # In fp32 each score is rounded, next to 1 where the mean is, and the moments see that.
    w, columns = w.float(), columns.float()
    single = prediction_suppression_fraction(w, columns)
    scores = (w @ columns / columns.norm(dim=0) / w.norm(dim=-1, keepdim=True)).double().numpy()
    rounded = torch.from_numpy(stats.kurtosis(scores, axis=1, fisher=False))
    bound = rounding_bound(found.kurtosis, rounded)
    assert single.kurtosis.tolist() == pytest.approx(found.kurtosis.tolist(), abs=bound)
    assert single.kurtosis.dtype is torch.float64


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-30, 1e-3, 1e3, 1e30]))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_lengths_do_not_matter_and_neither_does_the_basis(seed: int, scale: float) -> None:
    w, columns = cloud(6, 8, seed=seed), cloud(8, 40, seed=seed + 5000)
    plain = prediction_suppression_fraction(w, columns)
    lengths = scale * (1 + cloud(40, seed=seed).square())
    turn = torch.linalg.qr(cloud(8, 8, seed=seed))[0]
    moved = prediction_suppression_fraction(w @ turn / scale, turn.T @ columns * lengths)
    assert moved.kurtosis.tolist() == pytest.approx(plain.kurtosis.tolist(), rel=1e-4)
    assert moved.skew.tolist() == pytest.approx(plain.skew.tolist(), abs=1e-4)


def test_chunks_give_the_same() -> None:
    w, columns = cloud(23, 8), cloud(8, 50, seed=1)
    whole = prediction_suppression_fraction(w, columns)
    for neurons in (1, 7):
        found = prediction_suppression_fraction(w, columns, chunk_bytes=neurons * 50 * 8)
        assert found.kurtosis.tolist() == pytest.approx(whole.kurtosis.tolist(), rel=1e-5)
        assert found.skew.tolist() == pytest.approx(whole.skew.tolist(), rel=1e-4)


def test_memory_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    matmul = Tensor.__matmul__

    def watched(a: Tensor, b: Tensor) -> Tensor:
        out = matmul(a, b)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    prediction_suppression_fraction(cloud(64, 4), cloud(4, 100), chunk_bytes=8000)
    assert sizes == [1000] * 6 + [400]


def test_zero_columns_are_left_out_and_zero_neurons_are_neither() -> None:
    w, columns = indicator(8, 100)
    padded = torch.cat((columns, torch.zeros(2, 30)), -1)
    found = prediction_suppression_fraction(torch.cat((w, 0 * w)), padded)
    assert found.n_tokens == 100
    assert found.kurtosis[0].item() == pytest.approx(1 / (0.08 * 0.92) - 3)
    assert found.kurtosis[1].isnan()
    assert found.skew[1].isnan()
    assert (found.prediction, found.suppression) == (0.5, 0.0)


def test_scores_without_spread_have_no_moments() -> None:
    same = cloud(16, 1).expand(16, 500) * (1 + torch.arange(500))
    found = prediction_suppression_fraction(cloud(9, 16, seed=1), same)
    assert found.kurtosis.isnan().all()
    assert (found.prediction, found.suppression) == (0.0, 0.0)
    assert prediction_suppression_fraction(cloud(2, 3), cloud(3, 1)).skew.isnan().all()


def test_half_precision_gradients_and_the_callers_tensors() -> None:
    w, columns = cloud(9, 8).bfloat16().requires_grad_(), cloud(8, 50, seed=1).half()
    before = columns.clone()
    found = prediction_suppression_fraction(w, columns)
    expected = prediction_suppression_fraction(w.detach().float(), columns.float())
    assert torch.equal(found.kurtosis, expected.kurtosis)
    assert torch.equal(columns, before)
    single = columns.float()
    prediction_suppression_fraction(w, single)
    assert torch.equal(single, before.float())
    with torch.inference_mode():
        assert torch.equal(prediction_suppression_fraction(w, columns).skew, found.skew)


def test_wrong_weights() -> None:
    w, columns = cloud(3, 4), cloud(4, 9)
    with pytest.raises(InputError, match=r"w_out.*d_model=9"):
        prediction_suppression_fraction(w, columns.T)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match="w_out"):
            prediction_suppression_fraction(w.index_fill(0, torch.tensor([1]), bad), columns)
        with pytest.raises(InputError, match="unembed"):
            prediction_suppression_fraction(w, columns.index_fill(1, torch.tensor([1]), bad))
    with pytest.raises(InputError, match=r"unembed.*\b9\b"):
        prediction_suppression_fraction(w, 0 * columns)


# -- models -------------------------------------------------------------------------------------


def make(kind: str, **changes: Any) -> LoopedTransformer:
    """A model with gains far from one, so that one left out shows."""
    model = LoopedTransformer.from_config(exact_config(**(VARIANTS[kind] | changes)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.2, 3.0, generator=generator)
    return model


@pytest.mark.parametrize("kind", list(VARIANTS))
def test_every_layer_with_weights_of_its_own_once(kind: str) -> None:
    model = make(kind)
    found = prediction_suppression(model, threshold=3.0)
    p, k, c = model.loop.p, model.loop.k, model.loop.c
    assert found["stage"].values.tolist() == ["prelude"] * p + ["core"] * k + ["coda"] * c
    assert found["layer_in_stage"].values.tolist() == [*range(p), *range(k), *range(c)]
    assert found["kurtosis"].dims == ("layer", "neuron")
    assert found.attrs["norm_layout"] == model.cfg.norm_layout.value
    assert (found.attrs["threshold"], found.attrs["n_vocab"]) == (3.0, 50)
    # Where the write meets the logits: through the norm behind the MLP and the final one.
    stages = [*model.prelude, *model.core, *model.coda]
    matrix = model.embed.W_E if model.cfg.tie_embeddings else model.unembed.weight
    columns = (matrix * model.final_norm.w).T
    for i, weights in enumerate(stages):
        w = weights.mlp.down.T
        w = w * weights.ln2_post.w if hasattr(weights, "ln2_post") else w
        expected = prediction_suppression_fraction(w, columns, threshold=3.0)
        assert found["kurtosis"][i].values == pytest.approx(expected.kurtosis.numpy(), rel=1e-4)
        assert found["skew"][i].values == pytest.approx(expected.skew.numpy(), abs=1e-4)
        assert found["prediction"][i] == expected.prediction
        assert found["suppression"][i] == expected.suppression


def test_the_direction_is_labelled() -> None:
    labels = {
        "pre": "raw",
        "post-qk-norm": "times the gain of ln2_post",
        "sandwich-loop-norm": "times the gain of ln2_post",
        "residual-injection": "raw: ln_out acts on the sum and cannot be folded",
    }
    for kind, label in labels.items():
        assert prediction_suppression(make(kind)).attrs["direction"] == label


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compatibility_mode_and_recurrences_change_nothing(dtype: torch.dtype) -> None:
    model = make("post-qk-norm", dtype=dtype)
    before = prediction_suppression(model)
    model.enable_compatibility_mode()
    model.set_recurrences(1)
    assert prediction_suppression(model).identical(before)


class Words:
    """As much of a tokenizer as has a length."""

    def __len__(self) -> int:
        return 37


def test_padding_columns_are_no_tokens() -> None:
    model = make("pre")
    everything = prediction_suppression(model)
    with torch.no_grad():
        model.unembed.weight[37:] = 100 * cloud(13, 32)
    asked = prediction_suppression(model, n_vocab=37)
    assert (asked.attrs["n_vocab"], asked.attrs["d_vocab"], asked.attrs["n_tokens"]) == (37, 50, 37)
    model.tokenizer = Words()
    assert prediction_suppression(model).identical(asked)
    assert prediction_suppression(model, n_vocab=50).attrs["n_tokens"] == 50
    assert not np.allclose(asked["kurtosis"], everything["kurtosis"])
    for bad in (0, 51):
        with pytest.raises(InputError, match=r"n_vocab.*\b1\b.*\b50\b"):
            prediction_suppression(model, n_vocab=bad)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "post"),
    [
        (LlamaConfig(**SIZES), None),
        (Olmo2Config(**SIZES), "post_feedforward_layernorm"),
    ],
)
def test_feedforward_models(config: PretrainedConfig, post: str | None) -> None:
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.2, 3.0)
    gain = hf.model.norm.weight.detach().clone()
    columns = hf.lm_head.weight.detach().clone().T * gain[:, None]
    directions = []
    for layer in hf.model.layers:
        w = layer.mlp.down_proj.weight.detach().clone().T
        directions.append(w if post is None else w * getattr(layer, post).weight.detach())
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)
    found = prediction_suppression(bridge, n_vocab=39, threshold=3.0)
    for i, w in enumerate(directions):
        expected = prediction_suppression_fraction(w, columns[:, :39], threshold=3.0)
        assert found["kurtosis"][i].values == pytest.approx(expected.kurtosis.numpy(), rel=1e-4)
        assert found["prediction"][i] == expected.prediction
    assert found["stage"].values.tolist() == ["feedforward"] * 2
    assert found["layer_in_stage"].values.tolist() == [0, 1]
    assert found.attrs["direction"] == ("raw" if post is None else "times the gain of ln2_post")
    bridge.enable_compatibility_mode(
        disable_warnings=True, center_unembed=False, fold_ln=post is None
    )  # TransformerLens folds no OLMo-2
    folded = prediction_suppression(bridge, n_vocab=39, threshold=3.0)
    assert np.allclose(folded["kurtosis"], found["kurtosis"], rtol=1e-3)


def test_a_looped_model_run_once_is_a_feedforward_model() -> None:
    model = make("sandwich-loop-norm")
    unrolled = prediction_suppression(model.to_bridge(n_recurrences=1))
    looped = prediction_suppression(model)
    assert np.allclose(unrolled["kurtosis"], looped["kurtosis"], rtol=1e-4)
    assert unrolled.attrs["direction"] == looped.attrs["direction"]


def test_feedforward_models_that_cannot_be_read() -> None:
    model = make("pre").to_bridge(n_recurrences=1)
    vars(model.cfg)["rmsnorm_uses_offset"] = True  # of another family; a looped one refuses it
    with pytest.raises(InputError, match="as an offset from one"):
        prediction_suppression(model)
