"""What ``generate`` and ``generate_stream`` take besides prompt and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tl_looped.checks import Seed
from tl_looped.model.exit_rules import ExitRule
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.transformer.sampling import Sampler
from tl_looped.transformer.unsupported import refuse_others


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Every option; :meth:`LoopedTransformer.generate` explains them.

    A test compares its signature with this one.
    """

    stop_at_eos: bool = True
    eos_token_id: int | Sequence[int] | None = None
    do_sample: bool = True
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 1.0
    freq_penalty: float = 0.0
    repetition_penalty: float = 1.0
    use_past_kv_cache: bool = True
    prepend_bos: bool | None = None
    padding_side: str | None = None
    return_type: str = "input"
    verbose: bool = True
    attention_mask: Any = None
    stop_strings: Any = None
    stopping_criteria: Any = None
    output_logits: bool = False
    return_dict_in_generate: bool = False
    return_cache: bool = False
    return_input_tokens: bool = False
    names_filter: Any = None
    device: Any = None
    n_recurrences: int | None = None
    initial_state: Any = None
    state_seed: Seed | None = None
    seed: int | None = None
    past_kv_cache: LoopedKeyValueCache | None = None
    exit_rule: ExitRule | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> GenerationOptions:
        """The options among the arguments of a call."""
        return cls(**{name: arguments[name] for name in OPTIONS if name in arguments})

    @classmethod
    def given(cls, method: str, options: Mapping[str, Any]) -> GenerationOptions:
        """Options that a method takes by keyword.

        Raises:
            ArgumentTypeError: for what is none; ``method`` is named.
        """
        others = {name: value for name, value in options.items() if name not in OPTIONS}
        refuse_others(method, others, OPTIONS)
        return cls.of(options)

    def sampler(self) -> Sampler:
        """How tokens are chosen."""
        return Sampler(**{field.name: getattr(self, field.name) for field in fields(Sampler)})


OPTIONS = tuple(field.name for field in fields(GenerationOptions))
"""Their names."""
