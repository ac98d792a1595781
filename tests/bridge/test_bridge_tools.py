"""TransformerLens's tools for bridges, unmodified, on bridges of looped models."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_rounded_once, assert_same
from conftest import VARIANTS, exact_config
from refusals import refused
from test_attribution import NOT_A_SUM, edge_methods
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import logit_lens
from transformer_lens.tools.analysis.jacobian_lens import JacobianLens
from transformers import PreTrainedTokenizerFast

from tl_looped import (
    ConfigError,
    InvalidDecompositionError,
    LoopedTransformer,
)
from tl_looped.boot import enable_boot_transformers

PROMPT = "1 2 3 4 5 6 7"

pytestmark = pytest.mark.usefixtures("exact_bridges")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Numbers from 0 to 48 as tokens, and one to end a text."""
    words = models.WordLevel({str(i): i for i in range(49)} | {"<end>": 49}, unk_token="0")
    numbers = Tokenizer(words)
    numbers.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=numbers, eos_token="<end>", unk_token="0")


@pytest.fixture(scope="module")
def demo() -> LoopedTransformer:
    return LoopedTransformer.from_pretrained("demo", device="cpu")


def small(variant: str, tokenizer: Any, **changes: Any) -> LoopedTransformer:
    """Eight dimensions: a Jacobian by brute force takes a moment."""
    size = {"d_model": 8, "d_head": 4, "n_heads": 2, "d_mlp": 12, "n_recurrences": 2}
    values = VARIANTS[variant] | size | changes
    if "n_key_value_heads" in values:
        values["n_key_value_heads"] = 1
    return LoopedTransformer.from_config(exact_config(**values), tokenizer)


def fit(model: LoopedTransformer, **options: Any) -> JacobianLens:
    settings = {"corpus": "count", "skip_first_positions": 1, "show_progress": False}
    return JacobianLens.fit(model.to_bridge(), [PROMPT], **(settings | options))


# -- Jacobian lens --------------------------------------------------------------------------------


