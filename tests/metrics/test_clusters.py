"""Stages as clusters: exact cycles, known depths, scikit-learn's index by pair counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from tl_looped import InputError
from tl_looped.metrics.clusters import depth_clusters

# Three groups of layers, far apart, in two features of very different scales.
CENTRES = np.array([[0.0, 5000.0], [1.0, 0.0], [0.5, -5000.0]])


def layers(stages: list[int], seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(len(stages), 2)) * [0.01, 10.0]
    return CENTRES[stages] + noise


FEEDFORWARD = [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_stages_of_a_feedforward_model_and_a_loop() -> None:
    core = np.stack([layers([0, 1, 1, 2], 1), layers([1, 1, 2, 2], 2), layers([2, 0, 1, 0], 3)])
    found = depth_clusters(
        layers(FEEDFORWARD), core, prelude=layers([0, 0], 4), coda=layers([2, 2], 5), seed=7
    )
    assert found.feedforward.tolist() == FEEDFORWARD
    assert found.prelude.tolist() == [0, 0]
    assert found.core.tolist() == [[0, 1, 1, 2], [1, 1, 2, 2], [2, 0, 1, 0]]
    assert found.coda.tolist() == [2, 2]
    assert found.transitions.tolist() == [2, 1, 3]
    assert found.wraps.tolist() == [True, False]
    # Nine feedforward layers, changes after layers 2 and 6.
    assert found.feedforward_boundaries == (31.25, 81.25)
    # Eight layers, prelude 0 0, coda 2 2.
    assert found.boundaries[0] == pytest.approx((250 / 7, 450 / 7))
    assert found.boundaries[1] == pytest.approx((150 / 7, 350 / 7))
    assert len(found.boundaries[2]) == 5
    # Depths i/7 against j/8: the nearest of 9 layers are 0 1 2 3 5 6 7 8, stages 0 0 0 1 1 1 2 2.
    assert found.agreement_feedforward.tolist() == [7 / 8, 5 / 8, 5 / 8]
    assert (found.n_init, found.seed) == (20, 7)
    assert found.distance.shape == (3, 4)
    assert (found.distance < 0.1).all()


def pair_count_index(a: list[int], b: list[int]) -> float:
    """Adjusted Rand index by its definition over pairs."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    in_a, in_b = (sum(x[i] == x[j] for i, j in pairs) for x in (a, b))
    expected = in_a * in_b / len(pairs)
    return (both - expected) / ((in_a + in_b) / 2 - expected)


def test_rand_indices() -> None:
    core = np.stack([layers([0, 1, 1, 2], 1), layers([1, 1, 2, 2], 2), layers([2, 0, 0, 1], 3)])
    found = depth_clusters(layers(FEEDFORWARD), core)
    labels = found.core.tolist()
    for i, j in itertools.product(range(3), range(3)):
        expected = pair_count_index(labels[i], labels[j])
        assert found.rand_recurrences[i, j] == pytest.approx(expected)
    # The third groups its layers as the first does, under other names.
    assert found.rand_recurrences[0, 2] == 1.0
    assert found.agreement_recurrences[0, 2] == 0.0
    assert found.agreement_recurrences[0, 1] == 0.5
    # Four layers, depths 0, 1/3, 2/3, 1 against j/8: layers 0, 3, 5, 8.
    expected = [pair_count_index([0, 1, 1, 2], row) for row in labels]
    assert found.rand_feedforward.tolist() == pytest.approx(expected)


@given(stages=st.lists(st.integers(0, 2), min_size=1, max_size=8), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=10, derandomize=True)
def test_an_exact_cycle_has_index_one(stages: list[int], seed: int) -> None:
    core = np.repeat(layers(stages, seed)[None], 3, axis=0)
    found = depth_clusters(layers(FEEDFORWARD), core, n_init=2)
    assert found.core.tolist() == [stages] * 3
    assert found.rand_recurrences.tolist() == np.ones((3, 3)).tolist()
    assert found.agreement_recurrences.tolist() == np.ones((3, 3)).tolist()
    changes = sum(a != b for a, b in itertools.pairwise(stages))
    assert found.transitions.tolist() == [changes] * 3
    assert found.wraps.tolist() == [stages[0] != stages[-1]] * 2


