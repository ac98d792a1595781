"""PCA trajectories: closed forms of cycle, circle and line, invariances, degenerate input."""

from __future__ import annotations

import math

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_looped import InputError
from tl_looped.metrics.trajectories import pca_trajectory


def cloud(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def rotation_matrix(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(cloud(d, d, seed=seed))[0]


def test_an_exact_cycle_gives_as_many_points_as_it_has_layers() -> None:
    cycle = cloud(3, 5)
    path = pca_trajectory(cycle.repeat(4, 1, 1)).coordinates
    assert path.shape == (4, 3, 2)
    assert torch.allclose(path, path[0].expand(4, 3, 2), atol=1e-12)
    # Three points span a plane, so that their distances are kept.
    assert torch.allclose(torch.cdist(path[0], path[0]), torch.cdist(cycle, cycle), atol=1e-12)


def test_a_circle_explains_a_half_each() -> None:
    radius = 0.5
    found = pca_trajectory(toys.rotation(16, period=8, radius=radius)[:, :, 0])
    assert found.explained_variance_ratio.tolist() == pytest.approx([0.5, 0.5], abs=1e-12)
    assert torch.allclose(found.coordinates.norm(dim=-1), torch.tensor(radius).double())
    assert torch.allclose(found.mean, torch.tensor([0, 0, 1, 0]).double(), atol=1e-12)


def test_a_line_is_one_component() -> None:
    found = pca_trajectory(toys.drift(5, speed=0.05)[:, 0, 0])
    assert found.explained_variance_ratio.tolist() == [pytest.approx(1.0), 0.0]
    # The largest loading is positive, so that the path goes up.
    expected = 0.05 * (torch.arange(5) - 2.0).double()
    assert torch.allclose(found.coordinates[:, 0], expected)
    assert found.coordinates[:, 1].tolist() == [0.0] * 5
    assert found.components[0].tolist() == pytest.approx([0, 1, 0, 0], abs=1e-12)
    assert found.components[1].isnan().all()


def test_variances_and_loadings_of_a_cloud() -> None:
    points = cloud(40, 6) * torch.tensor([5.0, 4, 3, 2, 1, 0.5])
    found = pca_trajectory(points, 3)
    spectrum, vectors = torch.linalg.eigh(torch.cov(points.T))
    assert torch.allclose(
        found.explained_variance_ratio, spectrum.flip(0)[:3] / spectrum.sum(), atol=1e-12
    )
    assert torch.allclose((found.components @ vectors.flip(1)[:, :3]).abs(), torch.eye(3).double())
    for row in found.components:
        assert row[row.abs().argmax()] > 0
    assert torch.allclose(found.coordinates.mean(0), torch.zeros(3).double(), atol=1e-12)
    variances = found.coordinates.var(0)
    assert torch.allclose(variances, spectrum.flip(0)[:3])


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 1e6]))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_rotation_and_shift_change_signs_alone(seed: int, scale: float) -> None:
    points = cloud(12, 5, seed=seed) * torch.tensor([8.0, 4, 2, 1, 0.5])
    plain = pca_trajectory(points)
    moved = pca_trajectory(scale * (points @ rotation_matrix(5, seed) + 3.0))
    assert torch.allclose(moved.coordinates.abs(), scale * plain.coordinates.abs(), rtol=1e-7)
    assert torch.allclose(moved.explained_variance_ratio, plain.explained_variance_ratio)


def test_fit_on_other_points() -> None:
    tokens, path = cloud(3, 2, 7, 4, seed=1), cloud(3, 2, 4, seed=2)
    found = pca_trajectory(path, fit=tokens)
    own = pca_trajectory(tokens)
    assert torch.equal(found.components, own.components)
    assert torch.equal(found.explained_variance_ratio, own.explained_variance_ratio)
    assert torch.allclose(found.mean, tokens.reshape(-1, 4).mean(0))
    expected = (path - tokens.reshape(-1, 4).mean(0)) @ own.components.T
    assert torch.allclose(found.coordinates, expected)
    with_themselves = pca_trajectory(path, fit=path).coordinates
    assert torch.allclose(with_themselves, pca_trajectory(path).coordinates)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-200, 1e200])
def test_states_that_are_all_equal_have_no_variance(value: float) -> None:
    # The mean of three times 0.1 is not 0.1; rounding must not pass for a direction.
    states = torch.full((3, 1, 4), value, dtype=torch.float64)
    found = pca_trajectory(states)
    assert found.explained_variance_ratio.isnan().all()
    assert found.components.isnan().all()
    assert found.coordinates.tolist() == torch.zeros(3, 1, 2).tolist()
    assert found.mean.tolist() == [value] * 4
    elsewhere = pca_trajectory(cloud(3, 4), fit=states)
    assert elsewhere.coordinates.isnan().all()


def test_tiny_and_huge_states() -> None:
    points = cloud(6, 4)
    plain = pca_trajectory(points)
    for scale in (1e-200, 1e200):
        found = pca_trajectory(points * scale)
        assert torch.allclose(found.coordinates / scale, plain.coordinates)
        assert torch.allclose(found.explained_variance_ratio, plain.explained_variance_ratio)


def test_half_precision_and_gradients() -> None:
    points = cloud(6, 4).bfloat16().requires_grad_()
    found = pca_trajectory(points)
    assert torch.equal(found.coordinates, pca_trajectory(points.double()).coordinates)
    assert found.coordinates.dtype is torch.float64
    with torch.inference_mode():
        assert torch.equal(pca_trajectory(points).coordinates, found.coordinates)


def test_wrong_input() -> None:
    with pytest.raises(InputError, match=r"n_components.*\b2\b.*states"):
        pca_trajectory(cloud(2, 5), 3)
    with pytest.raises(InputError, match=r"n_components.*\b3\b.*fit has 9"):
        pca_trajectory(cloud(9, 3), 4, fit=cloud(9, 3))
    with pytest.raises(InputError, match="n_components"):
        pca_trajectory(cloud(4, 5), 0)
    with pytest.raises(InputError, match=r"fit.*d_model.*\b5\b.*\b4\b"):
        pca_trajectory(cloud(4, 5), fit=cloud(4, 4))
    with pytest.raises(InputError, match="at least one point"):
        pca_trajectory(cloud(0, 5))
    for bad in (math.nan, math.inf):
        broken = cloud(2, 2, 3)
        broken[1, 0, 2] = bad
        with pytest.raises(InputError, match=r"states.*\[1, 0, 2\]"):
            pca_trajectory(broken)
        with pytest.raises(InputError, match="fit"):
            pca_trajectory(cloud(3, 3), fit=broken)
