"""Checkpoints: round trips, shards, interrupted saves, arguments, aliases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    GOLDEN,
    TOLERANCE,
    VARIANTS,
    Golden,
    copy_of,
    files_of_at_most,
    load_golden,
    random_config,
    write_tensors,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_looped import CheckpointError, HubAlias, LoopedTransformer
from tl_looped.adapters import all_aliases
from tl_looped.checkpoints import BUNDLED
from tl_looped.model.parameters import parameter_names


def small_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "a", "b", "c"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def split_in_two(folder: Path) -> list[str]:
    """Turn ``model.safetensors`` into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard, half in zip(shards, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / shard)
    where = {name: shards[name in halves[1]] for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    return shards


def load(folder: Path, **kwargs: Any) -> LoopedTransformer:
    return LoopedTransformer.from_pretrained(folder, device="cpu", **kwargs)


# -- round trips ------------------------------------------------------------------------------


def test_saved_golden_model_gives_the_same_bits(
    golden: Golden, golden_model: LoopedTransformer, tmp_path: Path
) -> None:
    golden_model.save_pretrained(tmp_path)
    again = load(tmp_path)
    logits = golden_model(golden.tokens, **golden.run)
    assert torch.equal(again(golden.tokens, **golden.run), logits)
    before, after = golden_model.cfg.to_json(), again.cfg.to_json()
    assert {key for key in before if before[key] != after[key]} == {"model_name"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_variant_gives_the_same_bits(
    variant: LoopedTransformer, tokens: Tensor, dtype: torch.dtype, tmp_path: Path
) -> None:
    variant.to(dtype)
    variant.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    again = load(tmp_path, dtype=dtype)
    assert again(tokens).dtype == dtype
    assert torch.equal(again(tokens), variant(tokens))


def test_saved_number_of_recurrences_is_the_current_one(tmp_path: Path) -> None:
    model = LoopedTransformer.from_config(random_config())
    model.set_recurrences(7)
    model.save_pretrained(tmp_path)
    assert (load(tmp_path).loop.R, load(tmp_path).cfg.n_layers) == (7, 2 + 3 * 7 + 1)


def test_tied_matrix_is_stored_once(tmp_path: Path) -> None:
    LoopedTransformer.from_config(random_config(tie_embeddings=True)).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(parameter_names(random_config(tie_embeddings=True)))
    assert "unembed.weight" not in names
    again = load(tmp_path)
    assert again.W_U.data_ptr() == again.W_E.data_ptr()


def test_tokenizer_is_kept(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    LoopedTransformer.from_config(random_config(), tokenizer).save_pretrained(tmp_path)
    again = load(tmp_path).tokenizer
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 2, 0)
    assert load(tmp_path).to_tokens("a c b", prepend_bos=True).tolist() == [[1, 4, 6, 5]]


def test_model_without_tokenizer_stays_without(tmp_path: Path) -> None:
    LoopedTransformer.from_config(random_config()).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert load(tmp_path).tokenizer is None


# -- shards -----------------------------------------------------------------------------------


def test_shards_load_like_one_file(golden: Golden, tmp_path: Path) -> None:
    folder = copy_of(golden.name, tmp_path / "sharded")
    split_in_two(folder)
    whole, sharded = golden.load().state_dict(), load(folder).state_dict()
    assert list(whole) == list(sharded)
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_the_single_file_wins_over_an_old_index(golden: Golden, tmp_path: Path) -> None:
    """As in transformers, which leaves the index when it saves a sharded folder as one file."""
    folder = copy_of(golden.name, tmp_path / "model")
    new = load_file(folder / "model.safetensors")
    shards = split_in_two(folder)
    for shard in shards:
        old = {name: torch.zeros_like(t) for name, t in load_file(folder / shard).items()}
        save_file(old, folder / shard)
    write_tensors(folder, new)
    logits = golden.load()(golden.tokens, **golden.run)
    assert torch.equal(load(folder)(golden.tokens, **golden.run), logits)
    for shard in shards:
        (folder / shard).unlink()
    assert torch.equal(load(folder)(golden.tokens, **golden.run), logits)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00001.*00002"):
        load(folder)


def test_saving_over_shards_leaves_none_of_them(tmp_path: Path) -> None:
    folder = copy_of("ouro", tmp_path / "model")
    shards = split_in_two(folder)
    (folder / "notes.txt").write_text("mine")
    model = LoopedTransformer.from_config(random_config(**VARIANTS["sandwich-loop-norm"]))
    model.save_pretrained(folder)
    left = {p.name for p in folder.iterdir()}
    assert left == {"config.json", "model.safetensors", "notes.txt"}
    assert not left & set(shards)
    tokens = torch.arange(6)[None]
    assert torch.equal(load(folder)(tokens), model(tokens))


# -- interrupted saves ------------------------------------------------------------------------


def test_a_save_that_the_disk_refuses_leaves_nothing(tmp_path: Path) -> None:
    model = LoopedTransformer.from_config(random_config())
    with files_of_at_most(20_000), pytest.raises((OSError, SafetensorError)):
        model.save_pretrained(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_save_that_the_disk_refuses_leaves_the_older_one(tmp_path: Path, tokens: Tensor) -> None:
    old = LoopedTransformer.from_config(random_config(seed=1))
    old.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with files_of_at_most(20_000), pytest.raises((OSError, SafetensorError)):
        LoopedTransformer.from_config(random_config(seed=2)).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert torch.equal(load(tmp_path)(tokens), old(tokens))


class FolderTokenizer:
    """Writes a folder, which cannot take the place of a file: a rename that fails."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "templates").mkdir()


def test_a_rename_that_fails_leaves_no_checkpoint_in_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "templates").write_text("a file where the save puts a folder")
    model = LoopedTransformer.from_config(random_config(), FolderTokenizer())
    with pytest.raises(NotADirectoryError):
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)


def test_a_rename_that_fails_never_mixes_two_models(tmp_path: Path, tokens: Tensor) -> None:
    old = LoopedTransformer.from_config(random_config(seed=1, n_recurrences=2))
    old.save_pretrained(tmp_path)
    (tmp_path / "templates").write_text("a file where the save puts a folder")
    new = LoopedTransformer.from_config(random_config(seed=2, n_recurrences=3), FolderTokenizer())
    with pytest.raises(NotADirectoryError):
        new.save_pretrained(tmp_path)
    if (tmp_path / "config.json").exists():
        assert torch.equal(load(tmp_path)(tokens), old(tokens))
    else:
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load(tmp_path)


# -- what a Huginn file may hold besides ------------------------------------------------------


def test_stored_equal_unembedding_is_accepted(tmp_path: Path) -> None:
    folder = copy_of("huginn", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    write_tensors(folder, tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()})
    golden = load_golden("huginn")
    logits = load(folder)(golden.tokens, **golden.run)
    assert torch.equal(logits, golden.load()(golden.tokens, **golden.run))


@pytest.mark.parametrize("rows", [97, 98])
def test_stored_different_unembedding_is_refused(rows: int, tmp_path: Path) -> None:
    folder = copy_of("huginn", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    other = torch.zeros(rows, 64)
    other[:97] = tensors["transformer.wte.weight"]
    other[-1, -1] += 1
    write_tensors(folder, tensors | {"lm_head.weight": other})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*wte\.weight"):
        load(folder)


def test_rotary_table_may_be_missing(tmp_path: Path) -> None:
    folder = copy_of("huginn", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["freqs_cis"]
    write_tensors(folder, tensors)
    golden = load_golden("huginn")
    torch.testing.assert_close(
        load(folder)(golden.tokens, **golden.run), golden.tensors["logits"], **TOLERANCE
    )


# -- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float16", torch.float64])
def test_dtype_is_that_of_all_parameters(dtype: str | torch.dtype) -> None:
    model = load_golden("ouro").load(dtype=dtype)
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.split(".")[-1])
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert model.cfg.dtype == wanted
    stored = load_file(GOLDEN / "ouro" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.W_E, stored.to(wanted))


def test_dtype_is_fp32_by_default_whatever_is_stored(tmp_path: Path) -> None:
    folder = copy_of("ouro", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    write_tensors(folder, {name: t.to(torch.bfloat16) for name, t in tensors.items()})
    assert {p.dtype for p in load(folder).parameters()} == {torch.float32}


@pytest.mark.parametrize("R", [1, 2, 9])
def test_number_of_recurrences_is_an_argument(golden: Golden, R: int) -> None:
    model = golden.load(n_recurrences=R)
    cfg = model.cfg
    assert (cfg.n_recurrences, model.loop.R) == (R, R)
    assert cfg.n_layers == cfg.n_prelude + R * cfg.n_core + cfg.n_coda == len(model.blocks)
    logits = model(golden.tokens, **golden.run)
    torch.testing.assert_close(logits, golden.tensors[f"logits_r{R}"], **TOLERANCE)


def test_meta_device_gives_shapes_without_values(golden: Golden) -> None:
    meta = LoopedTransformer.from_pretrained(golden.folder, device="meta")
    real = dict(golden.load().named_parameters())
    assert all(p.is_meta for p in meta.parameters())
    assert {name: p.shape for name, p in meta.named_parameters()} == {
        name: p.shape for name, p in real.items()
    }
    assert meta.cfg.device == "meta"


def test_string_that_starts_with_a_dot_means_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of("ouro", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert LoopedTransformer.from_pretrained("./demo", device="cpu").cfg.architecture == "ouro"


def test_path_object_means_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_of("ouro", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert load(Path("./demo")).cfg.architecture == "ouro"


RETROFITS = {
    "recurrent-llama-3.2": "smcleish/Recurrent-Llama-3.2-train-recurrence-",
    "recurrent-tinyllama-3t": "smcleish/Recurrent-TinyLlama-3T-train-recurrence-",
    "recurrent-olmo-2": "smcleish/Recurrent-OLMo-2-0425-train-recurrence-",
}
ALIASES = {
    "huginn": HubAlias("tomg-group-umd/huginn-0125"),
    "ouro-1.4b": HubAlias("ByteDance/Ouro-1.4B"),
    "ouro-2.6b": HubAlias("ByteDance/Ouro-2.6B"),
    "ouro-1.4b-thinking": HubAlias("ByteDance/Ouro-1.4B-Thinking"),
    "ouro-2.6b-thinking": HubAlias("ByteDance/Ouro-2.6B-Thinking"),
    **{f"{a}-r{r}": HubAlias(f"{h}{r}", r) for a, h in RETROFITS.items() for r in (4, 8, 16, 32)},
    **{a: HubAlias(f"{h}32", 32) for a, h in RETROFITS.items()},
}


def test_aliases_name_the_published_checkpoints() -> None:
    assert all_aliases() == ALIASES
    assert len(ALIASES) == 20
    assert not set(ALIASES) & set(BUNDLED)


def test_configuration_follows_the_weights(golden_model: LoopedTransformer) -> None:
    golden_model.to(torch.bfloat16)
    assert golden_model.cfg.dtype == torch.bfloat16
    golden_model.double()
    assert golden_model.cfg.dtype == torch.float64


def test_a_revision_of_a_folder_is_refused(golden: Golden) -> None:
    with pytest.raises(CheckpointError, match="revision='v2'"):
        LoopedTransformer.from_pretrained(golden.folder, revision="v2")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = copy_of("ouro", tmp_path / "model")
    shards = split_in_two(folder)
    both = load_file(folder / shards[0]) | load_file(folder / shards[1])
    save_file(both, folder / shards[1])
    with pytest.raises(CheckpointError, match=r"00001.*00002"):
        load(folder)


def test_a_model_without_values_or_a_target_that_is_a_file_cannot_be_saved(tmp_path: Path) -> None:
    meta = LoopedTransformer.from_config(random_config(device="meta"))
    with pytest.raises(CheckpointError, match=r"\bmeta\b"):
        meta.save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    model = LoopedTransformer.from_config(random_config())
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_a_saved_model_does_not_tell_where_it_was_loaded_from(tmp_path: Path) -> None:
    model = load(copy_of("ouro", tmp_path / "mine"))
    assert model.cfg.model_name == "mine"
    model.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()


# -- generation_config.json -------------------------------------------------------------------

GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.6, "max_length": None}


@pytest.mark.parametrize("format", ["native", "original"])
def test_generation_config_is_loaded_and_saved(format: str, tmp_path: Path) -> None:
    folder = copy_of("retrofit_llama", tmp_path / "model")
    assert load(folder).generation_config == {}
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    model = load(folder)
    assert model.generation_config == GENERATION
    model.save_pretrained(tmp_path / "saved", format=format)
    assert load(tmp_path / "saved").generation_config == GENERATION
    model.generation_config["eos_token_id"] = 3
    assert load(folder).generation_config == GENERATION


def test_a_saved_model_leaves_no_generation_config_of_another(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    LoopedTransformer.from_config(random_config()).save_pretrained(tmp_path)
    assert load(tmp_path).generation_config == {}
    assert not (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize("text", [b"[2]", b"null", b"{", b"\xff", b""])
def test_a_generation_config_that_is_no_object_is_refused(text: bytes, tmp_path: Path) -> None:
    folder = copy_of("ouro", tmp_path / "model")
    (folder / "generation_config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load(folder)
