"""Checks that a decomposition is of the run that the cache is of.

Carrying writes past an edit of the stream would give wrong numbers, and so would weights that
changed since. So two things are checked, in every precision:

- *Provenance.* A run notes what hooks and interventions changed (:mod:`tl_looped.model.edits`).
  Edits of a write, or of what a write is computed from (queries, patterns, z, neurons), leave the
  sum exact. Edits of the stream, of a norm in it, or of a sublayer's output while its heads or
  neurons are wanted, are refused, even if the activation that would show them is not cached. An
  edit at one position counts for all. An edit behind the place that is read counts for nothing.
- *Numbers.* Where the cache holds what is needed, all writes, carried, sum to the stream where it
  is read, and the heads and neurons of a layer to its output, at every position that is read and
  up to rounding (:mod:`tl_looped.decomposition.closeness`). A cache that is made by hand has no
  provenance, so it must hold what is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from tl_looped._compat import Slice
from tl_looped.decomposition.carry import carry
from tl_looped.decomposition.closeness import check_close, rounding, unchecked
from tl_looped.decomposition.components import Component, ComponentRows
from tl_looped.decomposition.steps import NormPlace, Place, Rescale, Step, Target, Write
from tl_looped.decomposition.writes import Writes, WritesWanted
from tl_looped.errors import InvalidDecompositionError, MissingActivationError

N_PROBES = 2
"""Samples of a run's rounding error; each is a vector at every position."""


# -- provenance -----------------------------------------------------------------------------------


def refuse_edits(cache: Any, names: Iterator[str], what: str) -> None:
    """Raise if the run of a cache was edited at one of these names.

    Args:
        cache: The cache; one that is made by hand has no record, and passes.
        names: Where an edit makes ``what`` wrong.
        what: What is asked for.
    """
    if cache.edits is None:
        return
    found = [name for name in names if name in cache.edits.names]
    if found:
        by = ", ".join(cache.edits.interventions)
        by = f"a hook or one of the interventions {by}" if by else "a hook"
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise InvalidDecompositionError(
            f"{by} edited the run of this cache at {found[0]}{more}, so {what}. Decompose a layer "
            "before the edit, run without it, or pass raw=True for the writes as they were added. "
            "Edits of q, k, v, z, patterns, neurons or whole sublayer outputs do not matter."
        )


def where_edits_break(steps: Sequence[Step], selection: WritesWanted, posts: bool) -> Iterator[str]:
    """Names at which an edit keeps writes from adding up to the stream at the end of the steps.

    Args:
        steps: From the embedding to the place where the stream is read.
        selection: Heads and neurons must also add up to their layer's output.
        posts: Whether sublayers end in a norm.
    """
    for step in steps:
        if isinstance(step, Place):
            yield step.name
        elif isinstance(step, NormPlace):
            yield from _of_norm(step.path)
        elif isinstance(step, Rescale):
            yield from _of_norm(step.scale.removesuffix(".hook_scale"))
        elif isinstance(step, Write) and step.layer is not None:
            yield from where_parts_break(step, selection, posts)


def where_parts_break(write: Write, selection: WritesWanted, posts: bool) -> Iterator[str]:
    """The same for the heads or neurons of one layer; nothing if they are not wanted."""
    is_attn = write.kind == "attn_out"
    if (selection.attn if is_attn else selection.mlp) == "parts":
        block = f"blocks.{write.layer}"
        yield f"{block}.hook_{write.kind}"
        yield f"{block}.{'attn' if is_attn else 'mlp'}.output"
        yield f"{block}.weights"
        if posts:
            yield from _of_norm(f"{block}.{'ln1_post' if is_attn else 'ln2_post'}")


def where_norm_breaks(cache: Any, target: Target) -> Iterator[str]:
    """Names at which an edit keeps the norm at a target from being a division by its scale."""
    loop = cache.loop
    if target.layer == loop.n_layers:
        yield from _of_norm("ln_final")
        if loop.c == 0 and loop.R:  # the last loop norm may be the same computation
            yield from _of_norm(f"recurrence.{loop.R - 1}.ln_loop")
        return
    block = f"blocks.{target.layer}"
    yield from _of_norm(f"{block}.{'ln2' if target.mid else 'ln1'}")
    if target.mid:
        yield f"{block}.hook_mlp_in"
    else:
        yield f"{block}.hook_attn_in"
        yield from (f"{block}.hook_{which}_input" for which in "qkv")


