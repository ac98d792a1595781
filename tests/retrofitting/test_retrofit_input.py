"""Bad input to retrofit: each is refused by name, and nothing is written or changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from feedforwards import LLAMA3_ROPE, SIZES, feedforward
from rawcheckpoints import raw_config
from refusals import command_refused
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.utils import logging

from tl_looped import CheckpointError, ConfigError, InputError, retrofit
from tl_looped.cli import main
from tl_looped.retrofitting import parse_layers
from tl_looped.retrofitting.layers import plan_layers

pytestmark = pytest.mark.once


def small_llama(**changes: Any) -> Any:
    return feedforward("llama", **changes)


@pytest.fixture(scope="module")
def source() -> Any:
    return small_llama()


@pytest.fixture
def folder(tmp_path: Path, source: Any) -> Path:
    source.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_transformers_bars_do_not_pass_through(folder: Path, capfd: Any) -> None:
    assert logging.is_progress_bar_enabled()
    retrofit(folder, core=[2], device="cpu")
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


# -- layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"core": []}, r"core=\[\] is empty; the loop needs at least one of the layers 0\.\.6"),
        ({"core": [6, 7]}, r"core .* at most 6, got 7"),
        ({"core": [-1]}, r"core .* at least 0 .* got -1"),
        ({"core": [True]}, "core .* got True"),
        ({"core": [2.0]}, r"core .*\(float\)"),
        ({"core": ["2"]}, r"core .*\(str\)"),
        ({"core": "2-4"}, "core .* '2-4'"),
        ({"core": 3}, "core .* 3"),
        ({"core": None}, "core .* None"),
        ({"core": [3, 3]}, r"core=\[3, 3\] names layers twice: \[3\]"),
        ({"core": [4, 3]}, r"core=\[4, 3\] is out of order; .* core=\[3, 4\]"),
        (
            {"core": [2, 3], "prelude": [0, 2]},
            r"prelude=\[0, 2\] and core=\[2, 3\] overlap .*\[2\]",
        ),
        ({"core": [2, 3], "coda": [3, 4]}, r"core=\[2, 3\] and coda=\[3, 4\] overlap .*\[3\]"),
        ({"core": [4], "prelude": [1], "coda": [1]}, r"prelude=\[1\] and coda=\[1\] overlap"),
        ({"core": [2], "prelude": [3]}, r"prelude=\[3\] does not come before core=\[2\]"),
        (
            {"core": [5], "prelude": [], "coda": [1, 6]},
            r"core=\[5\] does not come before coda=\[1, 6\]",
        ),
        ({"core": [1, 5], "prelude": [0, 3]}, r"prelude=\[0, 3\] does not come before core"),
        ({"core": [3], "coda": [7]}, "coda .* got 7"),
        ({"core": [3], "prelude": [9]}, "prelude .* got 9"),
    ],
)
def test_wrong_layers_are_named(layers: dict[str, Any], message: str, source: Any) -> None:
    with pytest.raises(InputError, match=message):
        retrofit(source, **layers, device="cpu")


def test_layers_may_be_any_iterable_of_integers(folder: Path) -> None:
    core = torch.tensor([2, 3])
    plan = plan_layers(6, iter([0]), core, (i for i in (4, 5)))
    assert plan.stages() == {"prelude": (0,), "core": (2, 3), "coda": (4, 5)}
    assert (plan.kept, plan.dropped) == ((0, 2, 3, 4, 5), (1,))
    # From a folder, where layers are looked at before and after the weights are read.
    looped = retrofit(folder, prelude=iter([0]), core=iter([2]), coda=iter([4]), device="cpu")
    assert (looped.loop.p, looped.loop.k, looped.loop.c) == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-3,7", (0, 1, 2, 3, 7)),
        (" 2 - 4 , 6", (2, 3, 4, 6)),
        ("5", (5,)),
        ("", ()),
        ("3-3", (3,)),
    ],
)
def test_layers_are_read_from_text(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    "text", ["a", "1,,2", "-1", "1-", "1-2-3", "1.5", "3-1", "0-999999999", "²"]
)
def test_texts_that_name_no_layers_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"layers are written like|runs backwards|more than 10000"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "loop"}, InputError, "mode must be one of 'retrofit', 'virtual-loop'"),
        ({"n_recurrences": 0}, InputError, "n_recurrences must be an integer of at least 1, got 0"),
        ({"n_recurrences": True}, InputError, "n_recurrences must be an integer"),
        ({"dtype": "int8"}, ConfigError, "dtype must be a floating point type"),
        ({"revision": "main"}, InputError, "revision='main' is for the hub"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str, source: Any
) -> None:
    with pytest.raises(error, match=message):
        retrofit(source, core=[3], **({"device": "cpu"} | options))


# -- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; .* hidden_act='silu' only"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embeddings of type 'linear'",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_parameters": LLAMA3_ROPE | {"attention_factor": 2.0}}, "attention_factor"),
    ],
)
def test_fields_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))
    with pytest.raises(ConfigError, match=message):
        retrofit(model, core=[3], device="meta")


def test_fields_of_a_later_version_are_refused_unless_they_are_at_their_default() -> None:
    class LaterConfig(LlamaConfig):
        new_switch: int = 0

    for value, fits in ((0, True), (1, False)):
        with torch.device("meta"):
            model = LlamaForCausalLM(LaterConfig(**SIZES, new_switch=value))
        if fits:
            assert retrofit(model, core=[3], device="meta").cfg.n_core == 1
        else:
            with pytest.raises(ConfigError, match="new_switch=1"):
                retrofit(model, core=[3], device="meta")


def test_quantised_and_partly_sliding_models_are_refused(source: Any) -> None:
    for key, value, message in (
        ("quantization_config", {"bits": 4}, "quantised"),
        ("layer_types", ["full_attention", "sliding_attention"], "sliding_attention"),
        ("use_sliding_window", True, "use_sliding_window True"),
    ):
        model = small_llama()
        setattr(model.config, key, value)
        with pytest.raises(ConfigError, match=message):
            retrofit(model, core=[3], device="cpu")


def test_families_that_do_not_fit_are_named() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=8))
    with pytest.raises(ConfigError, match=r"model_type 'gpt2'; .*'llama', 'olmo2', 'mistral'"):
        retrofit(model, core=[1], device="cpu")


def test_a_class_of_ones_own_is_refused() -> None:
    class MyLlama(LlamaForCausalLM):
        pass

    model = MyLlama(LlamaConfig(**SIZES))
    with pytest.raises(ConfigError, match=r"MyLlama.*LlamaForCausalLM"):
        retrofit(model, core=[3], device="cpu")


@pytest.mark.parametrize("model", [3, None, nn.Linear(2, 2), {"model": 1}])
def test_things_that_are_no_model_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="takes a hub id"):
        retrofit(model, core=[3])


def test_model_without_values_gives_a_model_without_values_only() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert retrofit(model, core=[3], device="meta").W_E.is_meta
    with pytest.raises(InputError, match=r"\bmeta\b"):
        retrofit(model, core=[3], device="cpu")


def test_tensors_of_other_widths_and_names_are_listed() -> None:
    model = small_llama()
    attention = model.model.layers[3].self_attn
    attention.v_proj = nn.Linear(48, 40, bias=True)
    with pytest.raises(CheckpointError) as caught:
        retrofit(model, core=[3], device="cpu")
    message = str(caught.value)
    assert "shape: model.layers.3.self_attn.v_proj.weight is [40, 48], expected [48, 48]" in message
    assert "unexpected: model.layers.3.self_attn.v_proj.bias [40]" in message
    # In a layer that is dropped, it does not matter.
    assert retrofit(model, prelude=[0], core=[1], coda=[2], device="cpu").cfg.n_core == 1


def test_a_resized_vocabulary_is_noticed() -> None:
    model = small_llama()
    model.model.embed_tokens = nn.Embedding(70, 48)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight.*\[70, 48\].*\[61"):
        retrofit(model, core=[3], device="cpu")


# -- what no list foresees: the model is run against its source ------------------------------------


def test_a_changed_forward_pass_is_noticed(source: Any) -> None:
    handle = source.model.layers[3].mlp.register_forward_hook(lambda m, i, out: out * 1.05)
    try:
        with pytest.raises(ConfigError, match="LlamaForCausalLM"):
            retrofit(source, core=[3], device="cpu")
        # A dropped layer may do what it likes.
        retrofit(source, prelude=[0], core=[1], coda=[2], device="cpu")
    finally:
        handle.remove()


def test_changed_rotary_frequencies_are_noticed() -> None:
    model = small_llama()
    model.model.rotary_emb.inv_freq[-1] *= 1.01  # 3e-5 radians a token: no short text shows it
    with pytest.raises(ConfigError, match="rotates queries and keys by frequencies"):
        retrofit(model, core=[3], device="cpu")


def test_weights_that_are_no_numbers_are_noticed() -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight"):
        retrofit(model, core=[3], device="cpu")


def test_logits_that_are_no_numbers_are_noticed() -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(1e30)
        model.lm_head.weight.fill_(1e30)
    with pytest.raises(ConfigError, match="gives logits that are not finite"):
        retrofit(model, core=[3], device="cpu")


# -- folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["nowhere", "demo", "./no/where", "a/b/c", "~/x"])
def test_what_is_no_folder_and_no_hub_id_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="is neither a folder nor a hub id"):
        retrofit(text, core=[3])


def test_looped_checkpoints_are_told_from_feedforward_ones(tmp_path: Path) -> None:
    for raw in (raw_config("retrofit_llama"), raw_config("ouro"), {"model_type": "tl_looped"}):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match="is a looped model already"):
            retrofit(tmp_path, core=[3])


def test_pickles_are_not_opened(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="has weights only as pickles"):
        retrofit(folder, core=[3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"missing_keys: \['model.layers.2.mlp.up_proj.weight'\]"),
        ("unexpected", r"unexpected_keys: \['model.layers.2.mlp.up_proj.bias'\]"),
        ("shape", r"mismatched_keys: .*layers.2.mlp.up_proj.weight.*60, 48"),
        ("truncated", r"model\.safetensors is not a whole safetensors file"),
        ("config", "cannot load .*num_attention_heads"),
    ],
)
def test_damaged_folders_are_refused(damage: str, message: str, folder: Path) -> None:
    path, name = folder / "model.safetensors", "model.layers.2.mlp.up_proj"
    tensors = load_file(path)
    if damage == "missing":
        del tensors[f"{name}.weight"]
    elif damage == "unexpected":
        tensors[f"{name}.bias"] = torch.zeros(64)
    elif damage == "shape":
        tensors[f"{name}.weight"] = torch.zeros(60, 48)
    save_file(tensors, path, metadata={"format": "pt"})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if damage == "config":
        raw = json.loads((folder / "config.json").read_text())
        raw["num_attention_heads"] = "many"
        (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        retrofit(folder, core=[3], device="cpu")


def test_layers_are_checked_before_weights_are_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"core.*\b7\b"):
        retrofit(folder, core=[7])
    with pytest.raises(CheckpointError, match="is for the hub, but"):
        retrofit(folder, core=[3], revision="main")


# -- the command ------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_command_replaces_nothing_unasked(
    folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    before = contents(tmp_path)
    message = command_refused(
        monkeypatch, capsys, "retrofit", folder, folder, "--core", "3", "--overwrite"
    )
    assert "is not empty and holds no looped model" in message
    message = command_refused(
        monkeypatch, capsys, "retrofit", folder, folder / "config.json", "--core", "3"
    )
    assert "is a file; a looped model is saved as a folder" in message
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text('{"model_type": "tl_looped"}')
    message = command_refused(monkeypatch, capsys, "retrofit", folder, ours, "--core", "3")
    assert (
        "holds a looped model already; name a new folder, or replace it by --overwrite" in message
    )
    assert contents(tmp_path) == before | {"ours/config.json": b'{"model_type": "tl_looped"}'}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--core", "3-9"], "got 7"),
        (["--core", "3-x"], "layers are written like 0-3,7"),
        (["--core", "3", "--recurrences", "0"], "n_recurrences must be an integer of at least 1"),
        (["--core", "3", "--dtype", "int8"], "dtype must be a floating point type"),
        (
            ["--core", "3", "--mode", "virtual-loop", "--format", "original"],
            "a virtual loop has no adapter",
        ),
    ],
)
def test_command_leaves_nothing_behind_what_it_refuses(
    options: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    assert message in command_refused(
        monkeypatch, capsys, "retrofit", folder, tmp_path / "out", *options
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_command_leaves_nothing_behind_a_full_disk(
    folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        message = command_refused(
            monkeypatch, capsys, "retrofit", folder, tmp_path / "out", "--core", "3"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in message
    assert "File too large" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_wide_heads_are_saved_in_the_native_format_with_a_note(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    changes = {"head_dim": 16, "sliding_window": None}
    MistralForCausalLM(MistralConfig(**(SIZES | changes))).save_pretrained(tmp_path / "m")
    arguments = ["retrofit", tmp_path / "m", tmp_path / "out", "--core", "3"]
    monkeypatch.setattr("sys.argv", ["tl-looped", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "needs n_heads * d_head = d_model, got 4 * 16 and 48" in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "tl_looped"
