"""TransformerLens's weight surface: ``W_E``, ``W_Q``, ``tl_parameters`` and their kin.

Stacked weights (``W_Q`` …) are over the effective layers, so that ``model.W_Q[i]`` belongs to
``blocks[i]`` as everywhere in TransformerLens. That copies each core weight once per recurrence,
and is refused above ``max_stack_bytes``; ``unique_weights("W_Q")`` stacks each layer once, in the
order prelude, core, coda, and ``unique_layer(i)`` tells which row an effective layer uses.
``tl_parameters`` names effective layers, and its tensors are views of the shared weights (but for
repeated keys and values and folded gains).
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.checks import one_of
from tl_looped.errors import InputError
from tl_looped.model.attention import Attention
from tl_looped.model.block import FOLDED, Block
from tl_looped.model.config import LoopedConfig
from tl_looped.model.geometry import LayerLike, LayerLocation, LoopGeometry
from tl_looped.model.mlp import MLP
from tl_looped.model.shown import show
from tl_looped.model.weight_sources import (
    Stack,
    StoredWeights,
)
from tl_looped.transformer.weight_map import of_a_block

if TYPE_CHECKING:
    from tl_looped.transformer.named_weights import NamedWeights
    from tl_looped.transformer.pool import Pool


_STACKED = (
    *("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out"),
    *("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out"),
)


def weight_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module of weights that hooked modules borrow, with its owner and its name there."""
    for name in ("final_norm", "prelude", "core", "coda"):
        top = model.get_submodule(name)
        yield model, name, top
        for owner in top.modules():
            yield from ((owner, name, child) for name, child in owner.named_children())


def make_weights(module: nn.Module) -> None:
    """Compute pruned and normalised weights from their parameters, as a call of the module would.

    ``torch.nn.utils.prune``, ``weight_norm`` and ``spectral_norm`` do so in a hook before it.
    """
    for hook in list(module._forward_pre_hooks.values()):
        if hasattr(hook, "apply_mask") or hasattr(hook, "compute_weight"):
            hook(module, ())


def note_places(model: Pool) -> None:
    """Tell every module of weights its name, and which layers of its stage use it."""
    cfg = model.cfg
    sizes = {"prelude": cfg.n_prelude, "core": cfg.n_core, "coda": cfg.n_coda}
    for path, module in model.named_modules():
        if isinstance(module, StoredWeights):
            module.path = path
            stage, _, rest = path.partition(".")
            if stage in sizes:
                source = (stage, int(rest.split(".")[0]))
                places = [LayerLocation(stage, None, i) for i in range(sizes[stage])]
                module.layers = tuple(p.layer for p in places if cfg.weights_of(p) == source)


def unique_layer(cfg: LoopedConfig, loop: LoopGeometry, layer: LayerLike) -> int:
    """Row of a stack of unique weights that an effective layer uses."""
    stage, number = cfg.weights_of(loop.locate(loop.resolve(layer)))
    start = {"prelude": 0, "core": loop.p, "coda": loop.p + cfg.n_core_weights}
    return start[stage] + number


def unique_blocks(model: NamedWeights) -> list[Block]:
    """One block of each layer with weights of its own: prelude, core, coda."""
    loop = model.loop.with_recurrences(max(1, model.loop.R))
    first = {model.cfg.weights_of(loop.locate(loop.p + i)): i for i in reversed(range(loop.k))}
    core = [loop.p + first["core", number] for number in range(model.cfg.n_core_weights)]
    coda = range(loop.n_layers - loop.c, loop.n_layers)
    places = [loop.locate(i) for i in (*range(loop.p), *core, *coda)]
    return [model._pooled_block(place) for place in places]


def unique_stack(model: NamedWeights, name: str) -> Float[Tensor, " unique_layer *shape"]:
    """A weight of each layer once."""
    return _stack(model, name, unique_blocks(model))


def stack(model: NamedWeights, name: str) -> Float[Tensor, " n_layers *shape"]:
    """A weight of every effective layer, if ``model.max_stack_bytes`` holds it."""
    blocks = list(model.blocks)
    if not blocks:
        return unique_stack(model, name)[:0]
    one = getattr(_owner(blocks[0], name), name)
    size = len(blocks) * one.numel() * one.element_size()
    if size > model.max_stack_bytes:
        raise InputError(
            f"{name} over {len(blocks)} effective layers would take {size / 2**30:.2f} GiB, "
            f"more than model.max_stack_bytes ({model.max_stack_bytes / 2**30:.2f} GiB). "
            f"unique_weights({name!r}) stacks the {len(model.unique_blocks())} layers that have "
            f"weights of their own, unique_layer(i) gives a layer's row, and "
            "blocks[i] has the weights of one layer without a copy."
        )
    return _stack(model, name, blocks)


def fold_gains(model: NamedWeights, folded: bool) -> None:
    """Show the norms' gains as part of the weights after them, or as their own."""
    for cfg in (model.cfg, model.cell.cfg):  # the model's own, even if a view is folded
        cfg.note(normalization_type=FOLDED if folded else "RMS")
    model.ln_final.folded = model.unembed.folded = folded
    for block in model._block_pool.values():
        block.fold_norms(folded)


def tl_parameters(model: NamedWeights) -> dict[str, Tensor]:
    """Weights of every effective layer under TransformerLens's names."""
    out: dict[str, Tensor] = {"embed.W_E": model.W_E}
    by_unique: dict[int, dict[str, Tensor]] = {}
    for i in range(model.loop.n_layers):
        unique = unique_layer(model.cfg, model.loop, i)
        if unique not in by_unique:
            by_unique[unique] = _block_parameters(model.blocks[i])
        out |= {f"blocks.{i}.{name}": value for name, value in by_unique[unique].items()}
    if not model.ln_final.folded:
        out["ln_final.w"] = model.ln_final.w
    out["unembed.W_U"], out["unembed.b_U"] = model.W_U, model.b_U
    return out


def _stack(model: NamedWeights, name: str, blocks: list[Block]) -> Tensor:
    return show(Stack(name, [_owner(block, name).source(name) for block in blocks], model._home))


def _owner(block: Block, name: str) -> Attention | MLP:
    one_of(name, "name", _STACKED)
    return block.attn if hasattr(type(block.attn), name) else block.mlp


def _block_parameters(block: Block) -> dict[str, Tensor]:
    norms = {name for name in block.cfg.norm_layout.norm_names if getattr(block, name).folded}
    return {
        name: attrgetter(name)(block)
        for name in of_a_block(block.cfg)
        if name.removesuffix(".w") not in norms  # as in TransformerLens: a folded norm has no gain
    }
