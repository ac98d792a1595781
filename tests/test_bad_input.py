"""Bad input: every refusal is a TLLoopedError that names the thing and the way out."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, GOLDEN, Golden, load_golden, random_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import tl_looped
from tl_looped import (
    CheckpointError,
    ConfigError,
    GatedHookError,
    HookNameError,
    InitialState,
    Injection,
    InputError,
    LayerIndexError,
    LoopedConfig,
    LoopedTransformer,
    MissingActivationError,
    RecurrenceCountError,
    TLLoopedError,
    TokenizerError,
    UnknownArchitectureError,
)
from tl_looped.adapters import all_aliases

FAMILY = {
    "ConfigError": ValueError,
    "CheckpointError": ValueError,
    "UnknownArchitectureError": ValueError,
    "RegistryError": ValueError,
    "LayerIndexError": IndexError,
    "RecurrenceCountError": ValueError,
    "HookNameError": KeyError,
    "GatedHookError": ValueError,
    "InputError": ValueError,
    "TokenizerError": ValueError,
    "InvalidDecompositionError": NotImplementedError,
    "MissingActivationError": KeyError,
    "DataError": ValueError,
}


def test_every_error_is_of_one_family_and_a_fitting_built_in() -> None:
    errors = {name for name in tl_looped.__all__ if name.endswith("Error")}
    assert errors == {"TLLoopedError", *FAMILY}
    for name, built_in in FAMILY.items():
        error = getattr(tl_looped, name)
        assert issubclass(error, TLLoopedError)
        assert issubclass(error, built_in)
        assert str(error("two\nlines")) == "two\nlines"


@contextmanager
def refused(kind: type[TLLoopedError], *parts: str) -> Iterator[None]:
    with pytest.raises(TLLoopedError) as caught:
        yield
    assert type(caught.value) is kind
    assert isinstance(caught.value, FAMILY[kind.__name__])
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the Ouro checkpoint."""
    made = tmp_path / "model"
    made.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "ouro" / file, made)
    return made


@pytest.fixture(scope="module")
def plain() -> LoopedTransformer:
    """(2, 3 x 4, 1) without injection."""
    return LoopedTransformer.from_config(random_config())


@pytest.fixture(scope="module")
def injected() -> LoopedTransformer:
    return LoopedTransformer.from_config(random_config(injection=Injection.LINEAR))


def load(folder: Path | str, **kwargs: Any) -> LoopedTransformer:
    return LoopedTransformer.from_pretrained(folder, device="cpu", **kwargs)


def change_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))


# -- checkpoints ------------------------------------------------------------------------------


