"""The storey of TransformerLens's methods that are neither about hooks nor about text or loops.

They move the model, process and load weights. What TransformerLens has and a looped model has not
is refused by name: see :data:`REFUSED`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_looped._compat import warn_if_mps
from tl_looped.checks import checked, described
from tl_looped.errors import ArgumentTypeError, InputError
from tl_looped.transformer.hooked_loop import HookedLoop
from tl_looped.transformer.processing import Processing
from tl_looped.transformer.spreading import check_devices

if TYPE_CHECKING:
    from typing_extensions import Self


@checked
class TransformerLensMethods(HookedLoop):
    """Methods of HookedTransformer and TransformerBridge, beside hooks, text and generation.

    Attributes:
        home_device: Where ``from_pretrained`` was asked to load the weights; None if it was not.
    """

    home_device: torch.device | None = None

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
        return self

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        """Move the model to a GPU, the current one if None; see :meth:`to`."""
        return self.to(
            torch.device("cuda", device) if isinstance(device, int) else device or "cuda"
        )

    def cpu(self) -> Self:
        """Move the model to the CPU; see :meth:`to`."""
        return self.to(torch.device("cpu"))

    def mps(self) -> Self:
        """Move the model to Apple's GPU, with TransformerLens's warning; see :meth:`to`."""
        return self.to(torch.device("mps"))

    def move_model_modules_to_device(self) -> None:
        """Move the weights to where ``from_pretrained(move_to_device=False)`` was asked to load
        them; a model that is there, or that was not loaded so, stays where it is.
        """
        if self.cfg.n_devices == 1 and self.home_device is not None:
            self.to(self.home_device)

    # -- what the weights are shown as --------------------------------------------------------

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