def test_the_feedforward_model_itself() -> None:
    f = layers(FEEDFORWARD)
    found = depth_clusters(f, f[None, 2:7], prelude=f[:2], coda=f[7:])
    assert found.rand_feedforward.tolist() == found.agreement_feedforward.tolist() == [1.0]
    assert found.boundaries == (found.feedforward_boundaries,)
    twice = depth_clusters(f, np.repeat(f, 2, axis=0)[None])
    assert twice.agreement_feedforward.tolist() == [1.0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_stages_are_numbered_by_depth(order: tuple[int, ...]) -> None:
    found = depth_clusters(layers([order[s] for s in FEEDFORWARD]), layers([order[1]])[None])
    assert found.feedforward.tolist() == FEEDFORWARD
    assert found.core.tolist() == [[1]]


def test_a_match_half_way_is_the_shallower_layer() -> None:
    # Three layers against two: depth 1/2 is as near to 0 as to 1.
    found = depth_clusters(layers([0, 1]), layers([0, 0, 1])[None], n_clusters=2)
    assert found.agreement_feedforward.tolist() == [1.0]
    # Seven against four: depths i/6 against j/3, half way at i = 1, 3 and 5.
    stages = [0, 0, 1, 1, 2, 2, 0]
    found = depth_clusters(layers([0, 1, 2, 0]), layers(stages)[None])
    assert found.feedforward.tolist() == [1, 0, 2, 1]
    assert found.agreement_feedforward.tolist() == [1.0]
    assert found.rand_feedforward.tolist() == [1.0]


def test_features_are_scored_by_the_feedforward_statistics() -> None:
    f = layers(FEEDFORWARD)
    found = depth_clusters(f, f[None])
    assert np.allclose(found.feature_mean, f.mean(0))
    assert np.allclose(found.feature_sd, f.std(0))
    groups = [f[np.array(FEEDFORWARD) == s].mean(0) for s in range(3)]
    assert np.allclose(found.centres, (np.array(groups) - f.mean(0)) / f.std(0))
    # The unit of a feature does not matter, nor does what the loop does.
    scaled = depth_clusters(f * [1e-3, 1e9] + 3, np.stack([f, 2 * f])[:, :4] * [1e-3, 1e9] + 3)
    assert scaled.feedforward.tolist() == FEEDFORWARD
    assert np.allclose(scaled.distance[0], found.distance[0, :4], rtol=1e-5)


def test_a_layer_like_none_is_far_from_its_stage() -> None:
    f = layers(FEEDFORWARD)
    outlier = f[None, :1] + 100 * f.std(0)
    found = depth_clusters(f, outlier)
    assert found.distance[0, 0] == pytest.approx(100 * math.sqrt(2), rel=0.05)


def test_tensors_and_seeds() -> None:
    f, core = torch.tensor(layers(FEEDFORWARD)), torch.tensor(layers([0, 1, 2])[None])
    found = depth_clusters(f.half().requires_grad_(), core.bfloat16())
    assert found.core.tolist() == [[0, 1, 2]]
    noise = np.random.default_rng(0).normal(size=(30, 5))
    one, again = (depth_clusters(noise, noise[None], seed=3) for _ in range(2))
    assert one.feedforward.tolist() == again.feedforward.tolist()
    assert adjusted_rand_score(one.feedforward, one.core[0]) == 1.0


def test_wrong_features() -> None:
    f, core = layers(FEEDFORWARD), layers([0, 1])[None]
    flat = np.concatenate([f, np.full((9, 1), 0.1)], axis=1)
    with pytest.raises(InputError, match=r"feedforward.*\b2\b"):
        depth_clusters(flat, np.zeros((1, 2, 3)))
    broken = core.copy()
    broken[0, 1, 1] = math.nan
    with pytest.raises(InputError, match=r"core.*nan.*\[0, 1, 1\]"):
        depth_clusters(f, broken)
    with pytest.raises(InputError, match=r"prelude.*inf"):
        depth_clusters(f, core, prelude=f * math.inf)
    with pytest.raises(InputError, match="feedforward"):
        depth_clusters(f * math.nan, core)
    with pytest.raises(InputError, match=r"\b2\b.*\b2\b.*n_"):
        depth_clusters(f[:2], core)
    with pytest.raises(InputError, match=r"\b4\b.*\b2\b"):
        depth_clusters(f[[0, 0, 5, 5]], core)
    with pytest.raises(InputError, match=r"coda.*\b2\b.*feedforward.*\b3\b"):
        depth_clusters(f, core, coda=np.zeros((1, 3)))
    with pytest.raises(InputError, match="core"):
        depth_clusters(f, np.zeros((0, 2, 2)))
    for bad in ({"n_clusters": 0}, {"n_init": 0}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            depth_clusters(f, core, **bad)
