"""Values of a ``config.json``: rotary embeddings in every spelling, nulls, numbers out of range."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, TOLERANCE, load_golden
from feedforwards import LLAMA3_ROPE, feedforward
from rawcheckpoints import load_changed, raw_config, read_config
from refusals import refused
from transformers import LlamaConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tl_looped import ConfigError, LoopedConfig, LoopedTransformer, retrofit
from tl_looped.adapters import get_adapter
from tl_looped.bridge.feedforward import load_feedforward
from tl_looped.model.rotary import inverse_frequencies

pytestmark = pytest.mark.every_family

GONE = ("rope_theta", "rope_scaling", "rope_base")
LLAMA3 = raw_config("retrofit_llama")["rope_scaling"]
THETA = {"huginn": "rope_base"}


def theta_of(case: str) -> Any:
    return raw_config(case)[THETA.get(case, "rope_theta")]


def moved(case: str) -> dict[str, Any]:
    """What ``rope_parameters`` holds of a golden config."""
    scaling = raw_config(case).get("rope_scaling") or {"rope_type": "default"}
    return {**scaling, "rope_theta": theta_of(case)}


def assert_golden(model: LoopedTransformer, case: str) -> None:
    golden = load_golden(case)
    torch.testing.assert_close(
        model(golden.tokens, **golden.run), golden.tensors["logits"], **TOLERANCE
    )


# -- rotary embeddings ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beside", ["alone", "rope_theta", "everything"])
def test_rope_parameters_give_the_golden_logits(case: str, beside: str, tmp_path: Path) -> None:
    kept = {"alone": (), "rope_theta": (THETA.get(case, "rope_theta"),), "everything": GONE}[beside]
    raw = raw_config(case)
    # Huginn's own code reads rope_base; in the retrofits that is a stale number of another model.
    dropped = dict.fromkeys((key for key in GONE if key in raw and key not in kept), None)
    model = load_changed(case, tmp_path, **dropped, rope_parameters=moved(case))
    assert model.cfg.to_json() == read_config(case).to_json() | {"model_name": tmp_path.name}
    assert_golden(model, case)


@pytest.mark.parametrize("case", ["retrofit_llama", "retrofit_tinyllama", "retrofit_olmo", "ouro"])
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_a_config_that_transformers_5_saved_again_is_read(case: str, tmp_path: Path) -> None:
    class Resaved(PretrainedConfig):
        def __init__(self, max_position_embeddings=0, rope_theta=0, rope_scaling=None, **kw):  # type: ignore[no-untyped-def]
            self.max_position_embeddings = max_position_embeddings
            self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
            super().__init__(**kw)

    raw = raw_config(case)
    written = json.loads(Resaved.from_dict(raw_config(case)).to_json_string())
    assert written["rope_parameters"] == moved(case)
    assert "rope_scaling" not in written
    changed = dict.fromkeys(raw, None) | written | {"model_type": raw["model_type"]}
    assert_golden(load_changed(case, tmp_path, **changed), case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_types_are_refused_by_name(case: str, key: str) -> None:
    for kind in ("yarn", "longrope", "dynamic", "linear", "su", "proportional"):
        for spelling in ("rope_type", "type"):
            asked = {spelling: kind, "factor": 4.0, "rope_theta": theta_of(case)}
            with refused(ConfigError, key, repr(kind)):
                read_config(case, **{key: asked})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_the_default_type_is_no_scaling(case: str, key: str) -> None:
    for nothing in (None, {}, {"rope_type": "default"}, {"type": "default"}, {"rope_type": None}):
        cfg = read_config(case, **{"rope_scaling": None} | {key: nothing})
        assert (cfg.rope_scaling, cfg.rotary_base) == (None, theta_of(case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_two_thetas_are_refused_with_both(case: str, key: str) -> None:
    with refused(ConfigError, repr(theta_of(case)), "12345.0", f"{key}.rope_theta"):
        read_config(case, **{key: {"rope_type": "default", "rope_theta": 12345.0}})


def test_two_scalings_are_refused_with_both() -> None:
    other = LLAMA3 | {"factor": 8.0}
    for second in (other, {"rope_type": "default"}):
        with refused(ConfigError, "rope_scaling=", "rope_parameters=", "'factor': 32.0"):
            read_config("retrofit_llama", rope_parameters=second)
    with refused(ConfigError, "'yarn'"):
        read_config("retrofit_llama", rope_parameters={"rope_type": "yarn"})
    with refused(ConfigError, "rope_scaling.rope_type='llama3'", "rope_scaling.type='default'"):
        read_config("retrofit_llama", rope_scaling=LLAMA3 | {"type": "default"})
    with refused(ConfigError, "rope_base=50000", "rope_theta=7.0"):
        read_config("huginn", rope_theta=7.0)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("llama3", "must be an object or null, got 'llama3'"),
        ([], "got []"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ({"rope_type": "default", "factor": 4.0}, "'factor': 4.0"),
        ({**LLAMA3, "attention_factor": 2.0}, "'attention_factor': 2.0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_type": ["yarn"]}, "['yarn']"),
    ],
)
def test_what_no_model_reads_in_a_scaling_is_refused(value: Any, part: str) -> None:
    with refused(ConfigError, part):
        read_config("ouro", rope_parameters=value)
    with refused(ConfigError, "partial_rotary_factor=0.5"):
        read_config("ouro", partial_rotary_factor=0.5)


def test_ouro_with_llama3_has_transformers_frequencies() -> None:
    cfg = read_config("ouro", rope_parameters=LLAMA3 | {"rope_theta": 1e6})
    theirs = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    theirs.rope_parameters = LLAMA3 | {"rope_theta": 1e6}
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](theirs)
    assert factor == 1.0
    torch.testing.assert_close(inverse_frequencies(cfg), expected, rtol=1e-6, atol=0)
    assert not torch.equal(inverse_frequencies(cfg), inverse_frequencies(read_config("ouro")))


def test_huginn_has_no_scaling() -> None:
    with refused(ConfigError, "Huginn", "llama3"):
        read_config("huginn", rope_scaling=LLAMA3)


@pytest.mark.parametrize("key", ["rope_theta", "rope_base"])
def test_theta_that_is_nowhere_is_missing(key: str) -> None:
    case = "huginn" if key == "rope_base" else "ouro"
    raw = raw_config(case)
    del raw[key]
    with refused(ConfigError, f"lacks ['{key}']"):
        get_adapter(case).config(raw)


def feedforward_folder(folder: Path, **changes: Any) -> Path:
    feedforward("llama-grouped-scaled-rope").save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 7.0},
        {"rope_scaling": {**LLAMA3_ROPE, "factor": 8.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
    ],
)
def test_feedforward_doors_refuse_contradictions(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = feedforward_folder(tmp_path, **changes)
    with refused(ConfigError, "contradicts itself", "rope_parameters"):
        retrofit(folder, core=[3, 4], device="cpu")
    with refused(ConfigError, "contradicts itself", "rope_parameters"):
        load_feedforward(folder, "cpu", torch.float32)


def test_feedforward_door_reads_both_spellings_alike(tmp_path: Path) -> None:
    new = retrofit(feedforward_folder(tmp_path / "new"), core=[3, 4], device="cpu")
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old_keys = {"rope_theta": 500000.0, "rope_scaling": scaling, "rope_parameters": None}
    old = retrofit(feedforward_folder(tmp_path / "old", **old_keys), core=[3, 4], device="cpu")
    for model in (new, old):
        assert (model.cfg.rotary_base, model.cfg.rope_scaling) == (500000.0, scaling)


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_feedforward_door_refuses_other_types(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    folder = feedforward_folder(tmp_path, rope_parameters=rope)
    with refused(ConfigError, repr(kind)):
        retrofit(folder, core=[3, 4], device="cpu")


# -- harmless spellings -----------------------------------------------------------------------

SWITCHES: dict[str, tuple[str, ...]] = {
    "ouro": (
        "hidden_act", "use_sliding_window", "sliding_window", "rope_scaling", "attention_bias",
        "layer_types", "early_exit_step", "early_exit_threshold", "tie_word_embeddings",
        "head_dim", "quantization_config",
    ),
    "huginn": (
        "injection_type", "nonlin_name", "bias", "test_time_noise", "test_time_noise_type",
        "state_init", "padded_vocab_size", "initial_state_mode", "qk_bias", "head_dim",
        "num_key_value_heads", "tie_word_embeddings", "rope_scaling", "rope_theta",
    ),
}  # fmt: skip
SWITCHES |= dict.fromkeys(
    ("retrofit_llama", "retrofit_tinyllama", "retrofit_olmo"),
    (
        "injection_type", "nonlin_name", "bias", "test_time_noise", "state_init",
        "padded_vocab_size", "initial_state_mode", "head_dim", "tie_embeddings",
        "tie_word_embeddings", "rope_parameters", "source_layers",
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_null_is_the_neutral_value_of_every_switch(case: str, tmp_path: Path) -> None:
    nothing = dict.fromkeys(SWITCHES[case], None)
    assert read_config(case, **nothing).to_json() == read_config(case).to_json()
    assert_golden(load_changed(case, tmp_path, **nothing), case)


def test_two_keys_for_the_tied_matrix_must_agree() -> None:
    assert read_config("huginn", tie_word_embeddings=True).tie_embeddings is True
    with refused(ConfigError, "tie_embeddings=True", "tie_word_embeddings=False"):
        read_config("huginn", tie_word_embeddings=False)


# -- Ouro's exits -----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_exit_step_is_refused_with_what_gives_its_logits(step: int, tmp_path: Path) -> None:
    with refused(ConfigError, f"early_exit_step={step}", f"n_recurrences={step + 1}"):
        load_changed("ouro", tmp_path, early_exit_step=step)
    golden = load_golden("ouro")
    logits = golden.load(n_recurrences=step + 1)(golden.tokens)
    torch.testing.assert_close(logits, golden.tensors[f"exit_logits.{step}"], **TOLERANCE)


@pytest.mark.parametrize("step", [None, 3, 4, 99, -1])
def test_an_exit_step_that_changes_nothing_is_harmless(step: Any, tmp_path: Path) -> None:
    assert_golden(load_changed("ouro", tmp_path, early_exit_step=step), "ouro")


@pytest.mark.parametrize("step", [True, "1", 1.0, [1]])
def test_an_exit_step_that_is_no_integer_is_refused(step: Any) -> None:
    with refused(ConfigError, "early_exit_step", repr(step)):
        read_config("ouro", early_exit_step=step)


@pytest.mark.parametrize(
    "types", [["sliding_attention"] * 3, ["full_attention", "chunked_attention"], "full_attention"]
)
def test_layers_of_other_attention_are_refused(types: Any) -> None:
    with refused(ConfigError, "layer_types", repr(types)):
        read_config("ouro", layer_types=types)


# -- numbers ----------------------------------------------------------------------------------

NO_NUMBERS = [math.nan, math.inf, -math.inf, -1.0, True, "1", None, [1.0], 10**400]
FIELDS = ("eps", "rotary_base", "initial_state_std", "embed_scale", "exit_threshold")
SIZES = {"d_model": 8, "d_head": 4, "n_heads": 2, "d_mlp": 8, "d_vocab": 9, "n_ctx": 8, "n_core": 1}


def validated(**fields: Any) -> LoopedConfig:
    """A config that is given these values behind the type checks that tests switch on."""
    cfg = LoopedConfig(**SIZES)
    for name, value in fields.items():
        setattr(cfg, name, value)
    cfg.__post_init__()
    return cfg


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("field", [*FIELDS, "initializer_range"])
def test_a_field_that_is_no_finite_number_is_refused(field: str, value: Any) -> None:
    with refused(ConfigError, field, repr(value)):
        validated(**{field: value})


@pytest.mark.parametrize("theta", [0, 0.0, 0.5, 1e39])
def test_a_theta_that_gives_no_frequencies_is_refused(theta: Any) -> None:
    with refused(ConfigError, "rotary_base", repr(theta)):
        validated(rotary_base=theta)
    assert type(validated(rotary_base=10000).rotary_base) is float


@pytest.mark.parametrize(
    "change",
    [
        *({"factor": value} for value in (0, 0.5, *NO_NUMBERS)),
        *({"low_freq_factor": value} for value in (0, 4.0, 5.0, *NO_NUMBERS)),
        *({"high_freq_factor": value} for value in (0, 1.0, 0.5, *NO_NUMBERS)),
        *({"original_max_position_embeddings": value} for value in (0, *NO_NUMBERS)),
        {"rope_theta": 1e4},
        {"rope_type": "yarn"},
        {"rope_type": None},
    ],
    ids=lambda change: "".join(f"{key}={value}"[:40] for key, value in change.items()),
)
def test_nonsense_of_the_llama3_scaling_is_refused(change: dict[str, Any]) -> None:
    with refused(ConfigError, "rope_scaling"):
        validated(rope_scaling=LLAMA3 | change)
    assert validated(rope_scaling=dict(LLAMA3)).rope_scaling == LLAMA3
    assert validated(rope_scaling={"rope_type": "default"}).rope_scaling is None


@pytest.mark.parametrize("case", CASES)
def test_every_door_has_the_ranges(case: str, tmp_path: Path) -> None:
    key = THETA.get(case, "rope_theta")
    eps = "rms_norm_eps" if case == "ouro" else "norm_eps"
    for value in (0, math.inf, math.nan, -5.0, "10000", True, [1]):
        with pytest.raises(ConfigError, match="rotary_base"):
            load_changed(case, tmp_path, **{key: value})
        with pytest.raises(ConfigError, match="eps"):
            load_changed(case, tmp_path, **{eps: value or math.inf})


@pytest.mark.parametrize("value", [0, 1, "false", "true", [], 0.0, None])
@pytest.mark.parametrize("field", ["exit_gate", "qk_bias", "qk_norm", "tie_embeddings"])
def test_a_switch_that_is_no_bool_is_refused(field: str, value: Any) -> None:
    with refused(ConfigError, field, repr(value)):
        validated(**{field: value})


def test_a_switch_of_a_checkpoint_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tie_embeddings"):
        load_changed("ouro", tmp_path, tie_word_embeddings="false")
