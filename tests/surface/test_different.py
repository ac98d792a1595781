"""What verdicts.toml calls different, and holds on either TransformerLens: what it does here."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from snapshots import SNAPSHOTS, snapshot
from torch import Tensor
from verdicts import verdicts

from tl_looped import ConfigError, LoopedConfig, LoopedTransformer, TLLoopedError

pytestmark = pytest.mark.once
TOKENS = torch.arange(8).reshape(2, 4)
Z = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def model() -> LoopedTransformer:
    return LoopedTransformer.from_pretrained("demo-control", device="cpu")


def small(**changes: Any) -> LoopedConfig:
    sizes = {"d_model": 16, "d_head": 4, "n_ctx": 8, "d_vocab": 11, "d_mlp": 16}
    loop = {"n_prelude": 1, "n_core": 2, "n_coda": 1, "n_recurrences": 3}
    return LoopedConfig(**{**sizes, **loop, "device": "cpu", **changes})


def order(method: str) -> list[str]:
    """Our parameters that have a place."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(getattr(LoopedTransformer, method)).parameters.values()
    return [one.name for one in found if one.kind in kinds and one.name != "self"]


def theirs(release: str, cls: str, method: str) -> list[str]:
    """Theirs."""
    member = snapshot(release)["model"][cls][method]
    return [one.name for one in member.parameters if one.kind == "positional_or_keyword"]


def test_a_model_is_made_of_its_configuration(model: LoopedTransformer) -> None:
    made = LoopedTransformer(small(d_vocab=model.cfg.d_vocab), model.tokenizer, True, "left")
    assert made.tokenizer is model.tokenizer
    assert made.tokenizer.padding_side == "left"
    assert made.W_E.device.type == "cpu"
    drawn = LoopedTransformer.from_config(small())
    assert float(drawn.W_E.detach().std()) > 0


def test_what_follows_the_name_is_given_by_keyword() -> None:
    for method in ("from_pretrained", "from_pretrained_no_processing"):
        assert order(method) == ["model_name"]
        with pytest.raises(TLLoopedError):
            getattr(LoopedTransformer, method)("demo", False)
    options: dict[str, Any] = {"default_prepend_bos": True, "default_padding_side": "left"}
    options |= {"n_ctx": 64, "n_devices": 1, "move_to_device": False, "dtype": torch.float64}
    options |= {"fold_value_biases": False, "refactor_factored_attn_matrices": False}
    loaded = LoopedTransformer.from_pretrained("demo-control", device="cpu", **options)
    assert (loaded.cfg.default_prepend_bos, loaded.cfg.n_ctx) == (True, 64)
    assert loaded.W_E.dtype is torch.float64
    assert loaded.tokenizer.padding_side == "left"


def test_a_model_is_loaded_as_it_was_trained(model: LoopedTransformer) -> None:
    given: dict[str, Any] = {"fold_ln": True, "center_unembed": True}
    given["center_writing_weights"] = True
    processed = LoopedTransformer.from_pretrained("demo-control", device="cpu", **given)
    assert not model.compatibility_mode
    assert processed.compatibility_mode
    assert float(model.W_U.detach().mean(-1).abs().max()) > 1e-3
    assert float(processed.W_U.detach().mean(-1).abs().max()) < 1e-6
    log_probs = [m(TOKENS).log_softmax(-1) for m in (model, processed)]
    torch.testing.assert_close(*log_probs)


def test_compatibility_mode_leaves_the_logits_alone(model: LoopedTransformer) -> None:
    other = LoopedTransformer.from_pretrained("demo-control", device="cpu")
    other.enable_compatibility_mode()
    assert torch.equal(other(TOKENS), model(TOKENS))
    other.enable_compatibility_mode(center_unembed=True)
    assert not torch.equal(other(TOKENS), model(TOKENS))


def test_weights_are_stored_once_under_names_of_their_own() -> None:
    model = LoopedTransformer(small())
    stored = dict(model.named_parameters())
    assert set(model.state_dict()) == set(stored)
    assert sum(p.numel() for p in model.parameters()) == model.n_params_total
    assert all("blocks" not in name for name in stored)
    assert [list(block.parameters()) for block in model.blocks] == [[]] * 8
    assert len(list(model.core[1].parameters())) == 6
    with pytest.raises(TLLoopedError):
        model.load_state_dict(model.tl_parameters())
    model.load_state_dict({name: torch.full_like(p, 0.5) for name, p in stored.items()})
    assert bool((model.blocks[3].attn.W_Q == 0.5).all())


