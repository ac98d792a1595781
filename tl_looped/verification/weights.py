"""Checks of the stored weights: all are there and used once, and all are finite numbers.

They look at the files before a model is made of them, so that a checkpoint that cannot be loaded
gets a finding that says why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_looped.adapters.mapping import problems
from tl_looped.adapters.stored import wrong_dtypes
from tl_looped.checkpoints import Checkpoint
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.cache_size import readable
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.inventory import DTYPES, dtypes_stored, uses_that_overlap
from tl_looped.verification.markdown import grouped
from tl_looped.verification.rounding import copy_bytes, copy_fits, in_dtype
from tl_looped.verification.subject import Subject
from tl_looped.words import count

_LISTED = 12
_NAMES = (
    "a weight that is missing is random or zero, and one that takes another's place is noise: the "
    "model writes nonsense, or is a little worse than its authors say"
)
_FINITE = "one NaN spreads to every logit behind it; infinities give NaN at the next norm"


def names(checkpoint: Checkpoint) -> Finding:
    """Every parameter has its tensors, of its shape and of floats; every tensor is used once."""
    cfg = checkpoint.config()
    cfg.device = "meta"
    model = LoopedTransformer(cfg)
    sources, duplicates = checkpoint.adapter.sources(cfg), checkpoint.adapter.duplicates(cfg)
    targets = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes = {name: header.shape for name, header in checkpoint.headers.items()}
    used = [name for source in sources.values() for name in source.names] + [*duplicates]
    found = problems(sources, targets, shapes, checkpoint.adapter.ignored(cfg) | set(duplicates))
    found += wrong_dtypes(checkpoint.headers, used) + uses_that_overlap(checkpoint, cfg)
    if not found:
        found += _differing_copies(checkpoint, duplicates)
    kinds = dtypes_stored(checkpoint)
    used_once = {name for source in sources.values() for name in source.names} & set(shapes)
    copies = [name for name in shapes if name in duplicates and name not in used_once]
    ignored = [name for name in shapes if name not in used_once and name not in duplicates]
    numbers: dict[str, Any] = {"tensors": len(shapes), "parameters": len(targets), "dtypes": kinds}
    if found:
        listed = "; ".join(found[:_LISTED])
        more = f"; and {len(found) - _LISTED} more" * (len(found) > _LISTED)
        return Finding("names", Outcome.WRONG, listed + more, _NAMES, numbers | {"problems": found})
    told = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    some = "" if len(used_once) == len(shapes) else f"{len(used_once)} of "
    sentences = [
        f"{some}{count(len(shapes), 'tensor')} ({told}) make {count(len(targets), 'parameter')}, "
        "each used once",
        *_left_aside(ignored, "ignored"),
        *_left_aside(copies, "an equal copy of another", "equal copies of others"),
    ]
    return Finding(
        "names",
        Outcome.EXACT,
        "; ".join(sentences),
        _NAMES,
        numbers | {"ignored": ignored, "copies": copies},
    )


def _left_aside(names: list[str], one: str, many: str | None = None) -> list[str]:
    """What becomes of tensors that make no parameter; nothing if there are none."""
    if not names:
        return []
    shown = grouped(names)
    more = f" and {len(shown) - _LISTED} more" * (len(shown) > _LISTED)
    become = f"1 is {one}" if len(names) == 1 else f"{len(names):,} are {many or one}"
    return [f"{become}: {', '.join(shown[:_LISTED])}{more}"]


def _differing_copies(checkpoint: Checkpoint, duplicates: dict[str, str]) -> list[str]:
    with checkpoint.reader() as read:
        return [
            f"differs: {extra} is stored beside {original}, to which it is tied, and differs"
            for extra, original in duplicates.items()
            if extra in checkpoint.headers and not torch.equal(read(extra), read(original))
        ]


def finite_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> Finding | None:
    """The finding if a stored weight is not finite, as it is stored, in fp32 or in ``dtype``."""
    bad: dict[str, Any] = {}
    with checkpoint.reader() as read:
        for name, header in checkpoint.headers.items():
            if header.dtype not in DTYPES:
                continue  # not a weight: ignored by its family, or a finding of "names"
            stored: Tensor = read(name)
            for one in dict.fromkeys((stored.dtype, torch.float32, dtype)):
                where = _not_finite(stored, one)
                if where is not None:
                    bad[name] = where | {"dtype": str(one).removeprefix("torch.")}
                    break
    if not bad:
        return None
    told = "; ".join(
        f"{name} in {x['dtype']}: {x['numbers']} of {x['of']} numbers, the first at {x['first']}"
        for name, x in list(bad.items())[:_LISTED]
    )
    return Finding("finite", Outcome.WRONG, f"NaN or infinity in {told}", _FINITE, {"weights": bad})


def _not_finite(stored: Tensor, dtype: torch.dtype) -> dict[str, Any] | None:
    """Where a tensor is not finite in a dtype; None if it is, found by its least and largest."""
    if not stored.numel():
        return None
    ends = torch.stack(stored.aminmax()).to(dtype)  # a NaN is both
    if ends.isfinite().all():
        return None
    finite = stored.to(dtype).isfinite()
    first = (~finite).nonzero()[0].tolist()
    return {"numbers": int((~finite).sum()), "of": finite.numel(), "first": first}


@torch.no_grad()
def finite(subject: Subject) -> Finding:
    """Every residual and logit of a run in fp32, in the files' dtypes and in the run's own.

    The stored weights are finite already, see :func:`finite_weights`.
    """
    model, numbers = subject.model, {}
    stored = (DTYPES[kind] for kind in dtypes_stored(subject.checkpoint) if kind in DTYPES)
    told, left = [], []
    for dtype in dict.fromkeys((model.cfg.dtype, torch.float32, *stored)):
        name = str(dtype).removeprefix("torch.")
        if dtype is not model.cfg.dtype and not copy_fits(model, dtype):
            left.append(f"{name} was left out: a copy takes {readable(copy_bytes(model, dtype))}")
            continue
        where, largest = _first_not_finite(in_dtype(model, dtype), subject.tokens)
        if where is not None:
            found = f"the weights are finite, but in {name} {where} of a run is not"
            return Finding("finite", Outcome.WRONG, found, _FINITE, {name: where})
        numbers[name] = largest
        told.append(f"in {name} (largest {largest:.3g})")
    sentence = f"all weights, residuals and logits are finite {', '.join(told)}"
    return Finding("finite", Outcome.EXACT, "; ".join([sentence, *left]), _FINITE, numbers)


def _first_not_finite(model: LoopedTransformer, tokens: Tensor) -> tuple[str | None, float]:
    """Name of the first activation that is not finite, and the largest residual."""
    logits, cache = model.run_with_cache(tokens, names_filter=["residual", "loop"])
    largest = 0.0
    for name, value in [*cache.items(), ("logits", logits)]:
        if not value.isfinite().all():
            return name, float("inf")
        largest = max(largest, float(value.abs().max())) if name != "logits" else largest
    return None, largest
