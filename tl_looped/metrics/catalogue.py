"""The metrics of a run as values: what each one reads, computes and is called.

The doors that take a whole cache and those that watch a run share these entries, and each entry
calls what the function on tensors calls, so that there is one implementation of every metric. What
several metrics need (column sums, row entropies, norms) is computed once for all of them.

- ``"layer"``: of one layer's activation.
- ``"successive"``: of a core layer's activation and the previous recurrence's.
- ``"turn"``: of a core layer's states at three recurrences in a row.
- ``"adjacent"``: of a layer's state and that of the layer before it.
- ``"fixed_point"``: of a core layer's activation and a reference, by default that of the last
  recurrence.

A *derived* metric is another one in other units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.metrics.attention_patterns import (
    SINK_THRESHOLD,
    MixingForm,
    PatternRows,
    all_of_pattern,
    mixing_in_form,
    rows_distance,
)
from tl_looped.metrics.entropy import EntropyForm, entropy_in_form, matrix_entropy
from tl_looped.metrics.states import Sized, distances, magnitudes, norms, token_cosine
from tl_looped.metrics.steps import angular_distance, step_geometry

Kind = Literal["layer", "successive", "turn", "adjacent", "fixed_point"]
Reads = Literal["pattern", "resid_post"]
Prepared = PatternRows | Sized


def prepare(reads: Reads, x: Tensor, mask: Tensor | None, skip_first: int = 0) -> Prepared:
    """Check an activation and compute what all its metrics share."""
    return PatternRows.of(x, mask) if reads == "pattern" else Sized.of(x, mask, skip_first)


@dataclass(frozen=True)
class Output:
    """A number that ends up in a variable: its label, for axes, and its unit."""

    label: str
    unit: str = "1"


@dataclass(frozen=True)
class MetricFamily:
    """Metrics that are computed together.

    Args:
        kind: See the module.
        reads: Activation that they are computed from.
        compute: Of the prepared activation, and of the earlier or reference ones before it for all
            but layer metrics; gives ``[prompt]``, or ``[prompt, head]`` for patterns, by name.
        outputs: Names of the variables.
        per_token: ``compute`` gives ``[prompt, token]``.
    """

    kind: Kind
    reads: Reads
    compute: Callable[..., dict[str, Tensor]]
    outputs: dict[str, Output]
    per_token: bool = False


@dataclass(frozen=True)
class Derived:
    """A metric in other units.

    Args:
        base: Name of the metric that is computed.
        convert: ``(values, n_tokens, d_model)`` -> values.
        output: Label and unit.
    """

    base: str
    convert: Callable[[Tensor, Tensor, int], Tensor]
    output: Output


def _named(prefix: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}_{form}": value for form, value in values.items()}


def _entropy(form: EntropyForm) -> Callable[[Sized], dict[str, Tensor]]:
    return lambda x: {f"entropy_{form}": matrix_entropy(x.x, form, x.counted)}


def _from_previous(previous: Any, x: Any) -> dict[str, Tensor]:
    return _named("successive", distances(previous, x))


def _to_reference(reference: Any, x: Any) -> dict[str, Tensor]:
    return _named("fixed_point", distances(x, reference, ("abs", "rel", "cosine")))


def _rows_apart(name: str) -> Callable[[PatternRows, PatternRows], dict[str, Tensor]]:
    return lambda a, b: {name: rows_distance(a, b)}


def _turn(oldest: Any, previous: Any, x: Any) -> dict[str, Tensor]:
    states = torch.stack([oldest.x, previous.x, x.x])
    steps = step_geometry(states, x.counted)
    return {
        "step_turning_cosine": steps.turning_cosine[-1],
        "step_acceleration": steps.acceleration[-1],
        "step_relative_acceleration": steps.relative_acceleration[-1],
    }


def _adjacent(before: Any, x: Any) -> dict[str, Tensor]:
    angle = angular_distance(torch.stack([before.x, x.x]), attention_mask=x.counted)[0]
    return {"angular_distance": angle}


def _of_tokens(reference: Any, x: Any) -> dict[str, Tensor]:
    """Similarities of each token's state with the fixed point, as ``limiting`` takes them."""
    cosine = token_cosine(x, reference)
    distance = 1.0 - (norms(x.x - reference.x) / reference.size).square() / 2
    found = {"token_cosine": cosine, "token_distance_similarity": distance}
    if x.real is None:
        return found
    # Counted from the first real token, on whichever side the padding is.
    first = (~x.real).long().argsort(dim=-1, stable=True)
    return {
        name: value.masked_fill(~x.real, math.nan).gather(-1, first)
        for name, value in found.items()
    }