def where_logits_break(loop: Any) -> Iterator[str]:
    """Names at which an edit keeps logits from being the unembedding of the normalised stream."""
    if loop.c == 0 and loop.R:  # where the final norm ends the loop, a state stands behind it
        yield f"recurrence.{loop.R - 1}.hook_state_out"
    yield "unembed.hook_in"
    yield "unembed.hook_out"


def _of_norm(path: str) -> Iterator[str]:
    yield f"{path}.hook_scale"
    yield f"{path}.hook_normalized"
    block, _, norm = path.rpartition(".")
    if norm in ("ln_mid", "ln_out"):
        yield f"{block}.weights"


# -- numbers --------------------------------------------------------------------------------------


def check_stream(cache: Any, steps: Sequence[Step], target: Target, positions: Slice) -> None:
    """Raise if all writes of a run, carried to a target, do not sum to the stream there.

    Rounding is not bounded but simulated: vectors of random signs as large as the rounding of each
    step are carried along, through the same norms and matrices.
    """
    end, known = end_of(cache, steps, target), cache.edits is not None
    if end not in cache.cache_dict and known:
        return
    writes = Writes(cache, WritesWanted(), positions)
    try:
        stream = writes.read(end)
        dtypes = writes.dtypes([end, *writes.names(steps)])
        probes = _Probes(dtypes)
        total = carry(steps, writes, probes.rows, probes)
    except MissingActivationError as missing:
        if known:
            return
        raise unchecked(missing) from missing
    if total is not None:
        expected = total[1:].norm(dim=-1).amax(0)
        check_close(total[0], stream, expected, end)


def end_of(cache: Any, steps: Sequence[Step], target: Target) -> str:
    """Name of the hook point at which the stream stands at the end of the steps.

    Without a coda the final norm reads what left the loop. Where that is not cached it is taken for
    the last layer's output, which it is unless the cell changes it; then the sum will not fit.
    """
    last = [step.name for step in steps if isinstance(step, Place)][-1:]
    return last[0] if last and last[0] in cache.cache_dict else target.hook(cache.loop)


class _Probes:
    """Rows to carry: the sum of all writes, and behind it samples of its rounding error."""

    def __init__(self, dtypes: set[torch.dtype]) -> None:
        total = Component("remainder")
        probes = [Component("rounding", index=i) for i in range(N_PROBES)]
        self.rows = ComponentRows(lambda component: component if component in probes else total)
        for row in (total, *probes):
            self.rows.of(row)
        self._dtypes = dtypes
        self._signs: Tensor | None = None

    def __call__(self, stack: Tensor) -> None:
        if self._signs is None or self._signs.shape != stack[1:].shape:  # a state of another
            random = torch.Generator().manual_seed(0)  # on the CPU: the same on every device
            bits = torch.randint(2, stack[1:].shape, generator=random)
            self._signs = (2 * bits - 1).to(stack.device, stack.dtype)
        # Each step has signs of its own: every value those of its neighbour at the step before.
        self._signs = self._signs.roll(1, -1)
        stack[1:] += rounding(stack[0], self._dtypes, stack.shape[-1]) * self._signs


def with_one_scale(cache: Any, target: Target) -> Any:
    """The cache with one scale a position for ``ln1``, where each head has a norm of its own.

    With ``use_attn_in`` or ``use_split_qkv_input`` it works on ``[batch, pos, head, d_model]``.
    """
    name = f"blocks.{target.layer}.ln1.hook_scale"
    scale = cache.cache_dict.get(name)
    if target.mid or scale is None or scale.ndim == 2 + int(cache.has_batch_dim):
        return cache
    one = scale.select(-2, 0)
    if not torch.equal(scale, one.unsqueeze(-2).expand_as(scale)):
        raise InvalidDecompositionError(
            f"the heads of layer {target.layer} read streams of different scales (hooks on their "
            f"inputs, see {name}), so there is no one norm to apply to a component"
        )
    simple = copy(cache)
    simple.cache_dict = {**cache.cache_dict, name: one}
    return simple
