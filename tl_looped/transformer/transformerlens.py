"""The storey of TransformerLens's methods that are neither about hooks nor about text or loops.

They move the model, process and load weights. What TransformerLens has and a looped model has not
is refused by name: see :data:`REFUSED`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from tl_looped._compat import FactoredMatrix, warn_if_mps
from tl_looped.checks import checked, described
from tl_looped.errors import ArgumentTypeError, InputError, UnsupportedMethodError
from tl_looped.model.block import Block
from tl_looped.model.init import init_weights
from tl_looped.transformer import state_dicts
from tl_looped.transformer.processing import Processing, refuse_value_biases
from tl_looped.transformer.prompt import start_of_run
from tl_looped.transformer.run_options import KeyValueCache
from tl_looped.transformer.spreading import check_devices
from tl_looped.transformer.text_loop import TextLoop
from tl_looped.transformer.turns import in_turn

if TYPE_CHECKING:
    from typing_extensions import Self

_LOAD = "LoopedTransformer.from_pretrained(name) loads a looped model"
_FAMILIES = "tl_looped.adapters.known_adapters() lists the families that are loaded"
_TEXT_ALONE = "looped models read one text, left to right"
_TOKENS = "model.to_tokens(texts) makes their tokens"
_OF_SAES = (
    *("add_sae", "reset_saes", "run_with_saes"),
    *("run_with_cache_with_saes", "run_with_hooks_with_saes"),
)

REFUSED = {
    "boot_transformers": _LOAD,
    "boot_native": _LOAD,
    "boot_tl_legacy": _LOAD,
    "list_supported_models": _FAMILIES,
    "check_model_support": _FAMILIES,
    "load_sample_training_dataset": "no training data of a looped model is a data set of "
    "TransformerLens's; set model.dataset to texts of your own for sample_datapoint",
    "center_writing_weights": "RMSNorm does not take the mean out of the stream, so centred "
    "weights would be those of another model; HookedTransformer skips this on models with RMSNorm",
    "refactor_factored_attn_matrices": "rotary queries and keys allow no such change of basis; "
    "TransformerLens refuses it too",
    "encoder_output": f"{_TEXT_ALONE}, and have no encoder; model.run_with_cache has every stream",
    "to_sentence_pair_tokens": f"{_TEXT_ALONE}, and know no pairs of sentences; {_TOKENS}",
    "predict_next_sentence": f"{_TEXT_ALONE}, and have no such head; model(text) predicts tokens",
    "prepare_multimodal_inputs": f"{_TEXT_ALONE}, and no images or sounds; {_TOKENS}",
    **dict.fromkeys(
        _OF_SAES,
        "of HookedSAETransformer, which subclasses HookedTransformer; "
        "tl_looped.interventions.Splice(sae) puts an autoencoder into any run: "
        "with model.intervening(Splice(sae)): ...",
    ),
    "diffusion_generate": "looped models are no diffusion models; model.generate samples text",
}
"""Methods of TransformerLens's and SAELens's models that are refused, and what to do instead."""


@checked
class TransformerLensMethods(TextLoop):
    """Methods of HookedTransformer and TransformerBridge, beside hooks, text and generation.

    Attributes:
        home_device: Where weights belong that ``move_to_device=False`` left on the CPU, until they
            are moved.
        dataset: Texts for :meth:`sample_datapoint`: ``{"text": ...}`` by number.
    """

    home_device: torch.device | None = None
    dataset: Any = None

    # -- devices and dtypes -------------------------------------------------------------------

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> Self:
        """As in PyTorch; ``cfg`` follows the weights, and a spread model is gathered.

        Args:
            *args, **kwargs: A device, a dtype, both, or a tensor that has them. A bool behind the
                first is ``print_details``, as in TransformerLens.
            print_details: Say what is done. TransformerLens says it by default.

        Raises:
            InputError: for a device that is not there, or a dtype that is no floating point type.
        """
        if len(args) == 2 and isinstance(args[1], bool) and not isinstance(args[0], Tensor):
            print_details, args = args[1], args[:1]
        device, dtype = _target(args, kwargs)
        if print_details:
            if device is not None:
                print("Moving model to device: ", device)
            if dtype is not None:
                print("Changing model dtype to", dtype)
        super().to(*args, **kwargs)
        if device is not None:
            self.home_device = None
        return self

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        """Move the model to a GPU, the current one if None; see :meth:`to`."""
        numbered = not isinstance(device, (str, torch.device, type(None)))
        return self.to(f"cuda:{device}" if numbered else device or "cuda")

    def cpu(self) -> Self:
        """Move the model to the CPU; see :meth:`to`."""
        return self.to(torch.device("cpu"))

    def mps(self) -> Self:
        """Move the model to Apple's GPU, with TransformerLens's warning; see :meth:`to`."""
        return self.to(torch.device("mps"))

    def move_model_modules_to_device(self) -> None:
        """Move the weights that ``move_to_device=False`` left on the CPU to the model's device.

        Any other model stays where it is.
        """
        if self.home_device is not None:
            self.to(self.home_device)

    # -- what the weights are shown as --------------------------------------------------------

    @in_turn
    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool | None = None,
        fold_value_biases: bool = False,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """TransformerLens's switch to folded norms, for tools and notebooks that rely on it.

        With ``fold_ln`` the gains of ``ln1``, ``ln2`` and ``ln_final`` count as part of W_Q, W_K,
        W_V, W_gate, W_in and W_U: those are given multiplied, the norms called from outside leave
        them out and report ones, and ``unembed`` called from outside puts them in. It is a matter
        of what the model shows. The forward pass, every activation (``hook_normalized`` never
        includes a gain) and what is saved stay bit for bit the same. Post-norms and norms on the
        stream or the loop have no weights after them to be folded into.

        ``center_unembed=True`` takes the mean over the vocabulary out of W_U and of the logits, as
        TransformerLens does by default; log probabilities and losses stay. It has to be asked for
        here, since everything else of this method changes no number.

        Args:
            disable_warnings: There are none.
            no_processing: Fold and centre nothing: the weights as they are stored.
            fold_ln: Fold the gains.
            center_writing_weights: Without effect, in TransformerLens too: there is no LayerNorm.
            center_unembed: Centre ``W_U`` and the logits, or not; as it is if None.
            fold_value_biases: Without effect; refused for a model with value biases.
            refactor_factored_attn_matrices: Not supported.

        Raises:
            InputError: for the last two.
        """
        asked = Processing(
            fold_ln,
            center_writing_weights,
            center_unembed,
            fold_value_biases,
            refactor_factored_attn_matrices,
        )
        (Processing() if no_processing else asked).apply(self)

    @property
    def compatibility_mode(self) -> bool:
        """Whether gains are shown as part of the weights; TransformerBridge's name for it."""
        return bool(self.ln_final.folded)

    @in_turn
    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """HookedTransformer's processing in place, with its defaults; see :meth:`process_weights`.

        Value biases stay.
        """
        asked = fold_ln, center_writing_weights, center_unembed
        self.process_weights(False, *asked, False, refactor_factored_attn_matrices)

    @in_turn
    def process_weights(
        self,
        verbose: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """TransformerBridge's processing, with its defaults: gains folded, ``W_U`` centred.

        The weights stay as they are stored, and are shown so from now on, until
        ``enable_compatibility_mode(no_processing=True)``. The logits lose their mean over the
        vocabulary.

        Args:
            verbose: Without effect.
            fold_ln, center_writing_weights: See :meth:`enable_compatibility_mode`.
            center_unembed, fold_value_biases: See there.
            refactor_factored_attn_matrices: Not supported.

        Raises:
            InputError: for the last, and for ``fold_value_biases`` of a model with value biases.
        """
        Processing(
            fold_ln,
            center_writing_weights,
            center_unembed,
            fold_value_biases,
            refactor_factored_attn_matrices,
        ).apply(self)

    # -- state dicts under TransformerLens's names --------------------------------------------

    @in_turn
    def load_and_process_state_dict(
        self,
        state_dict: dict[str, Tensor],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Load weights under TransformerLens's names, and process what is shown, as it does.

        Args:
            state_dict: ``blocks.0.attn.W_Q`` and its kin for every effective layer, as
                ``HookedTransformer.state_dict()`` and :meth:`tl_parameters` give them; or this
                model's own ``state_dict()``. Weights that recurrences share must be equal.
            fold_ln, center_writing_weights: See :meth:`process_weights`; ``fold_ln=False,
                center_unembed=False`` shows the weights as they are.
            center_unembed, fold_value_biases: See there.
            refactor_factored_attn_matrices: Not supported.

        Raises:
            InputError: the state dict does not fit, and then no weight is changed; see
                ``tl_looped.transformer.state_dicts``. Or as :meth:`process_weights`.
        """
        asked = Processing(
            fold_ln,
            center_writing_weights,
            center_unembed,
            fold_value_biases,
            refactor_factored_attn_matrices,
        )
        asked.check(self.cfg)
        state_dicts.load(self, state_dict)
        asked.apply(self)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in PyTorch, of the model's own names; see :meth:`load_and_process_state_dict`.

        Raises:
            InputError: there are TransformerLens's names, which would be passed over.
        """
        state_dicts.refuse_other_names(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def fill_missing_keys(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict under TransformerLens's names, with the model's own for what lacks."""
        return state_dicts.fill_missing(self, state_dict)

    def fold_layer_norm(
        self,
        state_dict: dict[str, Tensor],
        fold_biases: bool = False,
        center_weights: bool = False,
    ) -> dict[str, Tensor]:
        """A state dict whose gains are multiplied into the weights behind them, and are ones.

        Args:
            state_dict: Under TransformerLens's names.
            fold_biases: Without effect: RMSNorm has none.
            center_weights: Refused. TransformerLens, where it is the default, says to turn it off
                for RMSNorm, which does not take the mean out.

        Raises:
            InputError: for that; names that are not TransformerLens's; a model whose final norm
                also stands elsewhere than before the unembedding (``loop_norm``,
                ``pre_coda_norm``).
        """
        if center_weights:
            raise InputError(
                "center_weights=True is for LayerNorm, which takes the mean out of its input; "
                "RMSNorm does not, and the weights would be those of another model"
            )
        return state_dicts.fold_gains(self.cfg, state_dict)

    def center_unembed(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict whose ``unembed.W_U`` has lost its mean over the vocabulary.

        Of the model's own: ``enable_compatibility_mode(center_unembed=True)``.
        """
        return state_dicts.center_unembedding(state_dict)

    def fold_value_biases(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict, of a model without value biases.

        Raises:
            InputError: the model has some, see ``tl_looped.transformer.processing``.
        """
        refuse_value_biases(self.cfg)
        return dict(state_dict)

    # -- small things -------------------------------------------------------------------------

    @property
    def n_params_total(self) -> int:
        """Number of all parameters, those that recurrences share once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @in_turn
    def init_weights(self) -> None:
        """Draw all weights anew, from ``cfg.seed`` as ``cfg.init_mode`` says.

        Unlike TransformerLens's, it leaves torch's global generator alone.
        """
        init_weights(self, self.cfg)
        for cfg in (self.cfg, self.cell.cfg):
            cfg.trained_recurrences = None

    def sample_datapoint(
        self,
        tokenize: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> str | Tensor:
        """A random text of ``model.dataset``, drawn by numpy's global generator.

        Args:
            tokenize: Give its tokens ``[1, pos]``, cut to the context.
            prepend_bos, padding_side: For those; see :meth:`to_tokens`.

        Raises:
            InputError: there is no dataset, or its items have no ``"text"``.
        """
        data = self.dataset
        if data is None or not hasattr(data, "__len__") or not len(data):
            raise InputError(
                "model.dataset has no text to sample: set it to a sequence of {'text': ...}, such "
                "as one of the datasets library. Looped models have none of their own"
            )
        item = data[int(np.random.randint(0, len(data)))]
        if not isinstance(item, Mapping) or not isinstance(item.get("text"), str):
            raise InputError(f"an item of model.dataset must have a 'text', got {described(item)}")
        text: str = item["text"]
        if not tokenize:
            return text
        return self.to_tokens(text, prepend_bos, padding_side, truncate=True)

    # -- what a run starts with ---------------------------------------------------------------

    @in_turn
    def input_to_embed(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Any = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """The embedding, as ``hook_embed`` leaves it, and what a run from there wants to know.

        ``self(embed, start_at_layer=0, attention_mask=mask, past_kv_cache=...)`` goes on, in models
        with a prelude: without one the loop begins before the first layer, and ``self(input)`` is
        the way. A key-value cache is left as it is: the run extends it.

        Args:
            input: As for the model; and so are the arguments below.
            prepend_bos: Overrides ``cfg.default_prepend_bos`` for text.
            padding_side: For text, or for the padding of tokens.
            attention_mask: ``[batch, pos]``, zero at padding.
            past_kv_cache: Keys and values of the tokens that come before.

        Returns:
            The embedding ``[batch, pos, d_model]``; tokens ``[batch, pos]``; None in place of a
            shortformer embedding; and the mask of past and new tokens, None if there is no padding
            and TransformerLens gives none either.
        """
        return start_of_run(self, input, prepend_bos, padding_side, attention_mask, past_kv_cache)

    def get_pos_offset(self, past_kv_cache: KeyValueCache | None, batch_size: int) -> int:
        """Columns that come before new ones: those of a key-value cache, padding included.

        Args:
            past_kv_cache: Keys and values of earlier tokens, or None.
            batch_size: Rows of the new tokens.

        Raises:
            InputError: if the cache has other rows.
        """
        if past_kv_cache is None:
            return 0
        held = past_kv_cache.previous_attention_mask
        if held.numel() and len(held) != batch_size:
            raise InputError(
                f"past_kv_cache holds {len(held)} rows, the input has batch_size={batch_size}"
            )
        return held.shape[1]

    def get_residual(
        self,
        embed: Tensor,
        pos_offset: int = 0,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        tokens: Tensor | None = None,
        return_shortformer_pos_embed: bool = True,
        device: Any = None,
    ) -> Tensor | tuple[Tensor, None]:
        """The stream that begins with an embedding: itself, as in all models with rotary positions.

        Args:
            embed: The embedding ``[batch, pos, d_model]``.
            pos_offset, prepend_bos, attention_mask, tokens, device: Without meaning for them.
            return_shortformer_pos_embed: Return also what there is in place of a shortformer
                embedding, None.
        """
        return (embed, None) if return_shortformer_pos_embed else embed

    def close(self) -> None:
        """Nothing: there is no connection to a model elsewhere."""

    # -- weights of the layers that have some, as TransformerBridge asks for them ---------------

    def get_params(self) -> dict[str, Tensor]:
        """:meth:`tl_parameters`."""
        return self.tl_parameters()

    def composition_layer_indices(self) -> list[int]:
        """The layers that have attention: all effective ones."""
        return list(range(self.loop.n_layers))

    def QK_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """The layers that have attention, and :attr:`QK` of them."""
        return self.composition_layer_indices(), self.QK

    def OV_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """The layers that have attention, and :attr:`OV` of them."""
        return self.composition_layer_indices(), self.OV

    def stack_params_for(
        self,
        submodule: str,
        attr_path: str,
        reshape_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[list[int], Tensor]:
        """The effective layers that have a submodule, and a weight of each, stacked.

        Args:
            submodule: Such as ``"attn"`` or ``"ln1_post"``.
            attr_path: The weight, from the block on: ``"attn.W_Q"``, ``"ln1.w"``.
            reshape_fn: Called with each weight before they are stacked.

        Raises:
            InputError: no layer has such a part or such a weight, or the stack would take more than
                ``model.max_stack_bytes``.
        """
        found = self.blocks_with(submodule)
        if not found:
            raise InputError(
                f"no layer has a submodule {submodule!r}: they have {self.block_submodules(0)}"
            )
        shown = [self._weight_of(i, block, attr_path) for i, block in found]
        size = sum(weight.numel() * weight.element_size() for weight in shown)
        if size > self.max_stack_bytes:
            raise InputError(
                f"{attr_path} of {len(shown)} layers would take {size / 2**30:.2f} GiB, more than "
                f"model.max_stack_bytes ({self.max_stack_bytes / 2**30:.2f} GiB)"
            )
        if reshape_fn is not None:
            shown = [reshape_fn(weight) for weight in shown]
        return [i for i, _ in found], torch.stack([w.to(shown[0].device) for w in shown])

    def _weight_of(self, i: int, block: Block, attr_path: str) -> Tensor:
        try:
            weight = attrgetter(attr_path)(block)
        except AttributeError:
            weight = None
        if not isinstance(weight, Tensor):
            raise InputError(
                f"blocks[{i}] has no weight {attr_path!r}: give its path from the block on, such "
                "as 'attn.W_Q' or 'ln1.w'"
            )
        return weight


def _refused(name: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedMethodError(f"{name}: {reason}")

    refuse.__name__, refuse.__doc__ = name, f"Refused: {reason}."
    refuse.__qualname__ = f"TransformerLensMethods.{name}"
    return refuse


for _name, _reason in REFUSED.items():
    setattr(TransformerLensMethods, _name, _refused(_name, _reason))


def _target(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.device | None, torch.dtype | None]:
    """What the arguments of ``to`` ask for, checked."""
    try:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError, ValueError) as error:
        given = ", ".join(described(value) for value in (*args, *kwargs.values())) or "nothing"
        raise ArgumentTypeError(
            f"to() takes a device such as 'cpu', 'cuda:0' or torch.device('cuda'), a dtype such as "
            f"torch.bfloat16, or a tensor, got {given}"
        ) from error
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"weights must have a floating point dtype, got {dtype}")
    if device is not None:
        check_devices([device], "to()")
        warn_if_mps(device)
    return device, dtype
