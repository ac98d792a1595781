"""How one forward pass is run, read once at the door.

:func:`read_options` checks everything that can be checked without the prompt; :func:`begin_run`
fits it to the prompt's batch and positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_looped._compat import TransformerLensKeyValueCache
from tl_looped.checks import Seed, described, whole
from tl_looped.errors import ArgumentTypeError, InputError
from tl_looped.model.cells import Stream, refuse_zeros_for_the_prompt
from tl_looped.model.config import LoopedConfig
from tl_looped.model.context import LoopRun, RunContext
from tl_looped.model.exit_rules import ExitRule
from tl_looped.model.geometry import LayerLike, LoopGeometry
from tl_looped.model.kv_cache import KVRun, LoopedKeyValueCache
from tl_looped.model.program import Program
from tl_looped.transformer.prompt import check_rows

if TYPE_CHECKING:
    from tl_looped.transformer.looped_transformer import LoopedTransformer
    from tl_looped.transformer.pool import Pool


KeyValueCache: TypeAlias = LoopedKeyValueCache | TransformerLensKeyValueCache


@dataclass(frozen=True, eq=False)
class RunOptions:
    """What a forward pass is told besides its prompt, checked.

    Args:
        program: The steps, at the run's own number of recurrences.
        state_seed: Seed of a random initial state.
        initial_state: State of recurrence 0, or ``"zeros"``; None draws or derives it.
        prelude_output: What is injected, where the run starts after the prelude.
        past_kv_cache: Keys and values of earlier tokens.
        foreign_cache: The same in TransformerLens's own cache.
        exit_rule: When tokens leave the loop.
        start: Effective layer whose input is given; None starts from tokens.
        stop: Effective layer whose input is returned; None runs to the logits.
    """

    program: Program
    state_seed: Seed
    initial_state: Tensor | str | None = None
    prelude_output: Tensor | None = None
    past_kv_cache: LoopedKeyValueCache | None = None
    foreign_cache: TransformerLensKeyValueCache | None = None
    exit_rule: ExitRule | None = None
    start: int | None = None
    stop: int | None = None

    @property
    def loop(self) -> LoopGeometry:
        """Geometry at the run's number of recurrences."""
        return self.program.loop

    @property
    def n_recurrences(self) -> int:
        """Recurrences of the run."""
        return self.loop.R

    @property
    def has_cache(self) -> bool:
        """Whether the run goes on from keys and values, or begins a cache of them."""
        return self.past_kv_cache is not None or self.foreign_cache is not None

    @property
    def runs_prelude(self) -> bool:
        """Whether the run computes the prelude's output itself."""
        return self.start is None or self.start < self.loop.p

    @property
    def enters_loop(self) -> bool:
        """Whether the run passes the start of the loop."""
        return self.runs_prelude and (self.stop is None or self.stop >= self.loop.p)


def read_options(
    model: LoopedTransformer,
    *,
    n_recurrences: int | None = None,
    initial_state: Any = None,
    state_seed: Seed | None = None,
    prelude_output: Tensor | None = None,
    past_kv_cache: KeyValueCache | None = None,
    exit_rule: ExitRule | None = None,
    start_at_layer: LayerLike | None = None,
    stop_at_layer: LayerLike | None = None,
) -> RunOptions:
    """The arguments of :meth:`LoopedTransformer.forward`, which explains them.

    Raises:
        RecurrenceCountError, LayerIndexError: for numbers that the model does not have.
        InputError: for wrong types, and for arguments that the run would not read.
    """
    loop = model._loop_at(n_recurrences)
    foreign = past_kv_cache if isinstance(past_kv_cache, TransformerLensKeyValueCache) else None
    own = None if foreign is not None else check_cache(model, past_kv_cache)
    options = RunOptions(
        program=model.program_at(loop.R),
        state_seed=check_seed(model, state_seed),
        initial_state=check_state("initial_state", initial_state),
        prelude_output=prelude_output,
        past_kv_cache=own,
        foreign_cache=foreign,
        exit_rule=exit_rule,
        start=None if start_at_layer is None else loop.resolve_or_end(start_at_layer),
        stop=None if stop_at_layer is None else loop.resolve_or_end(stop_at_layer),
    )
    if isinstance(initial_state, str):
        refuse_zeros_for_the_prompt(model.cfg, f"initial_state={initial_state!r}")
    _check_exit_rule(model.cfg, loop, exit_rule)
    _check_part(options, state_seed)
    return options


def check_seed(model: Pool, state_seed: Seed | None) -> int:
    """Seed of a random initial state: the model's own if None."""
    seed = model.state_seed if state_seed is None else state_seed
    return whole(seed, "state_seed", least=None)


def check_state(name: str, state: Any) -> Any:
    """A state as a tensor, ``"zeros"`` or None; its shape is checked against the run's."""
    if isinstance(state, (list, np.ndarray)):
        try:
            state = torch.as_tensor(state)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{name} must be numbers in rows of one length: {error}") from error
    if state is None or isinstance(state, Tensor) or (isinstance(state, str) and state == "zeros"):
        return state
    raise InputError(f"{name} must be a tensor or 'zeros', got {state!r}")


