"""The exceptions of tl_looped: one family, so that one ``except`` clause catches them all.

Each class also inherits the built-in exception that a TransformerLens or PyTorch user would
expect in its place (an unknown hook name is a ``KeyError``, a bad argument a ``ValueError``, and
what TransformerLens asserts an ``AssertionError``).
Every message names the thing, the value that was given and the valid range or the fix.
"""

from __future__ import annotations


class TLLoopedError(Exception):
    """Base class of every error that tl_looped raises on purpose."""

    def __str__(self) -> str:
        # KeyError.__str__ shows the repr of its message, which hides line breaks.
        return str(self.args[0]) if self.args else ""


class ConfigError(TLLoopedError, ValueError):
    """A model configuration that is inconsistent or not supported."""


class CheckpointError(TLLoopedError, ValueError):
    """A checkpoint folder or file that cannot be read, or does not hold what its config says."""


class UnknownArchitectureError(CheckpointError):
    """No registered adapter recognises the checkpoint."""


class RegistryError(TLLoopedError, ValueError):
    """An adapter that cannot be registered, for instance because its name is taken."""


class LayerIndexError(TLLoopedError, KeyError, IndexError):
    """A recurrence, a layer in a stage or an effective layer outside the model's range.

    A ``KeyError`` too, as it is of a TransformerLens cache.
    """


class RecurrenceCountError(TLLoopedError, ValueError):
    """A number of recurrences that the model cannot run."""


class HookNameError(TLLoopedError, KeyError):
    """A hook name that does not exist in the model at its current number of recurrences."""


class GatedHookError(TLLoopedError, ValueError, AssertionError):
    """A hook that exists only while a configuration flag is on, used while it is off."""


class InputError(TLLoopedError, AssertionError, ValueError):
    """Tokens, text, masks, states or options that the model cannot take.

    An ``AssertionError`` too: that is how TransformerLens refuses most of them.
    """


class ArgumentTypeError(InputError, TypeError):
    """An argument of a type, a shape or a dtype that the callable's type hint excludes."""


class TokenizerError(TLLoopedError, AssertionError, ValueError):
    """Text was given to a model without a tokenizer, or text that the tokenizer cannot handle.

    An ``AssertionError`` too, as in TransformerLens.
    """


class SingleTokenError(TokenizerError, InputError, AssertionError):
    """Text that is not exactly one token, or a token that does not stand in the one sequence."""


class InvalidDecompositionError(TLLoopedError, NotImplementedError):
    """A TransformerLens analysis that assumes a plain additive residual stream."""


class UnsupportedMethodError(TLLoopedError, NotImplementedError):
    """A method of TransformerLens that looped models cannot have."""


class MissingActivationError(TLLoopedError, KeyError):
    """An activation that the cache does not hold."""


class DataError(TLLoopedError, ValueError):
    """A data file that cannot be read as what it should be."""


class DivergedError(TLLoopedError, ArithmeticError):
    """A training loss that is no number any more, or has risen far above its best."""