def test_all_wrong_tensors_are_listed_at_once(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(95, 64)
    tensors["lm_head.weight"] = torch.zeros(97, 63)
    tensors["model.rotary.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors")
    with refused(
        CheckpointError,
        "a ouro model",
        "missing: model.norm.weight [64]",
        "missing: model.layers.1.self_attn.k_proj.weight [32, 64]",
        "shape: model.layers.0.mlp.up_proj.weight is [95, 64], expected [96, 64]",
        "shape: lm_head.weight is [97, 63], expected [97, 64]",
        "unexpected: model.rotary.inv_freq [8]",
    ):
        load(folder)


def test_wrong_shape_behind_an_index_is_refused(tmp_path: Path) -> None:
    made = shutil.copytree(GOLDEN / "huginn", tmp_path / "model")
    tensors = load_file(made / "model.safetensors")
    name = "transformer.coda.1.attn.qk_bias"
    save_file(tensors | {name: torch.zeros(2, 1, 4, 15)}, made / "model.safetensors")
    with refused(CheckpointError, f"{name} is [2, 1, 4, 15]", "[4, 16]"):
        load(made)


def test_unknown_architecture_lists_the_known_ones(folder: Path) -> None:
    change_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    known = ("huginn", "ouro", "retrofit-llama", "retrofit-olmo", "tl_looped", "register_adapter")
    with refused(UnknownArchitectureError, "'gpt2'", "GPT2LMHeadModel", *known):
        load(folder)


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_opened(folder: Path, name: str, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    load(folder)
    (folder / "model.safetensors").unlink()
    with refused(CheckpointError, name, "Convert them to safetensors"):
        load(folder)
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(CheckpointError, name):
        load(folder)
    assert not sprung.exists()
    pickle.loads((folder / name).read_bytes())
    assert sprung.exists()  # the trap works


def test_code_of_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (folder / "evil.py").write_text(f"open({str(sprung)!r}, 'w')\nclass Any: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    change_config(folder, auto_map=dict.fromkeys(classes, "evil.Any"))
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    slow = {"tokenizer_class": "Any", "auto_map": {"AutoTokenizer": ["evil.Any", "evil.Any"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(slow))
    model = load(folder)
    assert model.to_tokens("a").tolist() == [[0]]
    model(torch.tensor([[0, 1]]))
    assert not sprung.exists()


@pytest.mark.parametrize("kept", [0, 7, 5000, -1])
def test_truncated_safetensors_is_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with refused(CheckpointError, str(path), "truncated"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        ('{"weight_map": {"a": "../model.safetensors"}}', ["outside", "../model.safetensors"]),
        ('{"weight_map": {"a": "/etc/passwd"}}', ["outside", "/etc/passwd"]),
        ('{"weight_map": {"a": "sub/model.safetensors"}}', ["outside", "sub/model.safetensors"]),
        ('{"weight_map": {"a": ".."}}', ["'..'"]),
        ('{"weight_map": {"a": 3}}', ["outside", "3"]),
        ('{"weight_map": {"a": "model-2.safetensors"}}', ["lacks", "model-2.safetensors"]),
        ('{"weight_map": ["a"]}', ["not a safetensors index"]),
        ("[]", ["not a safetensors index"]),
        ("{}", ["not a safetensors index", "weight_map"]),
        ("{", ["not a safetensors index"]),
        (b"\xff\xfe{}", ["not a safetensors index"]),
    ],
)
def test_bad_index_is_refused(folder: Path, index: str | bytes, parts: list[str]) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_bytes(index.encode() if isinstance(index, str) else index)
    with refused(CheckpointError, *parts):
        load(folder)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_config_that_is_no_object_is_refused(folder: Path, text: bytes, part: str) -> None:
    (folder / "config.json").write_bytes(text)
    with refused(CheckpointError, str(folder / "config.json"), part):
        load(folder)


def test_all_missing_keys_are_named(folder: Path) -> None:
    change_config(folder, hidden_size=..., vocab_size=...)
    with refused(ConfigError, "['hidden_size', 'vocab_size']"):
        load(folder)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("huginn", {"n_embd": "64"}),
        ("huginn", {"n_embd": -64}),
        ("huginn", {"init_values": None}),
        ("huginn", {"norm_eps": "1e-6"}),
        ("huginn", {"n_layers_in_prelude": "2"}),
        ("huginn", {"mean_recurrence": None}),
        ("retrofit_llama", {"rope_theta": None}),
        ("retrofit_llama", {"rope_scaling": {"rope_type": "llama3"}}),
        ("retrofit_olmo", {"initial_state_mode": ["random"]}),
        ("ouro", {"architectures": 3}),
        ("ouro", {"early_exit_threshold": "high"}),
        ("ouro", {"num_key_value_heads": -2}),
    ],
)
def test_config_value_of_the_wrong_kind_is_refused(
    case: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    made = shutil.copytree(GOLDEN / case, tmp_path / "model")
    change_config(made, **changes)
    with pytest.raises(TLLoopedError):
        load(made)(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(("key", "part"), [("d_model", "['d_model']"), ("wings", "['wings']")])
def test_native_config_with_missing_or_unknown_fields_is_refused(
    plain: LoopedTransformer, tmp_path: Path, key: str, part: str
) -> None:
    plain.save_pretrained(tmp_path)
    change_config(tmp_path, **{key: ... if key == "d_model" else 2})
    with refused(ConfigError, part):
        load(tmp_path)


def test_native_config_of_another_version_is_refused(
    plain: LoopedTransformer, tmp_path: Path
) -> None:
    plain.save_pretrained(tmp_path)
    change_config(tmp_path, format_version=2)
    with refused(ConfigError, "format_version 2", "not 1"):
        load(tmp_path)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with refused(CheckpointError, str(folder), "no safetensors"):
        load(folder)
    (folder / "config.json").unlink()
    with refused(CheckpointError, str(folder), "no config.json"):
        load(folder)
    (folder / "file").write_text("")
    with refused(CheckpointError, "is a file", "folder with config.json"):
        load(folder / "file")


@pytest.mark.parametrize("name", ["hugin", "a/b/c", "/no/such/folder", "./nothing", "~/nothing"])
def test_unknown_name_lists_the_aliases(name: str) -> None:
    with refused(CheckpointError, repr(name), "demo", *all_aliases()):
        load(name)


@pytest.mark.parametrize("dtype", ["int8", "banana", torch.int64])
def test_dtype_must_be_a_float(dtype: Any) -> None:
    with refused(ConfigError, repr(dtype), "bfloat16"):
        load(GOLDEN / "ouro", dtype=dtype)


# -- recurrences ------------------------------------------------------------------------------


def test_too_few_recurrences_are_refused(golden: Golden, golden_model: LoopedTransformer) -> None:
    low = -1 if golden.is_raven else 0
    fewest = f"at least {low + 1}"
    before = golden_model.loop.R
    with refused(ConfigError, fewest, f"got {low}"):
        golden.load(n_recurrences=low)
    with refused(RecurrenceCountError, fewest, f"got {low}"):
        golden_model.set_recurrences(low)
    with refused(RecurrenceCountError, fewest):
        golden_model(golden.tokens, n_recurrences=low)
    assert before == golden_model.loop.R


@pytest.mark.parametrize("case", [case for case in CASES if case != "ouro"])
def test_zero_recurrences_are_the_coda_on_the_initial_state(case: str) -> None:
    golden = load_golden(case)
    model, state = golden.load(), golden.tensors["initial_state"]
    none = model(golden.tokens, n_recurrences=0, initial_state=state)
    patch = [("recurrence.0.hook_state_out", lambda x, hook: state)]
    by_hand = model.run_with_hooks(golden.tokens, n_recurrences=1, fwd_hooks=patch, **golden.run)
    assert torch.equal(none, by_hand)
    assert torch.equal(golden.load(n_recurrences=0)(golden.tokens, initial_state=state), none)
    assert (none - golden.tensors["logits_r1"]).abs().max() > 0.1


# -- hook names and layers --------------------------------------------------------------------

OUT_OF_RANGE = {  # of (2, 3 x 4, 1): 15 effective layers
    "blocks.(4, 0).hook_resid_post": (LayerIndexError, "recurrence 4", "0..3"),
    "blocks.(0, 3).hook_resid_post": (LayerIndexError, "core layer 3", "0..2"),
    "recurrence.4.blocks.0.hook_resid_post": (LayerIndexError, "recurrence 4", "0..3"),
    "recurrence.0.blocks.3.attn.hook_z": (LayerIndexError, "core layer 3", "0..2"),
    "prelude.2.hook_resid_post": (LayerIndexError, "prelude layer 2", "0..1"),
    "coda.1.hook_resid_post": (LayerIndexError, "coda layer 1", "0..0"),
    "blocks.15.hook_resid_post": (HookNameError, "effective layer 15", "0..14"),
    "blocks.-1.hook_resid_post": (HookNameError, "effective layer -1", "0..14"),
    "recurrence.4.hook_state_out": (HookNameError, "recurrence 4", "0..3"),
}
UNKNOWN = {
    "blocks.3.hook_resid_pots": "blocks.3.hook_resid_post",
    "blocks.(1, 2).attn.hook_zz": "blocks.7.attn.hook_z",
    "recurrence.2.hook_stat_out": "recurrence.2.hook_state_out",
    "hook_embedd": "hook_embed",
}
TUPLES = {
    ("resid_post", (4, 0)): "0..3",
    ("resid_post", (0, 3)): "0..2",
    ("resid_post", (-5, 0)): "0..3",
    ("resid_post", 15): "0..14",
}


def attached(model: LoopedTransformer) -> int:
    return sum(len(hook.fwd_hooks) + len(hook.bwd_hooks) for hook in model.all_hook_points())


BAD_NAMES = [(name, *expected) for name, expected in OUT_OF_RANGE.items()]
BAD_NAMES += [(name, HookNameError, repr(name), near) for name, near in UNKNOWN.items()]
BAD_NAMES += [(name, LayerIndexError, "out of range", valid) for name, valid in TUPLES.items()]


@pytest.mark.parametrize(("name", "kind", "what", "valid"), BAD_NAMES)
def test_bad_hook_name_is_refused_before_the_run(
    plain: LoopedTransformer, name: Any, kind: type[TLLoopedError], what: str, valid: str
) -> None:
    ran: list[str] = []

    def hook(x: Tensor, hook: Any) -> None:
        ran.append(hook.name)

    tokens = torch.tensor([[1, 2, 3]])
    good = "hook_embed"
    for attempt in (
        lambda: plain.run_with_hooks(tokens, fwd_hooks=[(good, hook), (name, hook)]),
        lambda: plain.run_with_hooks(tokens, bwd_hooks=[(name, hook)], reset_hooks_end=False),
        lambda: plain.run_with_cache(tokens, names_filter=[good, name]),
        lambda: plain.add_hook(name, hook),
        lambda: plain.hook_name(name),
    ):
        with refused(kind, what, valid):
            attempt()
    assert ran == []
    assert attached(plain) == 0
    plain(tokens)
    assert ran == []


def test_names_are_read_at_the_recurrences_of_the_run(plain: LoopedTransformer) -> None:
    tokens, name = torch.tensor([[1, 2, 3]]), "blocks.(4, 0).hook_resid_post"
    _, cache = plain.run_with_cache(tokens, names_filter=name, n_recurrences=5)
    assert list(cache) == ["blocks.14.hook_resid_post"]
    with refused(LayerIndexError, "0..1"):
        plain.run_with_cache(tokens, names_filter="blocks.(2, 0).hook_z", n_recurrences=2)
    assert plain.loop.R == 4


@pytest.mark.parametrize("key", [*TUPLES, "blocks.(4, 0).hook_resid_post"])
def test_bad_cache_key_is_refused(plain: LoopedTransformer, key: Any) -> None:
    _, cache = plain.run_with_cache(torch.tensor([[1, 2]]))
    with refused(LayerIndexError, TUPLES.get(key, "0..3")):
        cache[key]
    assert key not in cache
    with refused(MissingActivationError, "'blocks.0.hook_nothing'", "(2, 3 x 4, 1)"):
        cache["blocks.0.hook_nothing"]


@pytest.mark.parametrize(
    ("pair", "valid"), [((4, 0), "0..3"), ((-5, 0), "0..3"), ((0, 3), "0..2"), ((0, -4), "0..2")]
)
def test_loop_index_out_of_range_is_refused(
    plain: LoopedTransformer, pair: tuple[int, int], valid: str
) -> None:
    with refused(LayerIndexError, valid, "15 effective layers"):
        plain.loop.index(*pair)
    with refused(LayerIndexError, valid):
        plain(torch.tensor([[1, 2]]), stop_at_layer=pair)


GATED = {
    "attn.hook_result": ("use_attn_result", (2, 3, 4, 32)),
    "attn.hook_q_input": ("use_split_qkv_input", (2, 3, 4, 32)),
    "attn.hook_k_input": ("use_split_qkv_input", (2, 3, 4, 32)),
    "attn.hook_v_input": ("use_split_qkv_input", (2, 3, 4, 32)),
    "hook_attn_in": ("use_attn_in", (2, 3, 4, 32)),
    "hook_mlp_in": ("use_hook_mlp_in", (2, 3, 32)),
}


@pytest.mark.parametrize(("suffix", "flag", "shape"), [(k, *v) for k, v in GATED.items()])
def test_gated_hook_needs_its_flag(suffix: str, flag: str, shape: tuple[int, ...]) -> None:
    model = LoopedTransformer.from_config(random_config())
    tokens, name = torch.tensor([[1, 2, 3], [4, 5, 6]]), f"blocks.(1, 2).{suffix}"
    with refused(GatedHookError, repr(name), f"set_{flag}(True)"):
        model.run_with_cache(tokens, names_filter=name)
    plain_logits = model(tokens)
    getattr(model, f"set_{flag}")(True)
    logits, cache = model.run_with_cache(tokens, names_filter=name)
    assert {key: tuple(value.shape) for key, value in cache.items()} == {
        f"blocks.7.{suffix}": shape
    }
    torch.testing.assert_close(logits, plain_logits, atol=1e-5, rtol=1e-5)


# -- tokens, masks, states --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        (torch.tensor([[0, 50]]), ["0..49", "got 50"]),
        (torch.tensor([[-1, 3]]), ["0..49", "got -1"]),
        (torch.tensor([[0.0, 1.0]]), ["integers", "torch.float32", "start_at_layer"]),
        (torch.tensor([[True]]), ["integers", "torch.bool"]),
        (torch.zeros(1, 2, 3, dtype=torch.long), ["[batch, pos]", "(1, 2, 3)"]),
        (torch.zeros(1, 0, dtype=torch.long), ["no token", "(1, 0)"]),
        (torch.zeros(0, 3, dtype=torch.long), ["no token", "(0, 3)"]),
        (torch.zeros(1, 65, dtype=torch.long), ["65 tokens", "context of 64"]),
    ],
)
def test_bad_tokens_are_refused(plain: LoopedTransformer, tokens: Tensor, parts: list[str]) -> None:
    for run in (plain, plain.run_with_cache, plain.run_with_hooks):
        with refused(InputError, *parts):
            run(tokens)


def test_a_sequence_as_long_as_the_context_is_taken(plain: LoopedTransformer) -> None:
    assert plain(torch.zeros(1, 64, dtype=torch.long)).shape == (1, 64, 50)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"initial_state": torch.zeros(1, 3, 32)}, ["initial_state", "(2, 3, 32)", "(1, 3, 32)"]),
        ({"initial_state": torch.zeros(2, 3, 31)}, ["initial_state", "(2, 3, 31)"]),
        ({"initial_state": "ones"}, ["initial_state", "'zeros'", "'ones'"]),
        ({"prelude_output": torch.zeros(2, 4, 32)}, ["prelude_output", "(2, 4, 32)"]),
        ({"attention_mask": torch.ones(2, 4)}, ["attention_mask", "(2, 3)", "(2, 4)"]),
        ({"attention_mask": torch.ones(3)}, ["attention_mask", "(2, 3)", "(3,)"]),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, ["attention_mask", "rows [1]"]),
        ({"start_at_layer": 3}, ["start_at_layer", "[batch, pos, 32]"]),
        ({"start_at_layer": 4, "stop_at_layer": 3}, ["start_at_layer=4", "stop_at_layer=3"]),
        ({"return_type": "logit"}, ["return_type", "'both'", "'logit'"]),
    ],
)
def test_bad_argument_is_refused(
    injected: LoopedTransformer, arguments: dict[str, Any], parts: list[str]
) -> None:
    with refused(InputError, *parts):
        injected(torch.tensor([[1, 2, 3], [4, 5, 6]]), **arguments)


