"""One effective layer: own hook points, weights borrowed from the layer of the stage.

``BlockWeights`` exist once for each layer of prelude, core and coda. A ``Block`` exists once for
each effective layer and holds no parameter. All four norm layouts share one forward pass, in which
a layout's missing norms are skipped.

``hook_attn_out`` and ``hook_mlp_out`` are what is added to the residual stream, so they come after
a post-norm. In Huginn's layout the *sum* is normalised: ``hook_attn_out`` is the raw attention
output, ``hook_resid_mid_sum = resid_pre + attn_out``, ``hook_resid_mid = ln_mid(sum)``, and so
``resid_mid != resid_pre + attn_out``; likewise ``hook_resid_post_sum``, ``ln_out`` and
``hook_resid_post``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from tl_looped._compat import Module, ModuleList
from tl_looped.errors import GatedHookError, InputError
from tl_looped.model.attention import Attention
from tl_looped.model.attention_weights import AttentionWeights
from tl_looped.model.cells import cell_class
from tl_looped.model.config import LoopedConfig, NormLayout
from tl_looped.model.context import NO_SOURCES, RunContext, Sources, check_stream
from tl_looped.model.geometry import LayerLocation
from tl_looped.model.hook_points import (
    PER_HEAD_POS_DIM,
    LoopedHookPoint,
    QuickModule,
    find_hooks,
    hook_points_of,
    place,
)
from tl_looped.model.mlp import MLP, MLPWeights
from tl_looped.model.norms import HookedRMSNorm, NormWeights

# TransformerLens's normalization_type of a model whose norms' gains are folded into the weights.
FOLDED = "RMSPre"

# Hooks that exist only while a flag of the config is on: name within the block -> flag.
GATED_HOOKS: dict[str, str] = {
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}


class BlockWeights(Module):
    """Parameters of one layer of a stage, with the norms that the layout names."""

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.attn = AttentionWeights(cfg)
        self.mlp = MLPWeights(cfg)
        for name in cfg.norm_layout.norm_names:
            self.add_module(name, NormWeights(cfg.d_model, cfg.eps, cfg.dtype))


class Block(QuickModule):
    """A transformer block as TransformerLens's tools expect it, on borrowed weights.

    Args:
        cfg: The model's configuration; its flags are read at every call.
        weights: Parameters of the stage's layer.
        location: Stage, recurrence and layer, passed on to every hook point.
    """

    # Read by TransformerLens's logit lens: block outputs are one [batch, pos, d_model] stream.
    hook_out_is_single_residual_stream = True

    noted_as = ("hook_resid_pre", "hook_resid_pre", "hook_resid_post")
    weights: BlockWeights
    ln1: HookedRMSNorm
    ln1_post: HookedRMSNorm
    ln_mid: HookedRMSNorm
    ln2: HookedRMSNorm
    ln2_post: HookedRMSNorm
    ln_out: HookedRMSNorm

    def __init__(self, cfg: LoopedConfig, weights: BlockWeights, location: LayerLocation) -> None:
        super().__init__()
        self.cfg = cfg
        self.location = location
        object.__setattr__(self, "weights", weights)
        layout = cfg.norm_layout
        self._pre = layout is not NormLayout.POST
        self._post = layout in (NormLayout.POST, NormLayout.SANDWICH)
        self._residual = layout is NormLayout.RESIDUAL

        self.hook_resid_pre = LoopedHookPoint()
        self.hook_attn_in = LoopedHookPoint(PER_HEAD_POS_DIM)
        self.hook_q_input = LoopedHookPoint(PER_HEAD_POS_DIM)
        self.hook_k_input = LoopedHookPoint(PER_HEAD_POS_DIM)
        self.hook_v_input = LoopedHookPoint(PER_HEAD_POS_DIM)
        self._add_norm("ln1", self._pre)
        self.attn = Attention(cfg, weights.attn, location, getattr(self, "ln1", None))
        self._show_inputs()
        self._add_norm("ln1_post", self._post)
        self.hook_attn_out = LoopedHookPoint()
        if self._residual:
            self.hook_resid_mid_sum = LoopedHookPoint()
        self._add_norm("ln_mid", self._residual)
        self.hook_resid_mid = LoopedHookPoint()
        self.hook_mlp_in = LoopedHookPoint()
        self._add_norm("ln2", self._pre)
        self.mlp = MLP(weights.mlp, getattr(self, "ln2", None))
        self._add_norm("ln2_post", self._post)
        self.hook_mlp_out = LoopedHookPoint()
        if self._residual:
            self.hook_resid_post_sum = LoopedHookPoint()
        self._add_norm("ln_out", self._residual)
        self.hook_resid_post = LoopedHookPoint()
        self.fold_norms(cfg.normalization_type == FOLDED)
        place(self, location)
        # Name within the block -> hook point, in the order of the forward pass.
        self.hook_suffixes = hook_points_of(self)

    def _show_inputs(self) -> None:
        """Let attention have the split inputs as well, TransformerBridge's place for them."""
        for name in ("hook_q_input", "hook_k_input", "hook_v_input"):
            # Past nn.Module.__setattr__: they are in the model once.
            object.__setattr__(self.attn, name, self._modules[name])

    def find_hooks(self, place: str) -> None:
        """Take hook points that stand in the place of earlier ones for the block's own.

        Raises:
            InputError: if something else stands there.
        """
        find_hooks(self, self.hook_suffixes, place)
        self._show_inputs()

    def fold_norms(self, folded: bool) -> None:
        """Whether the gains of the norms at the sublayers' inputs count as part of the weights."""
        if self._pre:
            self.ln1.folded = self.ln2.folded = folded

    def _add_norm(self, name: str, present: bool) -> None:
        if present:
            self.add_module(name, HookedRMSNorm(getattr(self.weights, name)))

    def borrow(self, weights: BlockWeights) -> None:
        """Run with another layer's weights from now on; hook points, names and place stay."""
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self.attn, "_weights", weights.attn)
        object.__setattr__(self.mlp, "_weights", weights.mlp)
        for name in self.cfg.norm_layout.norm_names:
            object.__setattr__(getattr(self, name), "weights", getattr(weights, name))
        if self.cfg.qk_norm:
            for name in ("q_norm", "k_norm"):
                object.__setattr__(getattr(self.attn, name), "weights", getattr(weights.attn, name))

    @property
    def submodules(self) -> dict[str, nn.Module]:
        """Components by name, as TransformerLens's edge methods read them, see `hook_aliases`."""
        return {name: module for name, module in self._modules.items() if module is not None} | {
            "loop": self
        }

    @property
    def hook_aliases(self) -> dict[str, str]:
        """Where ``hook_attn_out`` comes from, for TransformerLens's direct-path and edge methods.

        They refuse models whose head outputs do not reach the end of the stream as they were
        written: behind a post-norm, a norm on the residual sum, an injection, a norm of the loop.
        They take what stands before the first dot for the component and look it up in
        `submodules`; the block stands in there for the loop, which is no part of it.
        """
        if self._post:
            return {"hook_attn_out": "ln1_post.hook_normalized"}
        if self._residual:
            return {"hook_attn_out": "ln_mid.hook_normalized (a norm on the residual sum)"}
        reason = cell_class(self.cfg).why_rescaled(self.cfg)
        if reason is not None:
            return {"hook_attn_out": f"loop.({reason})"}
        return {"hook_attn_out": "attn.hook_out"}

    def forward(
        self,
        resid_pre: Any,
        run: RunContext | Tensor | None = None,
        sources: Sources | None = NO_SOURCES,
        attention_mask: Tensor | None = None,
        past_kv_cache_entry: Any = None,
        shortformer_pos_embed: Any = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this layer, on the device of its weights.

        Called by itself, as TransformerLens's code calls it, it gets a stream whose positions count
        from each row's first real token. Hooks fire; interventions are of runs of the model, and
        change nothing here.

        Args:
            resid_pre: The stream, ``[batch, pos, d_model]``.
            run: Positions, rotation and mask of the run that calls it; None by itself.
            sources: What queries, and keys and values, are made of, if not of the stream.
            attention_mask: ``[batch, pos]``, zero at padding, without a run.
            past_kv_cache_entry: Refused: run the model with ``past_kv_cache``.
            shortformer_pos_embed: Refused: positions are rotations.

        Raises:
            InputError: for what is refused, and a stream of another shape; by itself, a core layer
                that gets more than a stream from its cell.
        """
        if type(run) is not RunContext:
            # TransformerLens's second argument is shortformer_pos_embed.
            refused = past_kv_cache_entry, shortformer_pos_embed if run is None else run
            run, sources = self._context(resid_pre, attention_mask, *refused), NO_SOURCES
        if run.spread:
            device = self.weights.attn.qkv.device
            resid_pre, run = resid_pre.to(device), run.at(device)
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self._attention(resid_pre, run, sources or NO_SOURCES)
        if self._post:
            attn_out = self.ln1_post(attn_out)
        resid_mid = resid_pre + self.hook_attn_out(attn_out)
        if self._residual:
            resid_mid = self.ln_mid(self.hook_resid_mid_sum(resid_mid))
        resid_mid = self.hook_resid_mid(resid_mid)

        mlp_in = resid_mid
        if self.cfg.use_hook_mlp_in:
            mlp_in = self.hook_mlp_in(resid_mid.clone())
        mlp_out = self.mlp(self.ln2(mlp_in) if self._pre else mlp_in)
        if self._post:
            mlp_out = self.ln2_post(mlp_out)
        resid_post = resid_mid + self.hook_mlp_out(mlp_out)
        if self._residual:
            resid_post = self.ln_out(self.hook_resid_post_sum(resid_post))
        return self.hook_resid_post(resid_post)

    def _context(
        self, resid_pre: Any, attention_mask: Any, past_kv_cache_entry: Any, shortformer: Any
    ) -> RunContext:
        """Of a call by itself."""
        if past_kv_cache_entry is not None:
            raise InputError(
                "a block takes no past_kv_cache_entry: run the model with past_kv_cache="
            )
        if shortformer is not None:
            raise InputError(
                "a block takes no shortformer_pos_embed: positions are rotations of queries and "
                "keys"
            )
        cell = cell_class(self.cfg)
        if cell.shapes_layers and self.location.stage == "core":
            raise InputError(
                f"a core layer of a {self.cfg.cell!r} loop gets more from it than a stream: run "
                "the model, with start_at_layer= and stop_at_layer="
            )
        check_stream(self.cfg, "resid_pre", resid_pre)
        return RunContext.alone(self.cfg, resid_pre, attention_mask)

    def _attention(
        self, resid_pre: Float[Tensor, "batch pos d_model"], run: RunContext, sources: Sources
    ) -> Float[Tensor, "batch pos d_model"]:
        """Attention output, from one input or, with TransformerLens's flags, one for each head."""
        cfg = self.cfg
        if cfg.use_attn_in or cfg.use_split_qkv_input:
            return self._attention_per_head(resid_pre, run, sources)
        if sources is NO_SOURCES:
            return self.attn(self.ln1(resid_pre) if self._pre else resid_pre, run)
        q_from, kv_from = sources
        q_in = self._normed(resid_pre if q_from is None else q_from, resid_pre)
        kv_in = self._normed(resid_pre if kv_from is None else kv_from, resid_pre)
        return self.attn.forward_from(q_in, kv_in, run)

    def _attention_per_head(
        self, resid_pre: Float[Tensor, "batch pos d_model"], run: RunContext, sources: Sources
    ) -> Float[Tensor, "batch pos d_model"]:
        cfg = self.cfg
        q_from = resid_pre if sources.q is None else sources.q
        kv_from = resid_pre if sources.kv is None else sources.kv
        if cfg.use_attn_in:
            if q_from is not kv_from:
                raise GatedHookError(
                    "hook_attn_in is one input for queries, keys and values, and here they are made"
                    " of different things: use set_use_split_qkv_input(True)"
                )
            heads = self.hook_attn_in(_per_head(q_from, cfg.n_heads))
            q_in, k_in, v_in = heads, heads, heads
            if cfg.n_hooked_kv_heads != cfg.n_heads:
                # A key-value head reads the input of the first query head of its group.
                k_in = v_in = heads[:, :, :: cfg.n_heads // cfg.n_kv_heads]
        else:
            q_in = self.hook_q_input(_per_head(q_from, cfg.n_heads))
            k_in = self.hook_k_input(_per_head(kv_from, cfg.n_hooked_kv_heads))
            v_in = self.hook_v_input(_per_head(kv_from, cfg.n_hooked_kv_heads))
        if self._pre:
            q_in, k_in, v_in = (self.ln1(x) for x in (q_in, k_in, v_in))
        return self.attn.forward_split(q_in, k_in, v_in, run)

    def _normed(self, x: Tensor, resid_pre: Tensor) -> Tensor:
        """An input of attention behind its norm, whose hooks are those of the stream."""
        if not self._pre:
            return x
        return self.ln1(x) if x is resid_pre else self.ln1.silent(x)


class BlockList(ModuleList):
    """Effective layers, in order."""

    if TYPE_CHECKING:  # else they would be modules of any kind

        def __getitem__(self, i: int) -> Block: ...  # type: ignore[override]
        def __iter__(self) -> Iterator[Block]: ...


def _per_head(
    x: Float[Tensor, "batch pos d_model"], n: int
) -> Float[Tensor, "batch pos head d_model"]:
    """A copy of the stream for each head, so that editing one leaves the others alone."""
    return x[:, :, None].repeat(1, 1, n, 1)