METRIC_FAMILIES = (
    MetricFamily("layer", "pattern", all_of_pattern, {
        "colsum_concentration": Output("ColSum concentration (0 even, 1 one key)"),
        "sink_score": Output("attention to the first token, mean over queries"),
        "sink_score_above_uniform": Output("sink score minus that of uniform causal attention"),
        "sink_rate": Output(
            f"fraction of heads with a sink score of at least {SINK_THRESHOLD}"
        ),
        "mixing_raw": Output("mixing score, mean entropy of a row", "nats"),
        "mixing_per_row": Output("mixing score, entropy of row i over ln i"),
    }),
    MetricFamily("layer", "resid_post", _entropy("nats"), {
        "entropy_nats": Output("residual entropy", "nats"),
    }),
    MetricFamily("layer", "resid_post", _entropy("skean"), {
        "entropy_skean": Output("residual entropy, centred rows of norm 1", "nats"),
    }),
    MetricFamily("layer", "resid_post", lambda x: _named("residual", magnitudes(x)), {
        "residual_mean": Output("norm of the residual stream, mean over tokens"),
        "residual_max": Output("norm of the residual stream, largest of the tokens"),
        "residual_first": Output("norm of the residual stream at the first token"),
        "residual_rms": Output("norm of the residual stream over sqrt(d_model)"),
    }),
    MetricFamily("successive", "resid_post", _from_previous, {
        "successive_abs": Output("step from the previous recurrence"),
        "successive_rel": Output("step from the previous recurrence, relative to the norm"),
        "successive_cosine": Output("cosine with the previous recurrence"),
        "successive_direction": Output("distance of the unit vectors from the previous recurrence"),
    }),
    MetricFamily("turn", "resid_post", _turn, {
        "step_turning_cosine": Output("cosine of a step and the step before"),
        "step_acceleration": Output("difference of a step and the step before"),
        "step_relative_acceleration": Output("difference of two steps, relative to the norm"),
    }),
    MetricFamily("adjacent", "resid_post", _adjacent, {
        "angular_distance": Output("angle to the layer before", "half turns"),
    }),
    MetricFamily("successive", "pattern", _rows_apart("successive_attention"), {
        "successive_attention": Output("Frobenius distance to the previous recurrence's pattern"),
    }),
    MetricFamily("fixed_point", "resid_post", _to_reference, {
        "fixed_point_abs": Output("distance to the fixed point"),
        "fixed_point_rel": Output("distance to the fixed point, relative to its norm"),
        "fixed_point_cosine": Output("cosine with the fixed point"),
    }),
    MetricFamily("fixed_point", "pattern", _rows_apart("fixed_point_attention"), {
        "fixed_point_attention": Output("Frobenius distance to the fixed point's pattern"),
    }),
    MetricFamily("fixed_point", "resid_post", _of_tokens, {
        "token_cosine": Output("cosine of a token's state with its fixed point"),
        "token_distance_similarity": Output("1 - d^2 / 2, d the relative distance to it"),
    }, per_token=True),
)  # fmt: skip


def _mixing(form: MixingForm) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda raw, n, d_model: mixing_in_form(raw, form, n)


def _converted(form: EntropyForm) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda nats, n, d_model: entropy_in_form(nats, form, n, d_model)


DERIVED = {
    "mixing_per_token": Derived(
        "mixing_raw", _mixing("per_token"), Output("mixing score / T", "nats")
    ),
    "mixing_log_t": Derived("mixing_raw", _mixing("log_t"), Output("mixing score / ln T")),
    "entropy_bits": Derived("entropy_nats", _converted("bits"), Output("residual entropy", "bits")),
    "entropy_norm_max": Derived(
        "entropy_nats", _converted("norm_max"), Output("residual entropy over its largest value")
    ),
}

# Of the first core layer and the references of all: the collector's own.
LOWEST_COSINE = "fixed_point_lowest_cosine"

OUTPUTS: dict[str, Output] = {
    **{name: output for family in METRIC_FAMILIES for name, output in family.outputs.items()},
    **{name: derived.output for name, derived in DERIVED.items()},
    LOWEST_COSINE: Output("lowest cosine of the first layer's state to any layer's fixed point"),
}

PER_TOKEN = tuple(name for family in METRIC_FAMILIES if family.per_token for name in family.outputs)

# By which the paper tells stages of inference apart.
SIGNATURE = ("sink_rate", "mixing_per_token", "colsum_concentration", "entropy_bits")

GROUPS: dict[str, tuple[str, ...]] = {
    "signature": SIGNATURE,
    "magnitude": tuple(name for name in OUTPUTS if name.startswith("residual_")),
    "successive": tuple(name for name in OUTPUTS if name.startswith("successive_")),
    "fixed_point": tuple(name for name in OUTPUTS if name.startswith("fixed_point_")),
    "step": tuple(name for name in OUTPUTS if name.startswith("step_")),
    "token": PER_TOKEN,
    "all": tuple(name for name in OUTPUTS if name not in PER_TOKEN),
}

DEFAULT_METRICS = (
    "signature",
    "magnitude",
    "successive",
    "fixed_point",
    # In these forms what clusters are made from does not depend on length or width.
    "mixing_per_row",
    "entropy_norm_max",
)
"""What a run is measured by unless something else is asked for, by any door."""

_RENAMED = {"stage": "signature"}  # groups in experiments of earlier versions


def select(wanted: str | Iterable[str]) -> list[str]:
    """Names of metrics from names and groups, each once, in the order given.

    Args:
        wanted: Name, group (``"signature"``, ``"magnitude"``, ``"successive"``,
            ``"fixed_point"``, ``"step"``; ``"token"``, which has a number for each token; ``"all"``
            others), or several of them.

    Raises:
        InputError: for an unknown name, with the list of all.
    """
    names: list[str] = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        name = _RENAMED.get(name, name)
        if name not in GROUPS and name not in OUTPUTS:
            raise InputError(
                f"metrics: there is no {name!r}; groups are {', '.join(GROUPS)}; metrics are "
                f"{', '.join(OUTPUTS)}"
            )
        names += GROUPS.get(name, (name,))
    if not names:
        raise InputError("metrics: none was given")
    return list(dict.fromkeys(names))


def reads_of(names: Iterable[str]) -> set[Reads]:
    """What activations metrics are computed from; ``names`` as :func:`select` gives them."""
    computed = {DERIVED[name].base if name in DERIVED else name for name in names}
    found: set[Reads] = {f.reads for f in METRIC_FAMILIES if computed & f.outputs.keys()}
    return found | ({"resid_post"} if LOWEST_COSINE in computed else set())
