"""LoopedTransformer: a looped language model with TransformerLens's surface.

A model of p prelude, k core and c coda layers that runs its core R times appears as an ordinary
transformer of ``p + k R + c`` effective layers, ``blocks.{i}``. Weights exist once; every effective
layer has hook points of its own. See ``tl_looped.model.names`` for the names.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_looped import checkpoints
from tl_looped._compat import lm_cross_entropy_loss
from tl_looped.checks import Seed, checked, one_of, shown
from tl_looped.errors import ArgumentTypeError, ConfigError, InputError
from tl_looped.model.block import BlockWeights
from tl_looped.model.cells import State, Stream, cell_class
from tl_looped.model.config import LoopedConfig
from tl_looped.model.context import LoopRun
from tl_looped.model.exit_gate import ExitReadout
from tl_looped.model.exit_rules import ExitResult, ExitRule
from tl_looped.model.geometry import LayerLike
from tl_looped.model.init import init_weights
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.model.masks import real_tokens
from tl_looped.model.norms import NormWeights
from tl_looped.model.program import Do
from tl_looped.model.running import execute
from tl_looped.transformer import generation, lenses, tokenizing, unrolling
from tl_looped.transformer.embeddings import Embed, Unembed
from tl_looped.transformer.exiting import run_with_exits
from tl_looped.transformer.generation import GenerationOptions
from tl_looped.transformer.intervening import (
    Intervention,
    intervened,
    intervening,
    refuse_interventions,
)
from tl_looped.transformer.load_options import LoadOptions, dtype_of, hub_options
from tl_looped.transformer.loading import load_model
from tl_looped.transformer.loop_map import LoopMap, loop_map_of
from tl_looped.transformer.processing import Processing
from tl_looped.transformer.prompt import read_prompt, read_resid, token_rows
from tl_looped.transformer.run_options import RunOptions, begin_run, check_seed, read_options
from tl_looped.transformer.spreading import (
    DeviceMap,
    device_map_of,
    refuse_dispatched,
    refuse_offloaded,
)
from tl_looped.transformer.transformerlens import TransformerLensMethods
from tl_looped.transformer.turns import in_turn
from tl_looped.transformer.vocabulary import refuse_larger

_RETURN_TYPES = ("logits", "loss", "both", None)


@checked
class LoopedTransformer(TransformerLensMethods):
    """A looped transformer with hook points by effective layer and by (recurrence, layer).

    Args:
        cfg: Its shape and switches.
        tokenizer: A Hugging Face tokenizer, or None for a model of token ids only.

    Attributes:
        loop: Geometry: ``p``, ``k``, ``c``, ``R``, ``index(r, l)``, ``locate(i)``.
        state_seed: Seed of the random initial state where a call gives none.
        generation_config: What the checkpoint's ``generation_config.json`` holds, as plain JSON
            values; empty without one. It is saved with the model.
    """

    def __init__(self, cfg: LoopedConfig, tokenizer: Any = None) -> None:
        super().__init__()
        # A copy of its own: recurrences, flags and dtype of one model must not reach another.
        self.cfg = cfg = copy(cfg)
        cfg.n_devices = 1
        # A new model shows its weights as they are, even if the other one did not.
        cfg.normalization_type, cfg.center_unembed, cfg.skipped_processing = "RMS", False, ()
        self.tokenizer = tokenizer
        self.generation_config: dict[str, Any] = {}
        tokenizing.settle_bos(self)
        device = torch.device("cpu" if cfg.device is None else cfg.device)
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
        self.cfg.device, self.cfg.dtype = str(self.W_E.device), self.W_E.dtype
        self.cfg.n_devices = len({parameter.device for parameter in self.parameters()})

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

    # -- text and tokens ----------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer, or None for a model of token ids only.

        Raises:
            TokenizerError: when one is set that gives ids without an embedding.
        """
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        refuse_larger(tokenizer, self.cfg.d_vocab)
        self._tokenizer = tokenizer

    @checked
    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Use this tokenizer from now on.

        Args:
            tokenizer: A Hugging Face tokenizer.
            default_padding_side: ``"left"`` or ``"right"``; the tokenizer's own if None.

        Raises:
            TokenizerError: if it gives ids for which the model has no embedding.
        """
        tokenizing.set_tokenizer(self, tokenizer, default_padding_side)

    @checked
    def describe_bos(self, prepend_bos: bool | None = None) -> str:
        """A sentence: whether text gets a BOS token, and who decided it.

        Args:
            prepend_bos: What the call that is described says, if it says anything.
        """
        return tokenizing.describe_bos(self, prepend_bos)

    @checked
    def tokenize(
        self,
        text: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        truncate: bool = False,
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Tokens of one or more texts, and the mask of the real ones.

        Args:
            text: One text or several, padded to the longest, or conversations: see
                ``tl_looped.transformer.reading``. A conversation is written by :meth:`chat_text`,
                with the opening of the model's reply, and gets no BOS but the template's own.
            prepend_bos: Overrides ``cfg.default_prepend_bos``. A text that begins with BOS gets
                no second one either way.
            padding_side: ``"left"`` or ``"right"``; the tokenizer's own side if None.
            truncate: Cut rows to the context length instead of raising.

        Raises:
            TokenizerError: without a tokenizer, or if a text gives no token at all.
            InputError: if a text is longer than the context, for what is not text, or an unknown
                padding_side.
        """
        return tokenizing.tokenize(self, text, prepend_bos, padding_side, truncate)

    @checked
    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of texts or conversations, padded to the longest; see :meth:`tokenize`."""
        return tokenizing.to_tokens(
            self, input, prepend_bos, padding_side, move_to_device, truncate
        )

    @checked
    def chat_text(self, messages: Any, add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it, special tokens included.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            add_generation_prompt: End with the opening of the model's reply.

        Raises:
            TokenizerError: without a tokenizer, or if it has no chat template, or one that refuses
                the messages.
            InputError: if they are not messages.
        """
        return tokenizing.chat_text(self, messages, add_generation_prompt)

    @checked
    def token_rows(
        self, prompts: Any, attention_mask: Any = None, prepend_bos: bool | None = None
    ) -> list[Int[Tensor, " pos"]]:
        """The real tokens of every prompt, without padding.

        Args:
            prompts: Whatever the model takes (``tl_looped.transformer.reading``); or a list of
                token sequences of any lengths, which are taken as they are.
            attention_mask: ``[batch, pos]`` of tokens, zero at padding; read off the pad tokens, as
                in a run, if None.
            prepend_bos: See :meth:`to_tokens`.

        Raises:
            InputError: without any prompt or token, or beyond the context; the prompt's number is
                given.
        """
        return token_rows(self, prompts, attention_mask, prepend_bos)

    @checked
    def to_string(self, tokens: Any) -> str | list[str]:
        """Text of one token, of a sequence, or a list of texts of several, of any lengths."""
        return tokenizing.to_string(self, tokens)

    @checked
    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> list[str] | list[list[str]]:
        """Each token as a string; a list of texts, conversations or token sequences gives a list of
        such lists, unpadded.
        """
        return tokenizing.to_str_tokens(self, input, prepend_bos)

    @checked
    def to_single_token(self, string: str) -> int:
        """The id of a text that is exactly one token.

        Raises:
            SingleTokenError: if it is none or several; the message lists them.
        """
        return tokenizing.to_single_token(self, string)

    @checked
    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        return tokenizing.to_single_str_token(self, int_token)

    @checked
    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Position of a token in a text, a conversation or tokens ``[pos]`` or ``[1, pos]``.

        Raises:
            SingleTokenError: if it does not occur, or if there is more than one sequence.
            InputError: if ``mode`` is neither ``"first"`` nor ``"last"``.
        """
        return tokenizing.get_token_position(self, single_token, input, mode, prepend_bos)

    @checked
    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "..."]
    ) -> Float[Tensor, "... d_model"]:
        """Columns of W_U of the given tokens, as rows.

        As in TransformerLens, a single token gives ``[d_model]``. The final norm's gain is folded
        in only in compatibility mode; the exact direction of a logit is always
        ``ln_final.w * W_U[:, token]``.
        """
        return tokenizing.tokens_to_residual_directions(self, tokens)

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
        attention_mask: Tensor | None = None,
        stop_at_layer: LayerLike | None = None,
        n_recurrences: int | None = None,
        initial_state: Tensor | str | None = None,
        state_seed: Seed | None = None,
        prelude_output: Float[Tensor, "batch pos d_model"] | None = None,
        past_kv_cache: LoopedKeyValueCache | None = None,
        exit_rule: ExitRule | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: Text, texts, a conversation (messages ``{"role": ..., "content": ...}``), tokens
                ``[batch, pos]`` or ``[pos]``, or what a tokenizer returns, in a list, an array, a
                column or a DataLoader's batch: see ``tl_looped.transformer.reading``. With
                ``start_at_layer`` the residual stream ``[batch, pos, d_model]`` that it receives
                (give ``attention_mask`` or ``tokens`` again if the batch is padded).
            return_type: ``"logits"`` ``[batch, pos, d_vocab]``, ``"loss"``, ``"both"`` or None.
            loss_per_token: The loss of every next token ``[batch, pos - 1]``, not the mean.
            prepend_bos, padding_side: See :meth:`to_tokens`.
            start_at_layer: Start with the input of this effective layer, or (recurrence, layer).
            tokens: The tokens of a residual input, for the loss.
            attention_mask: ``[batch, pos]`` of the new tokens, zero at padding, on either side.
            stop_at_layer: Return what this layer would have received. ``n_layers`` returns the last
                block's output.
            n_recurrences: Recurrences of this run only.
            initial_state: State of recurrence 0, ``[batch, pos, d_model]``, or ``"zeros"`` (with
                an injection: without one they would leave nothing of the prompt).
            state_seed: Seed of the random initial state; ``self.state_seed`` if None.
            prelude_output: What is injected, if ``start_at_layer`` skips the prelude.
            past_kv_cache: Keys and values of the tokens that come before; extended unless it is
                frozen. Outputs are those of the new tokens. After others, no token is taken for
                padding without an ``attention_mask``, and text gets no BOS unless asked for.
            exit_rule: Each token leaves the loop when the rule says so, and goes on to the coda
                with its state at that recurrence. The loop ends when every token has left. Keys and
                values within the loop are not touched by it; with ``past_kv_cache`` the last
                position decides for its whole row, as in generation.

        Returns:
            What ``return_type`` says; with ``exit_rule`` an :class:`ExitResult` of it and of the
            recurrence after which each token left.

        Raises:
            InputError: tokens outside the vocabulary, too long a sequence, wrong shapes.
        """
        self._check_borrowed()
        refuse_offloaded(self)
        one_of(return_type, "return_type", _RETURN_TYPES)
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
        with self._at(options.n_recurrences) as model:
            return model._run(options, *given, return_type, loss_per_token)

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
    ) -> Any:
        """A forward pass at the model's own number of recurrences."""
        text = attention_mask, prepend_bos, padding_side
        if options.start is None:
            prompt = read_prompt(self, input, *text, options.past_kv_cache)
            x, tokens, mask = self.embed(prompt.tokens), prompt.tokens, prompt.mask
        else:
            x, tokens, mask = read_resid(self, input, tokens, *text)
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
        result = self._result(logits, tokens, mask, return_type, loss_per_token)
        return result if steps is None else ExitResult(result, steps)

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
        if attention_mask is not None:
            attention_mask = real_tokens(attention_mask)
            if attention_mask.shape != tokens.shape:
                raise InputError(
                    f"attention_mask must have the shape of tokens, {tuple(tokens.shape)}, got "
                    f"{tuple(attention_mask.shape)}"
                )
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

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

    # -- generation ---------------------------------------------------------------------------

    @in_turn
    @torch.no_grad()
    @checked
    def generate(
        self,
        input: Any,
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        return_type: str = "input",
        verbose: bool = True,
        attention_mask: Any = None,
        n_recurrences: int | None = None,
        initial_state: Any = None,
        state_seed: Seed | None = None,
        seed: int | None = None,
        past_kv_cache: LoopedKeyValueCache | None = None,
        exit_rule: ExitRule | None = None,
        stop_strings: Any = None,
    ) -> Any:
        """Continue one or more prompts.

        Args:
            input: As for the model itself: text, several texts (padded on the left), tokens, or a
                conversation, or several, for the tokenizer's chat template.
            max_new_tokens: Most new tokens per row.
            stop_at_eos: End a row at a stop token; it is filled up with the first of them.
            eos_token_id: Stop token or tokens, in place of :meth:`stop_tokens`.
            do_sample: Sample; otherwise take the most likely token.
            top_k, top_p, temperature, freq_penalty, repetition_penalty: As in TransformerLens; the
                penalties count real tokens only.
            use_past_kv_cache: Keep keys and values of earlier tokens.
            prepend_bos: Overrides ``cfg.default_prepend_bos`` for text. A chat template brings its
                own.
            return_type: ``"input"`` (as the input was), ``"str"`` or ``"tokens"``.
            verbose: Show progress, and the cache's memory.
            attention_mask: Mask of a left-padded token batch.
            n_recurrences: Recurrences of every step.
            initial_state: ``"zeros"``, or a state for every position up to the last generated.
            state_seed: Seed of the random initial state.
            seed: Seed of the sampling; the global generator is left alone if given.
            past_kv_cache: A cache to use, for instance one that shares slots,
                ``LoopedKeyValueCache(recurrence_slots=1)``, or one that holds a prefix already.
            exit_rule: When tokens leave the loop.
            stop_strings: Text or texts that end a row once its reply contains one; the token that
                completes it stays. It is filled up as after a stop token, or with padding.

        Returns:
            Prompt and continuation, as text or as tokens ``[batch, pos]``; of a conversation the
            reply alone. In text, special tokens of the prompt and the one that ends a row are left
            out; others of the reply are written, so that no marker vanishes from a text that goes
            on after it. With ``exit_rule`` an :class:`ExitResult` of that and the recurrence after
            which each new token's prediction left the loop ``[batch, new]``.
        """
        options = GenerationOptions.of(locals())
        return generation.generate(self, input, max_new_tokens, options)

    @in_turn
    @checked
    def generate_stream(
        self,
        input: Any,
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        **options: Any,
    ) -> Iterator[Any]:
        """As :meth:`generate`, piece by piece, in TransformerLens's way.

        Args:
            input, max_new_tokens: As in :meth:`generate`.
            max_tokens_per_yield: Most tokens in a piece.
            **options: As in :meth:`generate`; of an ``exit_rule`` the steps are not returned.

        Yields:
            Tokens ``[batch, n]``, or texts. The first piece includes the prompt (but for a
            conversation), later ones hold new tokens only. The model may be used between them.
        """
        asked = GenerationOptions(**options)
        return generation.generate_stream(self, input, max_new_tokens, max_tokens_per_yield, asked)

    def stop_tokens(self) -> list[int]:
        """Tokens that end a generated text, unless ``eos_token_id`` says otherwise.

        The tokenizer's EOS; those of the checkpoint's ``generation_config.json``; and the special
        token that the chat template writes after a reply, the end of a turn.
        """
        return generation.stop_tokens(self)

    def _result(
        self,
        logits: Tensor,
        tokens: Tensor | None,
        mask: Tensor | None,
        return_type: str | None,
        per_token: bool,
    ) -> Any:
        if return_type in (None, "logits"):
            return logits if return_type else None
        if tokens is None:
            raise InputError("a loss needs tokens: pass tokens= with a residual input")
        loss = self.loss_fn(logits, tokens, mask, per_token)
        return loss if return_type == "loss" else (logits, loss)

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
