"""LoopedTransformer: a looped language model with TransformerLens's surface.

A model of p prelude, k core and c coda layers that runs its core R times appears as an ordinary
transformer of ``p + k R + c`` effective layers, ``blocks.{i}``. Weights exist once; every effective
layer has hook points of its own. See ``tl_looped.model.names`` for the names.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from tl_looped import checkpoints
from tl_looped.checks import Seed, checked, one_of, shown
from tl_looped.errors import ArgumentTypeError, ConfigError
from tl_looped.model.block import BlockWeights
from tl_looped.model.cells import State, Stream, cell_class
from tl_looped.model.config import LoopedConfig
from tl_looped.model.context import LoopRun
from tl_looped.model.exit_gate import ExitReadout
from tl_looped.model.exit_rules import ExitResult, ExitRule
from tl_looped.model.geometry import LayerLike
from tl_looped.model.init import init_weights
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.model.norms import NormWeights
from tl_looped.model.program import Do
from tl_looped.model.running import execute
from tl_looped.transformer import lenses, tokenizing, unrolling
from tl_looped.transformer.embeddings import Embed, Unembed
from tl_looped.transformer.exiting import run_with_exits
from tl_looped.transformer.foreign_cache import lent
from tl_looped.transformer.intervening import (
    Intervention,
    intervened,
    intervening,
    refuse_interventions,
)
from tl_looped.transformer.load_options import LoadOptions, dtype_of, hub_options
from tl_looped.transformer.loading import load_model, settle_padding_side
from tl_looped.transformer.loop_map import LoopMap, loop_map_of
from tl_looped.transformer.outputs import RETURN_TYPES, check_labels, next_token_loss, result
from tl_looped.transformer.processing import Processing
from tl_looped.transformer.prompt import read_prompt, read_resid
from tl_looped.transformer.run_options import (
    KeyValueCache,
    RunOptions,
    begin_run,
    check_seed,
    only_cache,
    read_options,
)
from tl_looped.transformer.spreading import (
    DeviceMap,
    device_map_of,
    refuse_dispatched,
    refuse_offloaded,
)
from tl_looped.transformer.transformerlens import TransformerLensMethods
from tl_looped.transformer.turns import in_turn
from tl_looped.transformer.unsupported import refuse_others

_FORWARD = ("input", "return_type", "loss_per_token", "past_kv_cache", "n_recurrences", "labels")


@checked
class LoopedTransformer(TransformerLensMethods):
    """A looped transformer with hook points by effective layer and by (recurrence, layer).

    Args:
        cfg: Its shape and switches.
        tokenizer: A Hugging Face tokenizer, or None for a model of token ids only.
        move_to_device: Whether to make the weights on ``cfg.device``; otherwise they are on the
            CPU until :meth:`move_model_modules_to_device`.
        default_padding_side: ``"left"`` or ``"right"``; the tokenizer's own if None.

    Attributes:
        loop: Geometry: ``p``, ``k``, ``c``, ``R``, ``index(r, l)``, ``locate(i)``.
        state_seed: Seed of the random initial state where a call gives none.
        generation_config: What the checkpoint's ``generation_config.json`` holds, as plain JSON
            values; empty without one. It is saved with the model.
    """

    def __init__(
        self,
        cfg: LoopedConfig,
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: str | None = None,
    ) -> None:
        super().__init__()
        # A copy of its own: recurrences, flags and dtype of one model must not reach another.
        self.cfg = cfg = copy(cfg)
        cfg.settle()
        cfg.n_devices = 1
        # A new model shows its weights as they are, even if the other one did not.
        cfg.normalization_type, cfg.center_unembed, cfg.skipped_processing = "RMS", False, ()
        self.tokenizer = tokenizer
        self.generation_config: dict[str, Any] = {}
        tokenizing.settle_bos(self)
        settle_padding_side(self, default_padding_side)
        device = torch.device("cpu" if cfg.device is None else cfg.device)
        if not move_to_device:
            self.home_device, device = device, torch.device("cpu")
            cfg.device = str(device)
        if torch.get_default_device().type == "meta":  # within torch.device("meta")
            device = torch.device("meta")
            cfg.device = str(device)
        with device:
            self.embed = Embed(cfg)
            for stage, n in (
                ("prelude", cfg.n_prelude),
                ("core", cfg.n_core_weights),
                ("coda", cfg.n_coda),
            ):
                self.add_module(stage, nn.ModuleList(BlockWeights(cfg) for _ in range(n)))
            for name, module in cell_class(cfg).make_modules(cfg).items():
                self.add_module(name, module)
            self.final_norm = NormWeights(cfg.d_model, cfg.eps, cfg.dtype)
            self.unembed = Unembed(cfg, self.embed, self.final_norm)
        self.cell = cell_class(cfg)(cfg, self._modules)
        self._setup_hooks(cfg)

    # -- making and saving --------------------------------------------------------------------

    @classmethod
    def from_config(
        cls, cfg: LoopedConfig | dict[str, Any], tokenizer: Any = None
    ) -> LoopedTransformer:
        """A model with random weights, drawn from ``cfg.seed`` as ``cfg.init_mode`` says.

        With ``device="meta"``, or within ``torch.device("meta")``, it has shapes and names, but no
        values. In evaluation mode, as TransformerLens's analysis tools want it; there is no
        dropout.
        """
        model = cls(LoopedConfig.from_json(cfg) if isinstance(cfg, dict) else cfg, tokenizer)
        init_weights(model, model.cfg)
        model.cfg.trained_recurrences = None
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | Path,
        *positional: Any,
        n_recurrences: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        device_map: DeviceMap | None = None,
        max_memory: dict[int | str, int | str] | None = None,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = False,
        hf_model: Any = None,
        tokenizer: Any = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
        n_ctx: int | None = None,
        n_devices: int = 1,
        move_to_device: bool = True,
        **from_pretrained_kwargs: Any,
    ) -> LoopedTransformer:
        """Load a checkpoint from a folder, the hub, or the bundle (``"demo"``).

        The weights are unprocessed unless it is asked for; ``HookedTransformer`` folds and centres
        by default. ``fold_ln=True, center_unembed=True`` gives its numbers.

        Args:
            model_name: A local folder, a hub id, or a short alias such as ``"huginn"``,
                ``"ouro-1.4b"``, ``"recurrent-llama-3.2-r32"``. Only config, safetensors and
                tokenizer files are read: no remote code, no pickles.
            *positional: None; what follows the name is given by keyword.
            n_recurrences: Recurrences; the checkpoint's own number if None.
            device: TransformerLens's default device if None. ``"meta"`` loads no values.
            dtype: fp32 if None, as in TransformerLens. A weight that it cannot hold is refused.
            revision: Branch, tag or commit on the hub.
            device_map: Spread the weights over several devices: ``"auto"``, ``"balanced"``,
                ``"balanced_low_0"`` or ``"sequential"`` as in accelerate, or a dict of module names
                to devices. See ``tl_looped.transformer.spreading`` for what that means.
            max_memory: Most bytes of weights per device, as in accelerate:
                ``{0: "20GiB", 1: "40GiB", "cpu": "60GiB"}``.
            fold_ln: Show the norms' gains as part of the weights behind them; see
                :meth:`enable_compatibility_mode`.
            center_writing_weights: Without effect, as in ``HookedTransformer`` on models with
                RMSNorm; noted in ``cfg.skipped_processing``.
            center_unembed: Give ``W_U`` and the logits without their mean over the vocabulary.
            refactor_factored_attn_matrices: Refused: positions are rotary.
            fold_value_biases: Without effect; refused for a model with value biases.
            hf_model: A model of transformers of a looped family, whose weights are copied. Then
                ``model_name`` says what it is called, and where its tokenizer is.
            tokenizer: A Hugging Face tokenizer in place of the checkpoint's.
            default_prepend_bos: Whether text gets a BOS token. If None: as the model was saved;
                otherwise as its authors do by hand (Huginn), or as its tokenizer does by itself.
                :meth:`describe_bos` says which. True is TransformerLens's default.
            default_padding_side: ``"left"`` or ``"right"``; the tokenizer's own if None.
            n_ctx: Longest text, in place of the checkpoint's own. It is saved with the model.
            n_devices: Spread the weights over so many GPUs, the first ones.
            move_to_device: Whether to load onto ``device``; otherwise the weights stay on the CPU
                until :meth:`move_model_modules_to_device`.
            **from_pretrained_kwargs: Of transformers' keywords ``torch_dtype`` (as ``dtype``),
                ``cache_dir``, ``token``, ``local_files_only`` and ``force_download``. Others are
                taken where they change nothing here, such as ``trust_remote_code``, and refused by
                name where they would; see ``tl_looped.transformer.load_options``.

        Raises:
            CheckpointError, UnknownArchitectureError: see ``tl_looped.checkpoints``.
            InputError: ``device_map`` names no device for a layer, splits one, or needs a disk;
                keywords that exclude each other, or that are refused.
        """
        if positional:
            raise ArgumentTypeError(
                f"from_pretrained takes the model's name alone by position, and then got "
                f"{', '.join(map(shown, positional))}: give it by keyword, such as "
                "n_recurrences=4 or fold_ln=False"
            )
        processing = Processing(
            fold_ln,
            center_writing_weights,
            center_unembed,
            fold_value_biases,
            refactor_factored_attn_matrices,
        )
        options = LoadOptions(
            model_name=model_name,
            n_recurrences=n_recurrences,
            device=device,
            revision=revision,
            device_map=device_map,
            max_memory=max_memory,
            tokenizer=tokenizer,
            hf_model=hf_model,
            default_prepend_bos=default_prepend_bos,
            default_padding_side=default_padding_side,
            n_ctx=n_ctx,
            n_devices=n_devices,
            move_to_device=move_to_device,
            processing=processing,
            hub=hub_options(from_pretrained_kwargs),
            dtype=dtype_of(dtype, from_pretrained_kwargs),
        )
        return load_model(cls, options)

    @classmethod
    def from_pretrained_no_processing(
        cls,
        model_name: str | Path,
        *positional: Any,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = False,
        **options: Any,
    ) -> LoopedTransformer:
        """As :meth:`from_pretrained`, which processes nothing by itself either.

        Args:
            model_name: See :meth:`from_pretrained`; and so are all others.
            *positional: None.
            fold_ln, center_writing_weights, center_unembed: See there.
            refactor_factored_attn_matrices, fold_value_biases: See there.
            **options: See there.
        """
        return cls.from_pretrained(
            model_name,
            *positional,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            fold_value_biases=fold_value_biases,
            **options,
        )

    @in_turn
    def save_pretrained(self, folder: str | Path, format: str = "native") -> None:
        """Write a folder that :meth:`from_pretrained` reads: configs, safetensors, tokenizer.

        Files are written beside their place and renamed, so that an interrupted save leaves no
        partial file.

        Args:
            folder: Where to.
            format: ``"native"``, which holds every model; or ``"original"``, the format of the
                published checkpoints of the model's family (``cfg.architecture``), which the
                authors' own code reads. The latter is for the retrofits.

        Raises:
            ConfigError: the family has no format that can be written, or it cannot hold this model.
        """
        checkpoints.save(
            self, self.cfg, self.tokenizer, Path(folder), format, self.generation_config
        )

    @in_turn
    def to_bridge(self, n_recurrences: int | None = None, state_seed: Seed | None = None) -> Any:
        """A TransformerLens bridge over this model's weights, for tools that insist on one.

        It is a ``TransformerBridge`` of ``p + k R + c`` blocks with R fixed, under the bridge's own
        hook names. The weights are shared, not copied: training, ``to()`` and ``train()`` on one
        also move the other. Hooks are not shared.

        Args:
            n_recurrences: R; the model's current number if None.
            state_seed: Seed of the random initial state; ``self.state_seed`` if None.

        Raises:
            ConfigError: if the installed TransformerLens is older than 4, or the model is spread
                over several devices.
            RecurrenceCountError: as :meth:`set_recurrences`.
        """
        refuse_interventions(self, "a bridge")
        installed = importlib.metadata.version("transformer-lens")
        if int(installed.split(".")[0]) < 4:
            raise ConfigError(
                f"to_bridge needs TransformerLens 4 or later, and {installed} is installed: "
                "pip install 'transformer-lens>=4.3,<5'"
            )
        if self.cfg.n_devices > 1:
            raise ConfigError(
                f"the model is spread over {self.cfg.n_devices} devices, and a bridge is on one: "
                "model.to(device) gathers it. The model itself has TransformerLens's tools as well"
            )
        from tl_looped.bridge.build import bridge_of  # imports all of TransformerLens's bridge

        return bridge_of(self, self._loop_at(n_recurrences), check_seed(self, state_seed))

    def _apply(self, fn: Any, recurse: bool = True) -> LoopedTransformer:
        # Behind to(), cuda(), half() and their kin: cfg follows the weights, as in TransformerLens.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # And a spread model that goes to one device is gathered there.
        for model in (self, self._base):  # of a view, the model itself as well
            if isinstance(model, LoopedTransformer):
                model._note_devices()
        return self

    def _note_devices(self) -> None:
        device, dtype = str(self.W_E.device), self.W_E.dtype
        n_devices = len({parameter.device for parameter in self.parameters()})
        self.cfg.note(device=device, dtype=dtype, n_devices=n_devices)

    @property
    def hf_device_map(self) -> dict[str, int | str]:
        """Where the weights are, as transformers says it: by the names that ``device_map`` takes.

        Numbers are GPUs. ``{"": device}`` for a model on one device.
        """
        return device_map_of(self)

    @hf_device_map.setter
    def hf_device_map(self, placed: Mapping[str, Any]) -> None:
        """Accelerate's ``dispatch_model`` notes here where it has put the modules."""
        refuse_dispatched(self, placed)

    # -- running ------------------------------------------------------------------------------

    @in_turn
    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: LayerLike | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: None = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: LayerLike | None = None,
        past_kv_cache: KeyValueCache | None = None,
        *,
        n_recurrences: int | None = None,
        initial_state: Tensor | str | None = None,
        state_seed: Seed | None = None,
        prelude_output: Float[Tensor, "batch pos d_model"] | None = None,
        exit_rule: ExitRule | None = None,
        labels: Integer[Tensor, "batch pos"] | None = None,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        """Run the model. Positions and names are HookedTransformer's, then TransformerBridge's.

        Args:
            input: Text, texts, a conversation (messages ``{"role": ..., "content": ...}``), tokens
                ``[batch, pos]`` or ``[pos]``, or what a tokenizer returns, in a list, an array, a
                column or a DataLoader's batch: see ``tl_looped.transformer.reading``. With
                ``start_at_layer`` the residual stream ``[batch, pos, d_model]`` that it receives
                (give ``attention_mask`` or ``tokens`` again if the batch is padded).
            return_type: ``"logits"`` ``[batch, pos, d_vocab]``, ``"loss"``, ``"both"`` (an
                :class:`~tl_looped.transformer.outputs.Output`), ``"logits_and_cache"`` (logits and
                the :class:`LoopedKeyValueCache` of the run, for ``past_key_values``) or None.
            loss_per_token: The loss of every next token ``[batch, pos - 1]``, not the mean.
            prepend_bos, padding_side: See :meth:`to_tokens`.
            start_at_layer: Start with the input of this effective layer, or (recurrence, layer).
            tokens: The tokens of a residual input, for the loss.
            shortformer_pos_embed: None; positions are rotary.
            attention_mask: ``[batch, pos]`` of the new tokens, zero at padding, on either side;
                those in the key-value cache may come first.
            stop_at_layer: Return what this layer would have received. ``n_layers`` returns the last
                block's output.
            past_kv_cache: Keys and values of the tokens that come before; extended unless it is
                frozen. Outputs are those of the new tokens. After others, text gets no BOS unless
                asked for, and a single new token per row is padding only where ``attention_mask``
                or ``padding_side`` says so. TransformerLens's own is for runs at the number of
                recurrences that it was made for.
            n_recurrences: Recurrences of this run only.
            initial_state: State of recurrence 0, ``[batch, pos, d_model]``, or ``"zeros"`` (with
                an injection: without one they would leave nothing of the prompt).
            state_seed: Seed of the random initial state; ``self.state_seed`` if None.
            prelude_output: What is injected, if ``start_at_layer`` skips the prelude.
            exit_rule: Each token leaves the loop when the rule says so, and goes on to the coda
                with its state at that recurrence. The loop ends when every token has left. Keys and
                values within the loop are not touched by it; with ``past_kv_cache`` the last
                position decides for its whole row, as in generation.
            labels: Targets of the loss in place of the tokens, of the same shape: ids, or -100
                where none counts. The label of a position is what the one before it predicts.
            past_key_values: Another name of ``past_kv_cache``.
            use_cache: Begin a cache for ``"logits_and_cache"`` where none is given; True if None.
            **others: Arguments of TransformerLens and transformers that have no meaning here.

        Returns:
            What ``return_type`` says; with ``exit_rule`` an :class:`ExitResult` of it and of the
            recurrence after which each token left.

        Raises:
            InputError: tokens outside the vocabulary, too long a sequence, wrong shapes.
        """
        self._check_borrowed()
        refuse_offloaded(self)
        if others or shortformer_pos_embed is not None:
            asked = {"shortformer_pos_embed": shortformer_pos_embed, **others}
            refuse_others("forward", asked, _FORWARD)
        one_of(return_type, "return_type", RETURN_TYPES)
        past_kv_cache = only_cache(past_kv_cache, past_key_values)
        if past_kv_cache is None and return_type == "logits_and_cache" and use_cache is not False:
            past_kv_cache = LoopedKeyValueCache()
        options = read_options(
            self,
            n_recurrences=n_recurrences,
            initial_state=initial_state,
            state_seed=state_seed,
            prelude_output=prelude_output,
            past_kv_cache=past_kv_cache,
            exit_rule=exit_rule,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
        )
        given = input, tokens, attention_mask, prepend_bos, padding_side
        asked_for = return_type, loss_per_token, labels
        with self._at(options.n_recurrences) as model:
            if options.foreign_cache is None:
                return model._run(options, *given, *asked_for)
            with lent(model, options.foreign_cache, options) as options:
                return model._run(options, *given, *asked_for)

    def _run(
        self,
        options: RunOptions,
        input: Any,
        tokens: Any,
        attention_mask: Any,
        prepend_bos: bool | None,
        padding_side: str | None,
        return_type: str | None,
        loss_per_token: bool,
        labels: Tensor | None,
    ) -> Any:
        """A forward pass at the model's own number of recurrences."""
        text = attention_mask, prepend_bos, padding_side
        if options.start is None:
            prompt = read_prompt(self, input, *text, options.past_kv_cache)
            x, tokens, mask = prompt.embeds, None, prompt.mask
            if x is None:
                x, tokens = self.embed(prompt.tokens), prompt.tokens
        else:
            x, tokens, mask = read_resid(self, input, tokens, *text, options.past_kv_cache)
        if labels is not None:
            labels = check_labels(labels, x.shape[0], x.shape[1], self.cfg.d_vocab)
        run, steps = begin_run(self.cfg, x, mask, options), None
        recorded = self._recording() if self._records else nullcontext()
        with recorded, intervened(self, run) if self.interventions else nullcontext():
            self._note_run(run, mask)
            if options.start is None:
                x = self.hook_embed(x)
            if options.exit_rule is not None:
                logits, steps = run_with_exits(self, x, run, options.exit_rule, mask)
            else:
                ops = run.program.part(options.start, options.stop)
                logits = execute(ops, x, run, self.parts)
        if options.stop is not None:
            return self._home(logits)
        if (kv := run.context.kv) is not None:
            kv.commit(self.loop.R)
            kv.cache.own(self._watch, self.cfg)
        cache = options.past_kv_cache
        asked = result(logits, tokens, mask, labels, return_type, loss_per_token, cache)
        return asked if steps is None else ExitResult(asked, steps)

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Cross entropy of the next token, over real tokens only; TransformerLens's own.

        Computed in fp32 or better: in bf16 a loss of 2 to 4 nats is a multiple of 1/64.
        """
        return next_token_loss(logits, tokens, attention_mask, per_token)

    # -- interventions ------------------------------------------------------------------------

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """Those that are active now, outermost first."""
        return self._common.interventions

    @interventions.setter
    def interventions(self, interventions: tuple[Intervention, ...]) -> None:
        self._common.interventions = interventions

    def intervening(
        self, *interventions: Intervention
    ) -> AbstractContextManager[LoopedTransformer]:
        """Change every run while the context lasts; contexts nest, and clean up after errors.

        Args:
            *interventions: From ``tl_looped.interventions``, or one's own; applied in this order.

        Yields:
            The model.

        Raises:
            InputError: for anything that is no intervention.
        """
        return intervening(self, interventions)

    # -- the loop, step by step ---------------------------------------------------------------

    @in_turn
    def start_run(
        self, tokens: Int[Tensor, "batch pos"], state_seed: Seed
    ) -> tuple[Stream, LoopRun]:
        """The embedding of tokens without padding and a run for it, for :meth:`unroll`."""
        return unrolling.start_run(self, tokens, state_seed)

    def unroll(self, x: Stream, run: LoopRun, backprop_last: int | None = None) -> Iterator[State]:
        """The state after each recurrence, from the embedding; the same numbers as a whole run.

        ``run.gate`` holds the gate logits of the state that was just given, in models with a gate.

        Args:
            x: The embedding, from :meth:`start_run`.
            run: Its run.
            backprop_last: Recurrences at the end that keep a graph. The earlier ones run without
                one, so their states are constants to autograd and their memory is free at once;
                the exit gate still has a graph there, on the state as a constant. The prelude
                always keeps its graph: each injection reads its output. All recurrences if None.
        """
        return unrolling.unroll(self, x, run, backprop_last)

    @in_turn
    def read_out(self, state: State, run: LoopRun) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a state that has left its recurrence, as :meth:`unroll` gives it."""
        return unrolling.read_out(self, state, run)

    # -- lenses -------------------------------------------------------------------------------

    def logit_lens(
        self, resid: Float[Tensor, "*stack batch pos d_model"]
    ) -> Float[Tensor, "*stack batch pos d_vocab"]:
        """Final norm (recomputed for each vector) and unembedding.

        Args:
            resid: Block outputs or any other residual streams, with any leading dimensions.
        """
        return lenses.logit_lens(self, resid)

    def coda_lens(
        self,
        resid: Float[Tensor, "*stack batch pos d_model"],
        attention_mask: Tensor | None = None,
        after_loop_norm: bool = False,
    ) -> Float[Tensor, "*stack batch pos d_vocab"]:
        """Logits if the loop ended with this state.

        Args:
            resid: Output of a core layer, ``cache["resid_post", (r, l)]``, or several of them
                stacked in front, as from ``cache.stack_recurrences("resid_post")``. Every position
                from the first is needed: the coda's layers attend.
            attention_mask: ``[batch, pos]``, as in the run; needed for padded batches.
            after_loop_norm: ``resid`` is a ``hook_state_out``, already past the loop norm. Only
                matters in models whose last loop norm is the final norm (Ouro).
        """
        return lenses.coda_lens(self, resid, attention_mask, after_loop_norm)

    def exits(self, input: Any, **kwargs: Any) -> ExitReadout:
        """Gate logits and exit logits of every recurrence (Ouro).

        Args:
            input: Text or tokens; further arguments as for the model.

        Raises:
            InputError: if the model has no exit gate.
        """
        return lenses.exits(self, input, **kwargs)

    def loop_map(
        self,
        input: Any,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        initial_state: Tensor | str | None = None,
        state_seed: Seed | None = None,
        without_mlp: Iterable[str] = (),
    ) -> LoopMap:
        """The loop of a prompt as a map from state to state.

        The number of recurrences plays no role, and no hook fires: interventions are left out.
        ``loop_map.run(R)`` gives every ``hook_state_out`` of a run with R recurrences.

        Args:
            input: Text or tokens, as for the model; and so are the arguments below.
            attention_mask: ``[batch, pos]``, zero at padding.
            prepend_bos, padding_side: For text.
            initial_state: Where ``initial_state`` of the map starts, or ``"zeros"``.
            state_seed: Seed of a random one.
            without_mlp: Layers whose MLP writes nothing, ``"prelude.1"``, ``"core.0"``; what a hook
                that sets their ``hook_mlp_out`` to zero at every recurrence does to a run.

        Raises:
            InputError: as in ``forward``; a name in ``without_mlp`` that is no layer.
        """
        return loop_map_of(
            self,
            input,
            attention_mask,
            prepend_bos,
            padding_side,
            initial_state,
            state_seed,
            without_mlp,
        )

    def _note_run(self, run: LoopRun, mask: Tensor | None) -> None:
        """Tell a cache that is being made what run it is of."""
        record = self._record
        if record is None:
            return
        given = run.initial_state is not None
        random = not given and self.cell.starts_anew(False)
        record.state_seed = run.state_seed if random and run.enters_loop else None
        record.state_given = given
        record.attention_mask = None if mask is None or bool(mask.all()) else mask
        record.n_pos = run.context.positions.shape[-1]
        record.n_past = 0 if run.context.kv is None else run.context.kv.n_past
        record.interventions = tuple(map(repr, self.interventions))
        for op in run.program.ops:
            if op.do is Do.READ:
                if run.program.passes(op.recurrence) > 1:
                    record.log.add(f"recurrence.{op.recurrence}.hook_state_in")
                if op.factor != 1 and self.cell.reads_e(op.first, given):
                    record.log.add(f"recurrence.{op.recurrence}.hook_injected")
        for name in run.changed:
            record.log.add(name)
