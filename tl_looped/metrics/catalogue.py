"""The metrics of a run as values: what each one reads, computes and is called.

The doors that take a whole cache and those that watch a run share these entries, and each entry
calls the function on tensors, so that there is one implementation of every metric.

- A ``"layer"`` metric is a function of one layer's activation.
- A ``"successive"`` metric compares a core layer's activation with the previous recurrence's.
- A ``"fixed_point"`` metric compares a core layer's activation with a reference, by default that of
  the last recurrence.

A *derived* metric is another one in other units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.metrics.attention import (
    attention_distance,
    colsum_concentration,
    mixing_in_form,
    mixing_score,
    sink_rate,
    sink_score,
)
from tl_looped.metrics.spectra import entropy_in_form, matrix_entropy
from tl_looped.metrics.states import residual_magnitude, state_distance

Kind = Literal["layer", "successive", "fixed_point"]
Reads = Literal["pattern", "resid_post"]


@dataclass(frozen=True)
class Metric:
    """One metric of a run.

    Args:
        name: Name of its variable.
        kind: See the module.
        reads: Activation that it is computed from.
        compute: ``(activation, mask)`` for a layer metric, ``(earlier or reference, activation,
            mask)`` otherwise -> ``[prompt]`` or ``[prompt, head]``.
        label: What it is, for axes.
        unit: Its unit, ``"1"`` if it has none.
        per_head: Whether ``compute`` gives one value a head.
    """

    name: str
    kind: Kind
    reads: Reads
    compute: Callable[..., Tensor]
    label: str
    unit: str = "1"
    per_head: bool = False


@dataclass(frozen=True)
class Derived:
    """A metric in other units.

    Args:
        name: Name of its variable.
        base: Name of the metric that is computed.
        convert: ``(values, n_tokens, d_model)`` -> values.
        label, unit: As in :class:`Metric`.
    """

    name: str
    base: str
    convert: Callable[[Tensor, Tensor, int], Tensor]
    label: str
    unit: str = "1"


def _to_reference(form: str, reference: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    return state_distance(x, reference, form, mask)  # type: ignore[arg-type]


def _from_previous(form: str, previous: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    return state_distance(previous, x, form, mask)  # type: ignore[arg-type]


def _mixing(form: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda raw, n, d_model: mixing_in_form(raw, form, n)  # type: ignore[arg-type]


def _entropy(form: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda nats, n, d_model: entropy_in_form(nats, form, n, d_model)  # type: ignore[arg-type]


_SUFFIXES = {
    "abs": ("", "1"),
    "rel": (", relative to its norm", "1"),
    "cosine": (", cosine", "1"),
}

_METRICS = (
    Metric(
        "colsum_concentration", "layer", "pattern",
        lambda x, mask: colsum_concentration(x, mask),
        "ColSum concentration (0 even, 1 one key)", per_head=True,
    ),
    Metric(
        "sink_score", "layer", "pattern", lambda x, mask: sink_score(x, mask=mask),
        "attention to the first token, mean over queries", per_head=True,
    ),
    Metric(
        "sink_score_above_uniform", "layer", "pattern",
        lambda x, mask: sink_score(x, mask=mask, above_uniform=True),
        "sink score minus that of uniform causal attention", per_head=True,
    ),
    Metric(
        "sink_rate", "layer", "pattern", lambda x, mask: sink_rate(x, mask=mask),
        "fraction of heads with a sink score of at least 0.3",
    ),
    Metric(
        "mixing_raw", "layer", "pattern", lambda x, mask: mixing_score(x, "raw", mask),
        "mixing score, mean entropy of a row", "nats", per_head=True,
    ),
    Metric(
        "mixing_per_row", "layer", "pattern", lambda x, mask: mixing_score(x, "per_row", mask),
        "mixing score, entropy of row i over ln i", per_head=True,
    ),
    Metric(
        "entropy_nats", "layer", "resid_post", lambda x, mask: matrix_entropy(x, "nats", mask),
        "residual entropy", "nats",
    ),
    Metric(
        "entropy_skean", "layer", "resid_post", lambda x, mask: matrix_entropy(x, "skean", mask),
        "residual entropy, centred rows of norm 1", "nats",
    ),
    *(
        Metric(
            f"residual_{statistic}", "layer", "resid_post",
            partial(lambda s, x, mask: residual_magnitude(x, s, mask), statistic), label,
        )
        for statistic, label in (
            ("mean", "norm of the residual stream, mean over tokens"),
            ("max", "norm of the residual stream, largest of the tokens"),
            ("first", "norm of the residual stream at the first token"),
            ("rms", "norm of the residual stream over sqrt(d_model)"),
        )
    ),
    *(
        Metric(
            f"successive_{form}", "successive", "resid_post", partial(_from_previous, form),
            f"step from the previous recurrence{suffix}", unit,
        )
        for form, (suffix, unit) in _SUFFIXES.items()
    ),
    Metric(
        "successive_attention", "successive", "pattern", attention_distance,
        "Frobenius distance to the previous recurrence's pattern", per_head=True,
    ),
    *(
        Metric(
            f"fixed_point_{form}", "fixed_point", "resid_post", partial(_to_reference, form),
            f"distance to the fixed point{suffix}", unit,
        )
        for form, (suffix, unit) in _SUFFIXES.items()
    ),
    Metric(
        "fixed_point_attention", "fixed_point", "pattern",
        lambda reference, x, mask: attention_distance(x, reference, mask),
        "Frobenius distance to the fixed point's pattern", per_head=True,
    ),
)  # fmt: skip

_DERIVED = (
    Derived("mixing_per_token", "mixing_raw", _mixing("per_token"), "mixing score / T", "nats"),
    Derived("mixing_log_t", "mixing_raw", _mixing("log_t"), "mixing score / ln T"),
    Derived("entropy_bits", "entropy_nats", _entropy("bits"), "residual entropy", "bits"),
    Derived(
        "entropy_norm_max", "entropy_nats", _entropy("norm_max"),
        "residual entropy over its largest value",
    ),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _METRICS}
DERIVED: dict[str, Derived] = {metric.name: metric for metric in _DERIVED}

# The paper's four, "stages of inference".
STAGE = ("sink_rate", "mixing_per_token", "colsum_concentration", "entropy_bits")
SUCCESSIVE = tuple(f"successive_{form}" for form in ("abs", "rel", "cosine", "attention"))
FIXED_POINT = tuple(f"fixed_point_{form}" for form in ("abs", "rel", "cosine", "attention"))
MAGNITUDE = tuple(f"residual_{statistic}" for statistic in ("mean", "max", "first", "rms"))
# Of the states of the first core layer and all references; no entry of METRICS.
LOWEST_COSINE = "fixed_point_lowest_cosine"

GROUPS: dict[str, tuple[str, ...]] = {
    "stage": STAGE,
    "successive": SUCCESSIVE,
    "fixed_point": (*FIXED_POINT, LOWEST_COSINE),
    "magnitude": MAGNITUDE,
}


def select(wanted: str | Iterable[str]) -> list[str]:
    """Names of metrics from names and groups, each once, in the order given.

    Args:
        wanted: A name, a group (``"stage"``, ``"successive"``, ``"fixed_point"``, ``"magnitude"``,
            ``"all"``) or several of them.

    Raises:
        InputError: for an unknown name, with the list of all.
    """
    every = [*METRICS, *DERIVED, LOWEST_COSINE]
    names: list[str] = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name == "all":
            names += every
        elif name in GROUPS:
            names += GROUPS[name]
        elif name in every:
            names.append(name)
        else:
            raise InputError(
                f"metrics: there is no {name!r}; groups are {', '.join(GROUPS)}, all; metrics are "
                f"{', '.join(every)}"
            )
    if not names:
        raise InputError("metrics: none was given")
    return list(dict.fromkeys(names))