@pytest.mark.parametrize("argument", ["start_at_layer", "stop_at_layer"])
@pytest.mark.parametrize("layer", [16, -16, (4, 0), (0, -4)])
def test_layer_out_of_range_is_refused(
    plain: LoopedTransformer, argument: str, layer: int | tuple[int, int]
) -> None:
    with refused(LayerIndexError, "out of range", "(2, 3 x 4, 1)"):
        plain(torch.zeros(1, 3, 32), **{argument: layer})


def test_starting_in_the_loop_needs_the_prelude_output(injected: LoopedTransformer) -> None:
    x = torch.zeros(1, 3, 32)
    with refused(InputError, "recurrence 1 injects", "prelude_output="):
        injected(x, start_at_layer=3)
    assert injected(x, start_at_layer=3, prelude_output=x).shape == (1, 3, 50)


def test_text_without_a_tokenizer_is_refused(plain: LoopedTransformer) -> None:
    with refused(TokenizerError, "no tokenizer", "model.tokenizer"):
        plain("text")


# -- configurations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        *(
            ({name: 0}, [f"{name} must be a positive integer", "got 0"])
            for name in ("d_model", "d_head", "n_heads", "n_ctx", "d_vocab", "d_mlp", "n_core")
        ),
        ({"n_prelude": -1}, ["n_prelude", "0 or more", "-1"]),
        ({"n_coda": -1}, ["n_coda", "0 or more", "-1"]),
        ({"n_recurrences": 0}, ["n_recurrences", "at least 1", "got 0"]),
        ({"n_recurrences": -1, "injection": Injection.LINEAR}, ["at least 0", "got -1"]),
        ({"d_head": 7}, ["even d_head", "7"]),
        ({"n_key_value_heads": 3}, ["multiple", "(4)", "(3)"]),
        ({"n_key_value_heads": -2}, ["n_key_value_heads", "-2"]),
        ({"n_key_value_heads": 0}, ["n_key_value_heads", "0"]),
        ({"n_heads": -1, "d_model": 30}, ["d_model", "30", "d_head", "8"]),
        ({"initial_state": InitialState.RANDOM}, ["'random'", "initial_state='prelude'"]),
        ({"initial_state": InitialState.PRELUDE_SKIP_ADAPTER}, ["needs an injection"]),
        ({"pre_coda_norm": True, "n_coda": 0}, ["pre_coda_norm", "coda"]),
        ({"pre_coda_norm": True, "loop_norm": True}, ["pre_coda_norm", "loop_norm"]),
        ({"init_mode": "xavier"}, ["'normal' or 'fan_in'", "'xavier'"]),
        ({"act_fn": "gelu"}, ["act_fn='silu'"]),
        ({"gated_mlp": False}, ["gated_mlp=True"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["'yarn'", "'llama3'"]),
        ({"rope_scaling": {"type": "linear"}}, ["'linear'", "'llama3'"]),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["rope_scaling", "factor"]),
    ],
)
def test_bad_config_is_refused(changes: dict[str, Any], parts: list[str]) -> None:
    with refused(ConfigError, *parts):
        random_config(**changes)


@pytest.mark.parametrize("name", ["norm_layout", "injection", "rotary_style", "initial_state"])
def test_unknown_choice_in_a_config_lists_the_known_ones(name: str) -> None:
    good = random_config().to_json()
    with refused(ConfigError, name, repr(good[name]), "'bogus'"):
        LoopedConfig.from_json(good | {name: "bogus"})