def jacobian_by_hand(model: LoopedTransformer, layer: int) -> Tensor:
    """Mean over source positions of the summed Jacobian of the last layer's output, in fp64."""
    tokens, last = model.to_tokens(PROMPT), model.loop.n_layers - 1
    at, end = f"blocks.{layer}.hook_resid_post", f"blocks.{last}.hook_resid_post"
    seen: dict[str, Tensor] = {}

    def output(delta: Tensor) -> Tensor:
        hooks = [
            (at, lambda value, hook: value + delta),
            (end, lambda value, hook: seen.update(end=value)),
        ]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        return seen["end"][0]

    start = torch.zeros(tokens.shape[1], model.cfg.d_model, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(output, start)  # [target, d, source, d]
    valid = slice(1, tokens.shape[1] - 1)
    return full[valid, :, valid].sum(0).mean(1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_jacobian_lens_holds_the_models_jacobians(variant: str, tokenizer: Any) -> None:
    model = small(variant, tokenizer)
    lens = fit(model)
    assert lens.source_layers == list(range(model.loop.n_layers - 1))
    for layer in lens.source_layers:
        # TransformerLens keeps Jacobians in fp32.
        assert_rounded_once(lens.jacobians[layer], jacobian_by_hand(model, layer))


def test_where_blocks_write_nothing_the_jacobian_is_a_power_of_the_injection(
    tokenizer: Any,
) -> None:
    model = small("pre-injection", tokenizer, n_recurrences=4)
    with torch.no_grad():
        for layer in (*model.prelude, *model.core, *model.coda):
            layer.attn.out.zero_()
            layer.mlp.down.zero_()
    state, prelude = model.injection.weight.detach().split(model.cfg.d_model, 1)
    powers = [torch.linalg.matrix_power(state, n) for n in range(4)]
    lens = fit(model)
    for r in range(4):
        for layer in range(model.loop.k):
            found = lens.jacobians[model.loop.index(r, layer)]
            assert_rounded_once(found, powers[3 - r])
    # The prelude's output reaches the end by every recurrence, and not by the random state.
    expected = sum(power @ prelude for power in powers)
    assert_rounded_once(lens.jacobians[1], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_readout_is_the_head_after_the_jacobian(variant: str, tokenizer: Any) -> None:
    model = small(variant, tokenizer)
    lens, bridge = fit(model), model.to_bridge()
    last = model.loop.n_layers - 1
    tokens = model.to_tokens("9 8 7 6 5")
    readout = lens.readout(bridge, "9 8 7 6 5", layers=[2, last], return_full_logits=True)
    logits, cache = model.run_with_cache(tokens)
    assert_rounded_once(readout.lens_logits[last], logits[0])
    through = cache["resid_post", 2][0] @ lens.jacobians[2].double().T
    expected = model.unembed(model.ln_final(through[None]))[0].detach()
    assert_rounded_once(readout.lens_logits[2], expected)


def test_a_lens_refuses_another_number_of_recurrences_and_frees_the_parameters(
    tokenizer: Any,
) -> None:
    model = small("pre-injection", tokenizer)
    lens = fit(model, source_layers=[2])
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="targets layer 8"):
        lens.readout(model.to_bridge(3), PROMPT)


# -- other tools ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logit_lens_reads_the_stream_through_the_models_head(variant: str, tokenizer: Any) -> None:
    model = small(variant, tokenizer)
    result = logit_lens(model.to_bridge(), PROMPT)
    _, cache = model.run_with_cache(model.to_tokens(PROMPT))
    streams = cache.accumulated_resid(model.loop.n_layers)
    expected = model.unembed(model.ln_final(streams[:, :, -1])).detach()
    assert_same(result.readout.values, expected)


def test_text_is_read_and_written_as_by_the_model(demo: LoopedTransformer) -> None:
    bridge, text = demo.to_bridge(8), "Tom has 3 boxes with 12 pens each."
    assert torch.equal(bridge.to_tokens(text), demo.to_tokens(text))
    options = {"max_new_tokens": 8, "do_sample": False, "verbose": False}
    with demo.with_recurrences(8):
        expected = demo.generate(text, **options)
    assert bridge.generate(text, **options) == expected
    assert expected.startswith(text)
    assert len(expected) > len(text)


def test_a_bridges_tokenizer_is_a_copy(tokenizer: Any) -> None:
    model = small("pre", tokenizer)
    bridge = model.to_bridge()
    assert bridge.tokenizer.pad_token == "<end>"
    assert model.tokenizer.pad_token is None
    assert bridge.to_tokens(PROMPT).tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert small("pre", None).to_bridge().tokenizer is None


def test_a_plain_models_stream_is_the_sum_of_its_writes(tokens: Tensor) -> None:
    model = small("pre", None)
    _, cache = model.to_bridge().run_with_cache(tokens)
    parts = cache.decompose_resid(apply_ln=False).sum(0)
    last = cache["resid_post", model.loop.n_layers - 1]
    assert_same(parts, last)
    assert torch.equal(cache["resid_post", (1, 2)], cache["blocks.7.hook_out"])


@pytest.mark.full
@pytest.mark.parametrize("kind", NOT_A_SUM)
def test_sums_of_writes_and_edge_methods_refuse_models_that_rescale_writes(
    kind: str, tokens: Tensor
) -> None:
    values = VARIANTS.get(kind, {}) | NOT_A_SUM[kind] | {"n_key_value_heads": None}
    bridge = LoopedTransformer.from_config(exact_config(**values)).to_bridge()
    for method in edge_methods(bridge).values():
        with pytest.raises(ValueError, match="normalized or scaled before the residual add"):
            method()
    if kind in ("post-qk-norm", "post"):
        return  # a post-norm's output is what is added, so layers and sublayers add up
    _, cache = bridge.run_with_cache(tokens)
    for name in ("decompose_resid", "stack_head_results", "get_full_resid_decomposition"):
        with refused(InvalidDecompositionError, name):
            getattr(cache, name)()


def test_a_direct_path_on_a_plain_bridge_is_the_models() -> None:
    changes = {"n_prelude": 1, "n_core": 2, "n_recurrences": 2}
    model = LoopedTransformer.from_config(exact_config(**changes))
    found = edge_methods(model.to_bridge())["direct path"]()
    expected = edge_methods(model)["direct path"]()
    assert_rounded_once(found, expected.double())
    assert expected.unique().numel() > 4


def test_weights_cannot_be_processed() -> None:
    bridge = small("pre", None).to_bridge()
    for method in (bridge.process_weights, bridge.enable_compatibility_mode):
        with refused(InvalidDecompositionError, "one weight serves"):
            method()


# -- TransformerLens's own ways to a bridge -------------------------------------------------------


def test_the_entry_point_announces_the_adapter() -> None:
    (entry,) = entry_points(group="transformer_lens.architectures", name="LoopedForCausalLM")
    adapter = entry.load()
    bridge = small("pre", None).to_bridge()
    assert type(bridge.adapter) is adapter


@pytest.mark.full
@pytest.mark.once
def test_importing_the_package_loads_no_bridge() -> None:
    code = "import sys, tl_looped; print('transformer_lens.model_bridge' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    small("residual-injection", tokenizer, model_name="counter").save_pretrained(tmp_path)
    return tmp_path


def boot(folder: Path, **options: Any) -> TransformerBridge:
    enable_boot_transformers()
    return TransformerBridge.boot_transformers(str(folder), device="cpu", **options)


def test_boot_transformers_loads_a_saved_folder(folder: Path, tokens: Tensor) -> None:
    assert boot(folder)(tokens).dtype == torch.float32
    model = LoopedTransformer.from_pretrained(folder, device="cpu", dtype=torch.float64)
    bridge = boot(folder, dtype=torch.float64)
    assert_same(bridge(tokens), model(tokens))
    assert torch.equal(bridge.to_tokens(PROMPT, prepend_bos=False), model.to_tokens(PROMPT))
    with refused(InvalidDecompositionError, "decompose_resid"):
        bridge.run_with_cache(tokens)[1].decompose_resid()
    other = boot(
        folder, dtype=torch.float64, hf_config_overrides={"n_recurrences": 3, "state_seed": 4}
    )
    expected = model(tokens, n_recurrences=3, state_seed=4)
    assert_same(other(tokens), expected)
    assert other.cfg.n_layers == len(other.blocks) == 2 + 3 * 3 + 1


def test_boot_transformers_refuses_what_would_have_no_effect(folder: Path) -> None:
    with refused(ConfigError, "rotary_base", "to_bridge()"):
        boot(folder, hf_config_overrides={"rotary_base": 7.0})
    with refused(ConfigError, "from_config"):
        boot(folder, load_weights=False)
