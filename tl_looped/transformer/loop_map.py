"""The loop as a map from state to state, with everything else of a prompt held fixed.

``S(x)`` is one recurrence: the injection of the prelude's output, the core's layers, the loop norm
where the family has one (Ouro). It maps a ``hook_state_out`` to the next one. No hook of the model
fires inside, so it can be iterated, differentiated and started anywhere. The one intervention that
it knows is that of an ablated layer, ``without_mlp``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_looped.checks import Seed, checked, whole
from tl_looped.errors import InputError
from tl_looped.model.block import Block
from tl_looped.model.cells import Stream
from tl_looped.model.config import LoopedConfig
from tl_looped.model.context import LoopRun, RunContext
from tl_looped.model.devices import beside
from tl_looped.model.geometry import LoopGeometry
from tl_looped.model.initial_state import draw_initial_state
from tl_looped.model.limits import checked_recurrences
from tl_looped.model.program import Program
from tl_looped.model.running import Parts, execute
from tl_looped.transformer.intervening import refuse_interventions
from tl_looped.transformer.prompt import read_prompt
from tl_looped.transformer.run_options import RunOptions, begin_run, check_seed, check_state
from tl_looped.transformer.spreading import refuse_offloaded

if TYPE_CHECKING:
    from tl_looped.transformer.looped_transformer import LoopedTransformer


@checked
@dataclass(frozen=True)
class LoopMap:
    """One recurrence of a prompt as a function, ``loop_map(state) -> next state``.

    The weights are the model's own: training moves the map too.

    Args:
        initial_state: Where a run of the model starts.
        prelude_output: ``e``, what is injected; without injection only the initial state has it.
        mask: False at padding, ``[batch, pos]``; None if there is none.
        context: Positions, rotation and mask.
        skips_first_adapter: The model's own first recurrence does not pass through the adapter
            (``InitialState.PRELUDE_SKIP_ADAPTER``, no state given). Calling the map always does;
            :meth:`run` without a state starts as the model does.
        parts: What the map runs on: the model's weights, without its hooks.
        cfg: The model's configuration.
    """

    initial_state: Stream
    prelude_output: Stream
    mask: Bool[Tensor, "batch pos"] | None
    context: RunContext
    skips_first_adapter: bool
    parts: Parts
    cfg: LoopedConfig

    def __call__(self, state: Stream) -> Stream:
        """The state after one more recurrence."""
        return self._recurrence(self._checked(state), first=False)

    def run(self, n_recurrences: int, state: Tensor | None = None) -> Tensor:
        """States after each of ``n_recurrences``, ``[recurrence, batch, pos, d_model]``.

        Args:
            n_recurrences: At least 1.
            state: Where to start; ``initial_state``, as the model does, if None.

        Raises:
            InputError, RecurrenceCountError: for another number, or one beyond
                :data:`tl_looped.model.limits.most_layers`.
        """
        whole(n_recurrences, "n_recurrences", 1)
        checked_recurrences(n_recurrences)
        if state is None and self.skips_first_adapter:
            states = [self._recurrence(self.initial_state, first=True)]
        else:
            states = [self(self.initial_state if state is None else state)]
        for _ in range(n_recurrences - 1):
            states.append(self(states[-1]))
        return torch.stack(states)

    def random_state(self, seed: Seed, scale: float | None = None) -> Stream:
        """A random state, drawn as the model draws its own for this ``state_seed``.

        Args:
            seed: From 0 to 2**128 - 1.
            scale: Factor on a standard normal that is cut at three; None is the model's own, or,
                where it starts from no random state, the root mean square of its initial state.
        """
        cfg, start = self.cfg, self.initial_state
        if scale is None:
            scale = cfg.initial_state_scale
        if scale == 0.0:
            wide = start.detach().float()
            real = wide if self.mask is None else wide[self.mask]
            scale = float(real.square().mean().sqrt())
        drawn = draw_initial_state(seed, self.context.positions, cfg.d_model, scale, start.dtype)
        return drawn.to(start).expand(start.shape)

    def _checked(self, state: Tensor) -> Stream:
        if state.shape != self.initial_state.shape:
            raise InputError(
                f"state must have shape [batch, pos, d_model] = {tuple(self.initial_state.shape)}, "
                f"got {tuple(state.shape)}"
            )
        return state.to(self.initial_state)

    def _recurrence(self, state: Stream, first: bool) -> Stream:
        loop = LoopGeometry(self.cfg.n_prelude, self.cfg.n_core, self.cfg.n_coda, 1)
        program = Program.of(loop)
        run = LoopRun(self.context, program, None, 0, self.prelude_output)
        ops = [op._replace(first=first) for op in program.recurrence(0)]
        return beside(execute(ops, state, run, self.parts), self.initial_state)


def loop_map_of(
    model: LoopedTransformer,
    input: Any,
    attention_mask: Tensor | None,
    prepend_bos: bool | None,
    padding_side: str | None,
    initial_state: Tensor | str | None,
    state_seed: Seed | None,
    without_mlp: Iterable[str],
) -> LoopMap:
    """The loop of a prompt as a map from state to state."""
    model._check_borrowed()
    refuse_offloaded(model)
    refuse_interventions(model, "loop_map")
    parts = _parts_without_mlp(model, without_mlp)
    inference = torch.is_inference_mode_enabled()
    # Tensors made in inference mode could not be differentiated through later.
    gradients = torch.is_grad_enabled() and not inference
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        prompt = read_prompt(model, input, attention_mask, prepend_bos, padding_side)
        x, mask = model.embed(prompt.tokens), prompt.mask
        state = check_state("initial_state", initial_state)
        options = RunOptions(model.program, check_seed(model, state_seed), state)
        run = begin_run(model.cfg, x, mask, options)
        start = model._home(execute(model.program.up_to_loop, x, run, parts))
        assert run.prelude_output is not None
    return LoopMap(
        initial_state=start,
        prelude_output=model._home(run.prelude_output),
        mask=None if mask is None or bool(mask.all()) else mask,
        context=run.context,
        skips_first_adapter=model.cell.reads_e(False, False)
        and not model.cell.reads_e(True, run.initial_state is not None),
        parts=parts,
        cfg=model.cfg,
    )


def _parts_without_mlp(model: LoopedTransformer, layers: Iterable[str]) -> Parts:
    """The silent parts; the named layers write no MLP output.

    Only those that are named are blocks of their own: the others serve every map.
    """
    if isinstance(layers, str):
        raise InputError(f"without_mlp must be a list of layers, got {layers!r}: [{layers!r}]")
    parts = model.silent_parts
    blocks = list(parts.blocks)
    places = {f"{b.location.stage}.{b.location.layer}": i for i, b in enumerate(blocks)}
    for name in layers:
        if name not in places:
            raise InputError(
                f"without_mlp: there is no layer {name!r}; there are {', '.join(places)}"
            )
        shared = blocks[places[name]]
        own = Block(model.cfg, shared.weights, shared.location)
        own.hook_mlp_out.add_hook(lambda x, hook: torch.zeros_like(x))
        blocks[places[name]] = own
    return replace(parts, blocks=blocks)
