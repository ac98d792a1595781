"""Textbook stages of inference on pretrained weights, and what a loop nobody trained makes of them.

Bounds, not values, each with its source; the weights are the Q4_1 quantisation of
SmolLM2-135M-Instruct, dequantised. Layers count from 0.

- Massive activations: Sun et al. 2024 (arXiv 2402.17762).
- Attention sinks: Xiao et al. 2023 (2309.17453); their rate at the threshold 0.3: Gu et al. 2024
  (2410.10781).
- Compression valleys: Queipo-de-Llano et al. 2025 (2510.06477).
- Stages and robustness of single layers: Lad et al. 2024 (2406.19384).
- Stages along the loop: arXiv 2604.11791.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from real.texts import LIGHTHOUSE
from tl_looped import LoopedTransformer, metrics

TEXTS = [
    LIGHTHOUSE,
    "Bread is made of flour, water, salt and yeast. The dough is kneaded until it is smooth, left "
    "to rise for about an hour in a warm place, shaped into a loaf and baked until it is brown.",
    "In spring the river rises quickly, because the snow in the mountains melts all at once. "
    "Farmers in the valley have learned to watch the water, and they move their animals to higher "
    "ground long before the fields are flooded.",
    "A good map leaves things out. It shows the roads if you drive and the depth of the water if "
    "you sail, and whoever drew it had to decide what a traveller would not miss.",
]
N_LAYERS = 30
MADE = 11  # the layer whose feedforward block writes the massive activation
MASSIVE = slice(MADE, 28)
WANTED = ["signature", "sink_score", "magnitude"]


@pytest.fixture(scope="module")
def model(virtual: Callable[..., LoopedTransformer]) -> LoopedTransformer:
    """Every layer once, in order."""
    return virtual()


def curves(model: LoopedTransformer, **options: Any) -> xr.Dataset:
    """Metrics by effective layer and prompt."""
    data = metrics.stream(model, TEXTS, WANTED, by="depth", **options)
    return data.mean("head")


def erase(x: Tensor, hook: Any) -> Tensor:
    x[:, 0] = 0
    return x


ERASE = [(f"blocks.{MADE}.hook_mlp_out", erase)]


@pytest.fixture(scope="module")
def whole(model: LoopedTransformer) -> xr.Dataset:
    with torch.no_grad():
        return curves(model)


@pytest.fixture(scope="module")
def erased(model: LoopedTransformer) -> xr.Dataset:
    """Without what layer 11's feedforward block writes at the first token."""
    with torch.no_grad(), model.hooks(fwd_hooks=ERASE):
        return curves(model)


def test_a_massive_activation_of_the_first_token(model: LoopedTransformer) -> None:
    """Sun et al. call so what is above 100 and some 1,000 times the median of its state."""
    places = set()
    for row in model.token_rows(TEXTS):
        _, cache = model.run_with_cache(row[None], names_filter=lambda n: n.endswith("resid_post"))
        sizes = torch.stack([cache["resid_post", i][0] for i in range(N_LAYERS)]).abs()
        largest = sizes.flatten(1).max(1).values
        massive = (largest > 100) & (largest > 1000 * sizes.flatten(1).median(1).values)
        assert massive[MASSIVE].all()
        assert not massive[:MADE].any()
        assert not massive[-1]
        for state in sizes[MASSIVE]:
            places.add(divmod(int(state.argmax()), model.cfg.d_model))
    # The first token, in one and the same direction whatever it is.
    assert len(places) == 1
    assert places.pop()[0] == 0


def test_one_layer_makes_it_and_it_stays(whole: xr.Dataset) -> None:
    first = whole["residual_first"].transpose("prompt", "effective_layer").to_numpy()
    assert (first[:, MADE] > 100 * first[:, MADE - 1]).all()
    lasting = first[:, MASSIVE]
    assert (lasting.min(1) > 0.95 * lasting.max(1)).all()
    assert (first[:, -1] < 0.5 * lasting.min(1)).all()
    heavy = metrics.find_heavy_token(whole)
    assert heavy is not None
    assert (heavy.prompts, heavy.of, heavy.is_first) == (len(TEXTS), len(TEXTS), True)


