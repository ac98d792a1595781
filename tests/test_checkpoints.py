"""Checkpoints: round trips, shards, interrupted saves, arguments, aliases, the hub."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import GOLDEN, TOLERANCE, VARIANTS, Golden, load_golden, random_config
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


def copy_of(name: str, folder: Path) -> Path:
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, folder)
    return folder


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


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


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Let the operating system refuse longer files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_the_disk_refuses_leaves_nothing(tmp_path: Path) -> None:
    model = LoopedTransformer.from_config(random_config())
    with largest_file(20_000), pytest.raises((OSError, SafetensorError)):
        model.save_pretrained(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_save_that_the_disk_refuses_leaves_the_older_one(tmp_path: Path, tokens: Tensor) -> None:
    old = LoopedTransformer.from_config(random_config(seed=1))
    old.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with largest_file(20_000), pytest.raises((OSError, SafetensorError)):
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
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
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
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
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
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* differs .*wte\.weight"):
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


# -- the hub ----------------------------------------------------------------------------------

REPO = "smcleish/Recurrent-Llama-3.2-train-recurrence-4"
MAIN, TAG = "a" * 40, "b" * 40
COMMITS = {"main": MAIN, "v2": TAG, MAIN: MAIN, TAG: TAG}
CLIENT = """
import json, sys, torch
from tl_looped import LoopedTransformer, TLLoopedError
out = {}
for label, name, revision in json.loads(sys.argv[1]):
    try:
        model = LoopedTransformer.from_pretrained(name, device="cpu", revision=revision)
        out[label] = {"R": model.loop.R, "W_E": model.W_E[:2].tolist()}
    except TLLoopedError as error:
        out[label] = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(out))
"""
LOADS = [
    ("alias", "recurrent-llama-3.2-r4", None),
    ("tag", REPO, "v2"),
    ("no revision", REPO, "v9"),
    ("no repository", "nobody/nothing", None),
]


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download of one repository needs."""

    files: dict[str, dict[str, bytes]]
    seen: list[tuple[str, str, str | None]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.seen.append((self.command, path, self.headers["Authorization"]))
        for prefix in (f"/api/models/{REPO}/revision/", f"/api/models/{REPO}/tree/"):
            if path.startswith(prefix):
                commit = COMMITS.get(path.removeprefix(prefix))
                return self.answer(self.listing(commit, "/tree/" in prefix) if commit else None)
        if path.startswith(f"/{REPO}/resolve/"):
            revision, _, name = path.removeprefix(f"/{REPO}/resolve/").partition("/")
            return self.answer(self.files[COMMITS[revision]][name], COMMITS[revision])
        return self.answer(None, error="RepoNotFound")

    def listing(self, commit: str, tree: bool) -> bytes:
        files = self.files[commit]
        if not tree:
            names = [{"rfilename": name} for name in files]
            return json.dumps({"id": REPO, "sha": commit, "siblings": names}).encode()
        entries = [
            {"type": "file", "path": name, "size": len(body), "oid": sha1(body).hexdigest()}
            for name, body in files.items()
        ]
        return json.dumps(entries).encode()

    def answer(self, body: bytes | None, commit: str = "", error: str = "RevisionNotFound") -> None:
        self.send_response(200 if body is not None else 404)
        if body is None:
            self.send_header("X-Error-Code", error)
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{sha1(body or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET" and body:
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Any]]:
    """What a client with an empty cache got, and the requests that it made."""
    tmp = tmp_path_factory.mktemp("hub")
    folder = copy_of("retrofit_llama", tmp / "main")
    other = copy_of("retrofit_llama", tmp / "v2")
    tensors = load_file(other / "model.safetensors")
    write_tensors(other, tensors | {"transformer.wte.weight": torch.ones(97, 64)})
    evil = {"pytorch_model.bin": b"pickle", "raven_modeling_minimal.py": b"1 / 0"}
    Hub.files = {
        commit: evil | {p.name: p.read_bytes() for p in where.iterdir()}
        for commit, where in ((MAIN, folder), (TAG, other))
    }
    Hub.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp / "home"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CLIENT, json.dumps(LOADS)],
            env=env, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), Hub.seen


def test_hub_alias_loads_the_main_branch_at_its_recurrences(hub: Any) -> None:
    loaded, _ = hub
    stored = load_file(GOLDEN / "retrofit_llama" / "model.safetensors")["transformer.wte.weight"]
    assert loaded["alias"] == {"R": 4, "W_E": stored[:2].tolist()}


def test_hub_revision_is_respected(hub: Any) -> None:
    loaded, _ = hub
    assert loaded["tag"] == {"R": 5, "W_E": [[1.0] * 64] * 2}


def test_hub_files_are_only_config_and_safetensors(hub: Any) -> None:
    _, seen = hub
    fetched = {path.rsplit("/", 1)[1] for _, path, _ in seen if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}


def test_hub_token_is_sent_with_every_request_for_the_repository(hub: Any) -> None:
    _, seen = hub
    of_repo = [(verb, token) for verb, path, token in seen if REPO in path]
    assert {token for _, token in of_repo} == {"Bearer hf_secret"}
    assert ("GET", "Bearer hf_secret") in of_repo


@pytest.mark.parametrize(
    ("label", "parts"),
    [("no revision", [REPO, "v9"]), ("no repository", ["'nobody/nothing'", "revision main"])],
)
def test_hub_refusal_is_a_checkpoint_error(hub: Any, label: str, parts: list[str]) -> None:
    loaded, _ = hub
    assert loaded[label]["error"] == "CheckpointError"
    assert all(part in loaded[label]["message"] for part in [*parts, "HF_TOKEN"])
