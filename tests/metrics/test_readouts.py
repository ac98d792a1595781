"""Divergences, ranks and lens trajectories: closed forms and the model's own logits."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import SAME
from conftest import Golden, exact_config, load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from tl_looped import LoopedTransformer
from tl_looped.errors import InputError, MissingActivationError
from tl_looped.metrics.readouts import (
    exit_distribution,
    kl_between_recurrences,
    kl_divergence,
    lens_readout,
    lens_trajectory,
)

pytestmark = pytest.mark.usefixtures("without_gradients")
LN2 = math.log(2)


def test_divergences_of_known_distributions() -> None:
    half, certain = torch.tensor([0.0, 0.0, -math.inf]), torch.tensor([0.0, -math.inf, -math.inf])
    assert kl_divergence(certain, half).item() == pytest.approx(LN2)
    assert kl_divergence(half, certain).item() == math.inf
    assert kl_divergence(half, half).item() == 0
    quarter = torch.tensor([1.0, 3.0, 0.0]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(half, quarter).item() == pytest.approx(expected)
    assert kl_divergence(torch.tensor([math.nan, 0.0, 0.0]), half).isnan()
    assert kl_divergence(torch.tensor([math.inf, 0.0, 0.0]), half).isnan()


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0.1, 20))
def test_divergences_are_those_of_torch_and_blind_to_a_shift(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(3, 7, generator=generator).double() * size for _ in range(2))
    found = kl_divergence(p, q)
    torch.testing.assert_close(found, torch_kl(Categorical(logits=p), Categorical(logits=q)))
    torch.testing.assert_close(kl_divergence(p + 5, q - 3), found)
    assert (found >= 0).all()


def test_divergences_along_the_recurrences_have_a_direction() -> None:
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]], dtype=torch.float64).log()
    found = kl_between_recurrences(p)

    def kl(a: float, b: float) -> float:
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    assert found.to_previous.tolist() == pytest.approx(
        [math.nan, kl(0.25, 0.5), kl(0.1, 0.25)], nan_ok=True
    )
    assert found.to_last.tolist() == pytest.approx([kl(0.5, 0.1), kl(0.25, 0.1), 0], abs=1e-12)
    assert kl_between_recurrences(p[:1]).to_previous.isnan().all()
    with pytest.raises(InputError, match="logits"):
        kl_between_recurrences(p[:0])


def test_ranks_count_strictly_larger_logits_so_that_ties_share_the_best() -> None:
    logits = torch.tensor([3.0, 5.0, 3.0, 1.0])
    rows = logits.expand(4, 4)
    found = lens_readout(rows, rows, torch.arange(4))
    assert found.rank.tolist() == [1, 0, 1, 3]
    torch.testing.assert_close(found.probability, logits.double().softmax(-1))
    assert found.kl_to_final.tolist() == [0, 0, 0, 0]
    bad = torch.tensor([3.0, math.nan, 3.0, 1.0])
    undefined = lens_readout(bad, logits, torch.tensor(0))
    assert undefined.rank.isnan()
    assert undefined.probability.isnan()
    with pytest.raises(InputError, match=r"token.*\b0\b.*\b3\b"):
        lens_readout(logits, logits, torch.tensor(4))


def test_the_exit_distribution_is_a_distribution() -> None:
    found = exit_distribution(torch.zeros(1, 3))
    assert found.tolist() == [[0.5, 0.25, 0.25]]


def test_the_last_coda_lens_is_the_model_and_the_lenses_are_the_models(golden: Golden) -> None:
    model = golden.load(dtype=torch.float64)
    logits, cache = model.run_with_cache(
        golden.tokens, names_filter=lambda name: name.endswith("hook_resid_post"), **golden.run
    )
    found = lens_trajectory(cache)
    assert torch.equal(found.token, logits[:, -1].argmax(-1))
    assert found.coda_lens.rank.shape == (model.loop.R, model.loop.k, 2)
    assert found.coda_lens.kl_to_final[-1, -1].abs().max() < 1e-12
    assert not found.coda_lens.rank[-1, -1].any()
    probability = logits[:, -1].double().softmax(-1).amax(-1)
    torch.testing.assert_close(found.coda_lens.probability[-1, -1], probability, atol=SAME, rtol=0)
    expected = model.logit_lens(cache["resid_post", (1, 0)])[:, -1].double().softmax(-1)
    torch.testing.assert_close(
        found.logit_lens.probability[1, 0], expected.gather(-1, found.token[:, None])[:, 0]
    )
    assert found.coda_lens.kl_to_final[0].min() > 0


def test_position_token_and_a_cache_without_batch() -> None:
    model = LoopedTransformer.from_config(exact_config())
    tokens = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    logits, cache = model.run_with_cache(tokens)
    found = lens_trajectory(cache, token=torch.tensor([7]), position=3)
    assert found.position.tolist() == [3]
    row = logits[0, 3]
    assert found.coda_lens.rank[-1, -1].item() == (row > row[7]).sum().item()
    alone = lens_trajectory(cache.remove_batch_dim(), token=torch.tensor([7]), position=3)
    assert torch.equal(alone.coda_lens.rank, found.coda_lens.rank)
    for position in (9, -10):
        with pytest.raises(InputError, match=r"\b9\b"):
            lens_trajectory(cache, position=position)
    with pytest.raises(InputError, match="token"):
        lens_trajectory(cache, token=torch.tensor([1, 2]))


@pytest.mark.parametrize("left", [0, 3])
def test_padding_changes_nothing_and_prompts_go_in_parts(
    left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LoopedTransformer.from_config(exact_config())
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :left] = 0
    mask[0, left + 6 :] = 0
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    found = lens_trajectory(cache, attention_mask=mask)
    assert found.position.tolist() == [left + 5, 8]
    _, short = model.run_with_cache(tokens[:1, left : left + 6])
    alone = lens_trajectory(short)
    for lens in ("logit_lens", "coda_lens"):
        padded, unpadded = getattr(found, lens), getattr(alone, lens)
        torch.testing.assert_close(
            padded.kl_to_final[..., :1], unpadded.kl_to_final, atol=SAME, rtol=SAME
        )
        torch.testing.assert_close(
            padded.probability[..., :1], unpadded.probability, atol=SAME, rtol=SAME
        )
    monkeypatch.setattr("tl_looped.metrics.readouts._LOGITS_AT_ONCE", 1)
    parts = lens_trajectory(cache, attention_mask=mask)
    torch.testing.assert_close(parts.coda_lens.kl_to_final, found.coda_lens.kl_to_final)


def test_a_cache_without_a_state_names_it() -> None:
    model = load_golden("ouro").load()
    _, cache = model.run_with_cache(
        load_golden("ouro").tokens, names_filter=lambda name: name.endswith("11.hook_resid_post")
    )
    with pytest.raises(MissingActivationError, match=r"hook_resid_post"):
        lens_trajectory(cache)