def test_attention_sinks_from_there_on(whole: xr.Dataset, erased: xr.Dataset) -> None:
    rate = whole["sink_rate"].mean("prompt").to_numpy()
    assert (rate[[0, 1, MADE - 1, MADE]] < 0.05).all()
    # "High": most heads of every layer behind, and nearly all of them on the whole.
    assert (rate[MADE + 1 :] > 0.5).all()
    assert rate[MADE + 1 : 28].mean() > 0.85
    # Without the massive activation the later layers have next to none.
    without = erased["sink_rate"].mean("prompt").to_numpy()
    np.testing.assert_array_equal(without[:MADE], rate[:MADE])
    assert (without[17:] < 0.1).all()


def test_a_compression_valley_as_long_as_it_lasts(whole: xr.Dataset, erased: xr.Dataset) -> None:
    bits = whole["entropy_bits"].transpose("prompt", "effective_layer").to_numpy()
    valley = bits[:, MASSIVE]
    assert (valley.max(1) < 0.25 * bits[:, MADE - 1]).all()
    assert (bits[:, -1] > 3 * valley.max(1)).all()
    without = erased["entropy_bits"].transpose("prompt", "effective_layer").to_numpy()
    assert (without[:, MASSIVE].min(1) > 4 * valley.max(1)).all()


def test_one_token_s_share_bounds_the_entropy(model: LoopedTransformer, whole: xr.Dataset) -> None:
    """The largest share of the spectrum is at least that of the heaviest token, ``p``.

    The entropy is then at most that of ``p`` and the rest spread evenly over all other directions.
    """
    for i, row in enumerate(model.token_rows(TEXTS)):
        _, cache = model.run_with_cache(row[None], names_filter=lambda n: n.endswith("resid_post"))
        for layer in range(MADE, N_LAYERS):
            squares = cache["resid_post", layer][0].double().square().sum(-1)
            p = float(squares.max() / squares.sum())
            rest = (1 - p) * math.log2((len(row) - 1) / (1 - p))
            found = float(whole["entropy_bits"].isel(prompt=i, effective_layer=layer))
            assert 0 < found <= -p * math.log2(p) + rest
            # Of the squared singular values themselves; metrics take the smaller Gram matrix.
            # States of two runs in fp32 differ by some 1e-5, entropies by a few times that.
            shares = torch.linalg.svdvals(cache["resid_post", layer][0].double()).square()
            bits = float(torch.special.entr(shares / shares.sum()).sum()) / math.log(2)
            assert abs(found - bits) < 1e-3 * bits
            if layer < 28:
                assert p > 0.9


def test_early_layers_mix(whole: xr.Dataset) -> None:
    mixing = whole["mixing_per_token"].mean("prompt").to_numpy()
    assert mixing[:2].min() > mixing[MADE + 1 : 28].max()


def test_mixing_is_the_mean_entropy_of_rows_over_the_length(
    model: LoopedTransformer, whole: xr.Dataset
) -> None:
    row = model.token_rows(TEXTS)[0]
    _, cache = model.run_with_cache(row[None], names_filter=lambda n: n.endswith("hook_pattern"))
    found = whole["mixing_per_token"].isel(prompt=0)
    for layer in (0, MADE, N_LAYERS - 1):
        nats = torch.special.entr(cache["pattern", layer].double()).sum(-1).mean()
        expected = float(nats) / len(row)
        # Patterns of two runs in fp32 differ by some 1e-5 (test_parity).
        assert abs(float(found.isel(effective_layer=layer)) - expected) < 1e-3 * expected


def test_the_prediction_settles_late(model: LoopedTransformer) -> None:
    agreeing, n = dict.fromkeys((4, 9, 14, 19, 24, 29), 0), 0
    for row in model.token_rows(TEXTS):
        logits, cache = model.run_with_cache(
            row[None], names_filter=lambda n: n.endswith("resid_post")
        )
        best = logits[0].argmax(-1)
        for i in agreeing:
            read = model.logit_lens(cache["resid_post", i])[0].argmax(-1)
            agreeing[i] += int((read == best).sum())
        n += len(best)
    share = {layer: same / n for layer, same in agreeing.items()}
    assert share[29] == 1
    # Few at two thirds of the depth, and not half of the tokens at five sixths.
    assert max(share[layer] for layer in (4, 9, 14, 19)) < 0.2
    assert share[24] < 0.5


