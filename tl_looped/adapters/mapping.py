"""What an adapter's sources say, carried out: checking, reading and writing tensors.

A :class:`Source` tells where a parameter is stored. Reading follows it, and :func:`stored_tensors`
follows it backwards, so that a format's tensor names are written down once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from tl_looped.adapters.base import Source
from tl_looped.errors import CheckpointError


def problems(
    sources: Mapping[str, Source],
    targets: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Collection[str],
) -> list[str]:
    """Every difference between the tensors that there are and those that a model needs.

    Args:
        sources: Of the parameters.
        targets: Shape of every parameter.
        shapes: Shape of every tensor that there is.
        optional: Tensors that may be there and are not needed.

    Returns:
        One line a difference, each once.
    """
    out: list[str] = []
    absent = sorted(set(targets) - set(sources))
    if absent:
        out.append(f"the adapter has no source for {absent}")
    used: set[str] = set()
    for target, shape in targets.items():
        source = sources.get(target)
        if source is None:
            continue  # among the absent
        used |= set(source.names)
        rows = source.rows or (shape[0],)
        for name, n in zip(source.names, rows, strict=True):
            found = shapes.get(name)
            want = (n, *shape[1:])
            if found is None:
                out.append(f"missing: {name} {list(want)}")
            elif (found[len(source.index) :] if source.index else found) != want:
                out.append(f"shape: {name} is {list(found)}, expected {list(want)}")
    out += [
        f"unexpected: {name} {list(shapes[name])}"
        for name in sorted(set(shapes) - used - set(optional))
    ]
    return list(dict.fromkeys(out))


def give_values(
    model: nn.Module,
    sources: Mapping[str, Source],
    read: Callable[[str], Tensor],
    device: torch.device | Mapping[str, torch.device],
    dtype: torch.dtype,
) -> None:
    """Replace a model's parameters by what is stored, each straight on its device.

    The largest come first: what is read from a mapped file counts as memory while it is copied, and
    then little else does.

    Args:
        model: On the meta device.
        sources: Of all its parameters, found in order by :func:`problems`.
        read: Gives a stored tensor by name.
        device: Of all parameters, or of each by name.
        dtype: Of all of them.

    Raises:
        CheckpointError: a weight that is not finite, as it is stored or in ``dtype``.
    """
    by_size = sorted(model.named_parameters(), key=lambda named: -named[1].numel())
    for name, parameter in by_size:
        place = device[name] if isinstance(device, Mapping) else device
        value = torch.empty(parameter.shape, device=place, dtype=dtype)
        source = sources[name]
        for stored_name, part in zip(source.names, value.split(_rows(source, value)), strict=True):
            stored = read(stored_name).detach()
            stored = stored[source.index] if source.index else stored
            part.copy_(stored.reshape(part.shape))
            _refuse_not_finite(part, stored, stored_name)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


def _refuse_not_finite(value: Tensor, stored: Tensor, name: str) -> None:
    """One pass over a weight that was just written, without a copy: its least and largest value.

    A NaN is both, if there is one.
    """
    if not value.numel() or all(bound.isfinite() for bound in value.aminmax()):
        return
    finite = stored.isfinite()
    if finite.all():
        largest = float(stored.abs().max())
        raise CheckpointError(
            f"{name} holds {largest:.4g}, which is too large for {value.dtype}: load it with "
            "dtype='bfloat16' or 'float32'"
        )
    n, first = int((~finite).sum()), (~finite).nonzero()[0].tolist()
    raise CheckpointError(
        f"{name} is not finite: NaN or infinity in {n} of its {finite.numel()} numbers, the first "
        f"at {first}. The checkpoint is damaged, or its training diverged; take an earlier one"
    )


def stored_tensors(
    sources: Mapping[str, Source], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint: the inverse of reading it.

    Args:
        sources: Of the parameters.
        parameters: By name; not changed. A tensor that is stored as it is shares its memory.
    """
    out: dict[str, Tensor] = {}
    indexed: dict[str, dict[tuple[int, ...], Tensor]] = {}
    for parameter_name, source in sources.items():
        value = parameters[parameter_name].detach()
        parts = value.split(_rows(source, value))
        for name, part in zip(source.names, parts, strict=True):
            if source.index:
                indexed.setdefault(name, {})[source.index] = part
            else:
                out[name] = value if len(parts) == 1 else part.clone()
    for name, by_index in indexed.items():
        leading = [1 + max(places) for places in zip(*by_index, strict=True)]
        first = next(iter(by_index.values()))
        out[name] = first.new_empty(*leading, *first.shape)
        for index, part in by_index.items():
            out[name][index] = part
    return out


def _rows(source: Source, value: Tensor) -> list[int]:
    return list(source.rows or (value.shape[0],))
