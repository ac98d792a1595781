"""The call that is refused, for each name that verdicts.toml calls refused.

Each is called with an object of the name's area: a model, its cache or its config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TOKENS = torch.arange(4)[None]
IMAGE = torch.zeros(1, 3, 8, 8)
LOADED = ("checkpoint_index", "checkpoint_value", "checkpoint_label", "first_n_layers")


def loaded_with(**options: Any) -> Callable[[Any], Any]:
    return lambda model: type(model).from_pretrained("demo-control", device="meta", **options)


REFUSED: dict[str, Callable[[Any], Any]] = {
    **{f"model.from_pretrained({name})": loaded_with(**{name: 1}) for name in LOADED},
    "model.boot_transformers": lambda m: type(m).boot_transformers("gpt2"),
    "model.boot_native": lambda m: type(m).boot_native({"d_model": 8}),
    "model.boot_tl_legacy": lambda m: type(m).boot_tl_legacy("gpt2", checkpoint_index=1),
    "model.check_model_support": lambda m: type(m).check_model_support("gpt2"),
    "model.list_supported_models": lambda m: type(m).list_supported_models(),
    "model.load_sample_training_dataset": lambda m: m.load_sample_training_dataset(),
    "model.center_writing_weights": lambda m: m.center_writing_weights(m.state_dict()),
    "model.refactor_factored_attn_matrices": lambda m: m.refactor_factored_attn_matrices(
        m.state_dict()
    ),
    "model.forward(pixel_values)": lambda m: m(TOKENS, pixel_values=IMAGE),
    "model.forward(input_values)": lambda m: m(TOKENS, input_values=IMAGE),
    "model.encoder_output": lambda m: m.encoder_output(IMAGE),
    "model.prepare_multimodal_inputs": lambda m: m.prepare_multimodal_inputs("a", IMAGE),
    "model.to_sentence_pair_tokens": lambda m: m.to_sentence_pair_tokens("a", "b"),
    "model.predict_next_sentence": lambda m: m.predict_next_sentence("a", "b"),
    "model.generate(pixel_values)": lambda m: m.generate(TOKENS, pixel_values=IMAGE),
    "model.generate(forced_bos_token_id)": lambda m: m.generate(TOKENS, forced_bos_token_id=3),
    "model.generate_stream(forced_bos_token_id)": lambda m: list(
        m.generate_stream(TOKENS, forced_bos_token_id=3)
    ),
    "model.hf_generate(pixel_values)": lambda m: m.hf_generate(TOKENS, pixel_values=IMAGE),
    "model.diffusion_generate": lambda m: m.diffusion_generate(TOKENS),
}