def test_a_model_moves_without_a_word(
    model: LoopedTransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = LoopedTransformer.from_pretrained("demo-control", device="cpu")
    assert moved.to("cpu", torch.float64).W_E.dtype is torch.float64
    assert capsys.readouterr().out == ""
    moved.to(torch.float32, print_details=True)
    assert capsys.readouterr().out != ""
    assert moved.W_E.dtype is torch.float32


def test_the_arguments_of_a_run_stand_where_hooked_transformer_has_them() -> None:
    assert order("forward") == theirs("3.5.1", "HookedTransformer", "forward")
    keywords = inspect.signature(LoopedTransformer.forward).parameters
    for name in ("labels", "past_key_values"):
        assert keywords[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_what_is_given_by_place_goes_to_the_model(model: LoopedTransformer) -> None:
    loss, cache = model.run_with_cache(TOKENS, "loss", names_filter=Z)
    assert loss.shape == ()
    assert list(cache) == [Z]
    assert model.run_with_hooks(TOKENS, "loss", fwd_hooks=[]).shape == ()
    # By keyword, all of TransformerBridge's are taken.
    given: dict[str, Any] = {"return_cache_object": False, "pos_slice": -1, "incl_bwd": False}
    given |= {"reset_hooks_end": True, "clear_contexts": False, "stop_at_layer": 2}
    _, plain = model.run_with_cache(input=TOKENS, names_filter=Z, **given)
    assert plain[Z].shape[1] == 1
    stream = model(TOKENS, stop_at_layer=1)
    out = model.run_with_hooks(
        input=stream, fwd_hooks=[], bwd_hooks=[], return_type="logits", start_at_layer=1
    )
    torch.testing.assert_close(out, model(TOKENS))


def test_the_function_of_a_hook_is_called_hook(model: LoopedTransformer) -> None:
    seen: list[Tensor] = []

    def look(value: Tensor, hook: Any) -> None:
        seen.append(value)

    model.add_hook(Z, look)
    model.add_perma_hook(name=Z, hook=look)
    model(TOKENS)
    assert len(seen) == 2
    with pytest.raises(TypeError):
        model.add_hook(Z, hook_fn=look)
    model.reset_hooks(including_permanent=True)


def test_what_follows_freq_penalty_is_given_by_keyword() -> None:
    assert [release[0] for release in SNAPSHOTS] == ["3", "4"]
    for method in ("generate", "generate_stream"):
        three = theirs("3.5.1", "HookedTransformer", method)
        four = theirs("4.3.0", "TransformerBridge", method)
        ours = order(method)
        assert ours == three[: len(ours)] == four[: len(ours)]
        assert three[len(ours)] != four[len(ours)]


def test_a_state_dict_is_that_of_the_module(model: LoopedTransformer) -> None:
    state = model.state_dict(prefix="model.", keep_vars=True)
    assert state["model.embed.W_E"] is model.embed.W_E


# -- the configuration ------------------------------------------------------------------------


def test_a_configuration_is_of_a_looped_model() -> None:
    cfg = small()
    assert cfg.n_layers == 1 + 2 * 3 + 1
    assert (cfg.architecture, cfg.original_architecture) == ("looped", None)
    assert (cfg.default_prepend_bos, cfg.seed) == (None, 0)
    assert (cfg.normalization_type, cfg.act_fn) == ("RMS", "silu")
    before = torch.get_rng_state()
    LoopedTransformer.from_config(cfg)
    assert torch.equal(torch.get_rng_state(), before)


def fixed() -> list[str]:
    test = "test_another_value_of_a_fixed_field_is_refused"
    return [one.name.member for one in verdicts().values() if one.test.endswith(test)]


@pytest.mark.parametrize("field", fixed())
def test_another_value_of_a_fixed_field_is_refused(model: LoopedTransformer, field: str) -> None:
    value = getattr(model.cfg, field)
    others: list[Any] = [not value] if isinstance(value, bool) else ["other", 3, 7.5]
    for other in others:
        with pytest.raises(ConfigError, match=field):
            setattr(model.cfg, field, other)
    assert getattr(model.cfg, field) == value
