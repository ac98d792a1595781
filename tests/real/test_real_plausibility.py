"""What is plausible of a pretrained model, and what faults planted in it are found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tl_looped import LoopedTransformer, RotaryStyle
from tl_looped.verification.certificate import Outcome
from tl_looped.verification.exchanges import between_layers, made, within_layers
from tl_looped.verification.passages import Passage, measure, read_passages, rows_of
from tl_looped.verification.plausible_loss import loss_by_recurrences, loss_on_text
from tl_looped.verification.plausible_settings import loss_under_settings, with_settings
from tl_looped.verification.plausible_text import bos_as_trained, text_and_tokens
from tl_looped.verification.plausible_weights import loss_under_exchanges
from tl_looped.verification.texts import bundled_texts

N_TEXTS = 6


def known(model: LoopedTransformer) -> tuple[Passage, ...]:
    problems = [one.text for one in bundled_texts() if one.register == "word problem"]
    return read_passages(model, problems[:N_TEXTS])


def test_the_right_model_is_plausible(virtual: Callable[..., LoopedTransformer]) -> None:
    model = virtual()
    passages = read_passages(model, [one.text for one in bundled_texts()])
    measured = measure(model, rows_of(model, passages))
    assert loss_on_text(model, passages, measured).outcome is Outcome.PLAUSIBLE
    curve = loss_by_recurrences(model, passages, measured)
    assert curve.outcome is Outcome.NOT_APPLICABLE  # it was not trained as a loop
    assert curve.numbers["loss"][2] > curve.numbers["loss"][1]  # it drifts
    few = known(model)
    assert bos_as_trained(model, few).outcome is Outcome.PLAUSIBLE
    assert loss_under_settings(model, few).outcome is Outcome.PLAUSIBLE
    texts = [one.text for one in bundled_texts()]
    assert text_and_tokens(model, texts).outcome is Outcome.PLAUSIBLE


def test_no_exchange_helps_the_right_model(virtual: Callable[..., LoopedTransformer]) -> None:
    model = virtual()
    found = loss_under_exchanges(model, known(model))
    assert found.outcome is Outcome.PLAUSIBLE
    assert max(one["gain"] for one in found.numbers["tried"].values()) < 0


@pytest.mark.parametrize("name", ["q of core.2 and core.3", "gate and up of coda.11"])
def test_an_exchange_is_found_among_thousands(
    virtual: Callable[..., LoopedTransformer], name: str
) -> None:
    model = virtual()
    exchanges = [*between_layers(model), *within_layers(model)]
    with made(model, next(one for one in exchanges if one.name == name)):
        found = loss_under_exchanges(model, known(model))
    assert found.outcome is Outcome.SUSPICIOUS
    assert name in found.numbers["better"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"rotary_style": RotaryStyle.INTERLEAVED}, "rotary pairs half"),
    ],
)
def test_a_wrong_setting_is_found(
    virtual: Callable[..., LoopedTransformer], wrong: dict[str, Any], right: str
) -> None:
    model = with_settings(virtual(), wrong)
    model.set_tokenizer(virtual().tokenizer)
    found = loss_under_settings(model, known(model))
    assert found.outcome is Outcome.SUSPICIOUS
    assert right in found.numbers["better"]