def check_cache(model: Pool, cache: Any) -> LoopedKeyValueCache | None:
    """A cache of this model's keys and values as it is now, or None.

    Raises:
        InputError: if it is another one's, or none of this package.
    """
    if cache is None:
        return None
    if not isinstance(cache, LoopedKeyValueCache):
        raise ArgumentTypeError(
            f"past_kv_cache must be a LoopedKeyValueCache, got {described(cache)}: begin with "
            "past_kv_cache=LoopedKeyValueCache(), which runs extend"
        )
    cache.check_owner(model._watch, model.cfg)
    return cache


def only_cache(past_kv_cache: Any, past_key_values: Any) -> Any:
    """The cache of a run, under TransformerLens's name or transformers'.

    Raises:
        InputError: if there are two.
    """
    if past_key_values is None:
        return past_kv_cache
    if past_kv_cache is not None and past_kv_cache is not past_key_values:
        raise InputError("past_kv_cache and past_key_values are one argument: give one of them")
    return past_key_values


def _check_exit_rule(cfg: LoopedConfig, loop: LoopGeometry, rule: ExitRule | None) -> None:
    if rule is None:
        return
    if rule.needs_gate and not cfg.exit_gate:
        raise InputError(f"{rule} needs an exit gate, {cfg.model_name} has none")
    if loop.R == 0:
        raise InputError("exit_rule needs at least one recurrence")


def _check_part(options: RunOptions, state_seed: Seed | None) -> None:
    """Raise where a run of some of the layers would not read an argument."""
    start, stop = options.start, options.stop
    if stop is not None and (start or 0) > stop:
        raise InputError(f"start_at_layer={start} lies after stop_at_layer={stop}")
    if options.runs_prelude and options.prelude_output is not None:
        raise InputError(
            "prelude_output is for a start_at_layer after the prelude; this run computes its "
            "own. To change what is injected, hook the prelude's last hook_resid_post."
        )
    given_start = options.initial_state is not None or state_seed is not None
    if given_start and not options.enters_loop:
        raise InputError(
            "initial_state and state_seed have no effect: with start_at_layer="
            f"{start} and stop_at_layer={stop} the run does not enter the loop (at layer "
            f"{options.loop.p})"
        )
    if options.foreign_cache is not None and options.exit_rule is not None:
        raise InputError(
            "TransformerLensKeyValueCache has no place for tokens that leave the loop early: use "
            "past_kv_cache=LoopedKeyValueCache() with exit_rule"
        )
    if start is None and stop is None:
        return
    if options.exit_rule is not None:
        raise InputError("exit_rule is for whole runs: leave out start_at_layer and stop_at_layer")
    if options.has_cache and not (start in (None, 0) and stop is None):
        raise InputError(
            "past_kv_cache needs every layer's keys and values: leave out stop_at_layer, and "
            "start_at_layer unless it is 0"
        )


def begin_run(
    cfg: LoopedConfig, x: Stream, mask: Bool[Tensor, "batch pos"] | None, options: RunOptions
) -> LoopRun:
    """A run for this residual stream, with positions and states that fit it.

    Args:
        cfg: Configuration of the model.
        x: The embedding, or the stream of a run that starts later.
        mask: Mask of its tokens, checked.
        options: How it is run.

    Raises:
        InputError: for states of another shape, more tokens than the context holds, or a cache of
            other rows.
    """
    initial_state, prelude_output = options.initial_state, options.prelude_output
    if isinstance(initial_state, str):
        initial_state = torch.zeros_like(x)
    elif initial_state is not None and initial_state.ndim == 3 and initial_state.shape[0] == 1:
        initial_state = initial_state.expand(x.shape[0], -1, -1)
    for name, state in (("initial_state", initial_state), ("prelude_output", prelude_output)):
        if state is not None and state.shape != x.shape:
            raise InputError(
                f"{name} must have shape [batch, pos, d_model] = {tuple(x.shape)}, "
                f"got {tuple(state.shape)}"
            )
    kv = _kv_run(options, x, mask)
    mask = mask if kv is None else kv.mask
    length = x.shape[1] if mask is None else int(mask.sum(-1).max())
    if length > cfg.n_ctx:
        raise InputError(f"a sequence of {length} tokens is longer than the context of {cfg.n_ctx}")
    return LoopRun(
        RunContext.build(cfg, x.shape[1], mask, x.device, x.dtype, kv),
        options.program,
        initial_state,
        options.state_seed,
        None if prelude_output is None else prelude_output.to(x),
        enters_loop=options.enters_loop,
    )


def _kv_run(
    options: RunOptions,
    x: Float[Tensor, "batch pos d_model"],
    mask: Bool[Tensor, "batch pos"] | None,
) -> KVRun | None:
    """The pass of new tokens over a cache."""
    cache = options.past_kv_cache
    if cache is None:
        return None
    if options.n_recurrences == 0 and cache.n_recurrences > 0:
        raise InputError(
            "a run of no recurrence would leave its tokens without keys in the loop, where the "
            "cached ones have some: use a cache of its own"
        )
    batch, length = x.shape[:2]
    new = torch.ones(batch, length, dtype=torch.bool, device=x.device) if mask is None else mask
    if cache.mask is not None:
        if cache.mask.shape[0] != batch:
            raise InputError(
                f"past_kv_cache holds {cache.mask.shape[0]} rows, the input has {batch}"
            )
        new = torch.cat((cache.mask, new), 1)
    check_rows(new)
    return KVRun(cache, new, length)
