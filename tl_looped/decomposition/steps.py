r"""What happens to a write between the place where it is made and the place where it is read.

With the norms' scales as they were in the run, everything between two blocks and inside them is
linear in the residual stream, position by position:

- a plain residual block adds, and changes nothing that is there already;
- a norm *on* the stream (Huginn's ``ln_mid`` and ``ln_out``, a loop norm, the norm before the coda)
  multiplies every earlier write by gain / scale;
- the injection maps the state by A_s, and adds A_e times the prelude's output e once more;
- a state that does not come from the prelude replaces what was written before it: e goes on in the
  injection alone, and the state is a component of its own.

A stream is therefore described by a list of steps, the same for carrying writes forward and for
pulling a direction back. The scales come from the cache, the gains and matrices from the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tl_looped.model.config import InitialState, Injection, NormLayout
from tl_looped.model.geometry import LayerLike, LayerLocation, LoopGeometry


@dataclass(frozen=True)
class Write:
    """A component joins the stream: ``kind`` as in ``Component``; ``layer`` is effective."""

    kind: str
    layer: int | None = None


@dataclass(frozen=True)
class Rescale:
    """A norm on the stream: its cached scale's name and the path of its gain."""

    scale: str
    gain: str


@dataclass(frozen=True)
class EnterLoop:
    """The stream so far becomes e. The state starts from it, or anew."""

    anew: bool


@dataclass(frozen=True)
class Inject:
    """The stream becomes A_s stream + A_e e."""


@dataclass(frozen=True)
class Place:
    """Here the stream, as it is, passes a hook point of this name."""

    name: str


Step = Write | Rescale | EnterLoop | Inject | Place


@dataclass(frozen=True)
class Target:
    """A place in the stream.

    Args:
        layer: Effective layer, whose input is meant; ``n_layers`` is the final norm's input.
        mid: The input of the layer's MLP, ``hook_resid_mid``.
    """

    layer: int
    mid: bool = False

    @classmethod
    def of(cls, layer: LayerLike | None, mid: bool, loop: LoopGeometry) -> Target:
        """Target of TransformerLens's arguments ``layer`` and ``mlp_input``.

        None, -1 and ``n_layers`` all mean the final norm's input, as in TransformerLens.

        Raises:
            LayerIndexError: a layer out of range, or the MLP input of the final norm.
        """
        if layer is None or layer in (-1, loop.n_layers):
            # The final norm has no MLP; resolving n_layers raises with the valid range.
            return cls(loop.resolve(loop.n_layers) if mid else loop.n_layers)
        return cls(loop.resolve(layer), mid)

    def hook(self, loop: LoopGeometry) -> str:
        """Name of the hook that holds the stream here."""
        if self.layer == loop.n_layers:
            return f"blocks.{self.layer - 1}.hook_resid_post" if self.layer else "hook_embed"
        return f"blocks.{self.layer}.hook_resid_{'mid' if self.mid else 'pre'}"


def stream_steps(model: Any, loop: LoopGeometry, state_given: bool, to: Target) -> Iterator[Step]:
    """The steps from the embedding to ``to``.

    Args:
        model: A looped model, for its configuration.
        loop: Geometry of the run.
        state_given: Whether the run's initial state was given by the caller.
        to: Where to end.
    """
    cfg = model.cfg
    on_sums = cfg.norm_layout is NormLayout.RESIDUAL
    yield Write("embed")
    for i in range(loop.n_layers):
        yield from _boundary_steps(cfg, loop, i, state_given)
        yield Place(f"blocks.{i}.hook_resid_pre")
        if to == Target(i):
            return
        yield Write("attn_out", i)
        if on_sums:
            yield Place(f"blocks.{i}.hook_resid_mid_sum")
            yield _block_norm(loop, i, "ln_mid")
        yield Place(f"blocks.{i}.hook_resid_mid")
        if to == Target(i, mid=True):
            return
        yield Write("mlp_out", i)
        if on_sums:
            yield Place(f"blocks.{i}.hook_resid_post_sum")
            yield _block_norm(loop, i, "ln_out")
        yield Place(f"blocks.{i}.hook_resid_post")
    if loop.c == 0 and loop.R and not cfg.loop_norm:
        # No coda and no norm behind the loop: the final norm reads the last state.
        yield Place(f"recurrence.{loop.R - 1}.hook_state_out")


def _boundary_steps(cfg: Any, loop: LoopGeometry, i: int, given: bool) -> Iterator[Step]:
    anew = given or cfg.initial_state is InitialState.RANDOM
    for event, r in loop.boundary(i):
        if event == "enter_loop":
            yield EnterLoop(anew)
            # A state that does not come from the prelude is a component, edited or not.
            yield Write("initial_state") if anew else Place("hook_initial_state")
        elif event == "leave":
            if cfg.loop_norm:
                yield Rescale(f"recurrence.{r}.ln_loop.hook_scale", "final_norm")
            yield Place(f"recurrence.{r}.hook_state_out")
        elif event == "enter":
            yield Place(f"recurrence.{r}.hook_state_in")
            if cfg.injection is not Injection.NONE:
                skips = cfg.initial_state is InitialState.PRELUDE_SKIP_ADAPTER and not given
                if not (skips and r == 0):
                    yield Inject()
                yield Place(f"recurrence.{r}.hook_injected")
        elif event == "leave_loop" and cfg.pre_coda_norm:
            yield Rescale("ln_pre_coda.hook_scale", "final_norm")


def _block_norm(loop: LoopGeometry, i: int, name: str) -> Rescale:
    return Rescale(f"blocks.{i}.{name}.hook_scale", f"{weights_path(loop.locate(i))}.{name}")


def weights_path(place: LayerLocation) -> str:
    """Path of a layer's weights in the model."""
    return f"{place.stage}.{place.layer}"