def without_layer(model: LoopedTransformer, layer: int, row: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        kept.append(x.clone())

    def put(x: Tensor, hook: Any) -> Tensor:
        return kept[0]

    hooks = [(f"blocks.{layer}.hook_resid_pre", keep), (f"blocks.{layer}.hook_resid_post", put)]
    return model.run_with_hooks(row[None], fwd_hooks=hooks)[0].argmax(-1)


def test_middle_layers_can_be_left_out_and_the_first_cannot(model: LoopedTransformer) -> None:
    """Lad et al.: 72 to 95 percent of predictions stay. Layer 11 is not like its neighbours."""
    rows = model.token_rows(TEXTS)
    best = [model(row[None])[0].argmax(-1) for row in rows]

    def staying(layer: int) -> float:
        same = [
            without_layer(model, layer, row) == expected
            for row, expected in zip(rows, best, strict=True)
        ]
        return float(torch.cat(same).float().mean())

    middle = [staying(layer) for layer in (12, 16, 20)]
    assert min(middle) > 0.66
    assert staying(0) < 0.1
    assert staying(1) < 0.5 * min(middle)
    assert staying(MADE) < 0.5 * min(middle)
    assert staying(28) < min(middle)


# -- in a loop without training ------------------------------------------------------------------


def looped(model: LoopedTransformer, n: int, **options: Any) -> xr.Dataset:
    data = metrics.stream(model, TEXTS, WANTED, n_recurrences=n, **options)
    return data.mean(["head", "prompt"]).transpose("recurrence", "layer")


def chance(table: np.ndarray) -> float:
    """Largest share of the orders of layers that are like the first recurrence's as theirs is.

    Of recurrence 1 and on: one-sided exact permutation p of Pearson's r.
    """
    first, *later = table - table.mean(1, keepdims=True)
    orders = np.array(list(permutations(range(len(first)))))
    return max(float((row[orders] @ first >= row @ first - 1e-12).mean()) for row in later)


def correlations(table: np.ndarray) -> np.ndarray:
    """Pearson's r of every recurrence's profile over the layers with the first one's."""
    found: np.ndarray = np.corrcoef(table)[0, 1:]
    return found


def test_in_the_massive_stretch_attention_repeats_and_entropy_does_not(
    model: LoopedTransformer,
) -> None:
    """Layers 12 to 17: every recurrence has the first one's profile of attention."""
    data = looped(model, 4)
    assert data["sink_rate"].min() > 0.5
    for name in ("sink_score", "colsum_concentration"):
        assert chance(data[name].to_numpy()) <= 0.05, name
    first = data["residual_first"].to_numpy()
    assert (np.diff(first.ravel()) < 0).all()  # nothing makes it anew
    bits = data["entropy_bits"].to_numpy()
    assert (np.diff(bits, axis=0) > 0).all()  # and the rest of the stream catches up
    rest = looped(model, 4, skip_first=1)["residual_mean"].to_numpy()
    assert (np.diff(rest, axis=0) > 0).all()


def test_the_massive_activation_is_made_once(virtual: Callable[..., LoopedTransformer]) -> None:
    """Layers 10 to 19 hold the layer that makes it: it does so in the first recurrence alone."""
    data = looped(virtual(range(10, 20)), 4)
    first = data["residual_first"].to_numpy()
    assert first[0, 1] > 100 * first[0, 0]
    assert first[1:].max() < first[0, 1]
    assert first[1:].min() > 0.95 * first[0, 1]
    # Layer 10 comes before it once, and after it from then on; layer 11 has no sinks either way.
    rate = data["sink_rate"].to_numpy()
    assert rate[0, 0] < 0.05
    assert (rate[1:, 0] > 0.25).all()
    assert (rate[:, 1] < 0.05).all()
    assert (correlations(rate[:, 1:]) > 0.9).all()


def test_stages_do_not_start_anew_in_a_loop_of_nearly_all_layers(
    virtual: Callable[..., LoopedTransformer],
) -> None:
    """Layers 4 to 27: later recurrences are like each other, and not like the first one."""
    rate = looped(virtual(range(4, 28)), 4)["sink_rate"].to_numpy()
    late = np.corrcoef(rate[1:])[np.triu_indices(3, 1)]
    assert late.min() > correlations(rate).max()
    # The sinks of the layers at the core's beginning, whose input is the core's output now.
    assert rate[0, :2].min() > 2 * rate[1:, :2].max()
