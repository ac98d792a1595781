"""Files of a checkpoint's tensors: which they are, what their headers say, reading them one by one.

What a header says is enough to refuse a checkpoint: tensors that are no floating point numbers are
codes of a quantised one, and sizes in the config far beyond what is stored would be allocated for
nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_looped.errors import CheckpointError, ConfigError
from tl_looped.model.config import LoopedConfig

REOPEN_AFTER = 2**27
"""Bytes after which a file is opened anew while a checkpoint is read, or a share of them all."""
_SHARE = 16
_FLOATS = ("F64", "F32", "F16", "BF16")
_QUANTISED = ("quantization_config", "compression_config")
_TOO_MANY = 4
"""A config that implies so many times the stored numbers is not compared tensor by tensor."""


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor before it is read.

    Args:
        path: The file.
        shape: Its shape.
        dtype: Its type, as safetensors calls it: ``F32``, ``BF16``, ``I8``, ``F8_E4M3``.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        """Size of its numbers; types are named by their bits: ``F32``, ``F8_E4M3``, ``BOOL``."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


def tensor_files(folder: Path) -> list[Path]:
    """Files of the weights: ``model.safetensors``, else the index's, else every safetensors.

    The order is that of transformers, which leaves an old index in the folder when a model is saved
    anew as one file.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from error
        bad = [n for n in names if not isinstance(n, str) or Path(n).name != n]
        if bad:
            raise CheckpointError(f"{index} names files outside its folder: {bad}")
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks the shards {missing} that its index names")
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise CheckpointError(
            f"{folder} has weights only as pickles ({', '.join(pickles)}), which can run code when "
            "they are opened. Convert them to safetensors first; they are not read here."
        )
    raise CheckpointError(f"{folder} has no safetensors file")


def read_headers(paths: Iterable[Path]) -> dict[str, Header]:
    """Every tensor of some files, by name, from their headers alone.

    Raises:
        CheckpointError: a file is damaged or cut off, or two hold a tensor of the same name.
    """
    out: dict[str, Header] = {}
    for path in paths:
        for name, header in _read_header(path):
            if name in out:
                raise CheckpointError(f"{name} is in both {out[name].path} and {path}")
            out[name] = header
    return out


def _read_header(path: Path) -> list[tuple[str, Header]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [
                (name, Header(path, tuple(part.get_shape()), str(part.get_dtype())))
                for name, part in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated, fetch it again"
        ) from error


def refuse_quantised(config: Mapping[str, Any], name: str) -> None:
    """Raise if a ``config.json`` says that its tensors are not the weights themselves.

    Raises:
        ConfigError: it does.
    """
    for key in _QUANTISED:
        if config.get(key):
            how = config[key].get("quant_method") if isinstance(config[key], Mapping) else None
            raise ConfigError(
                f"{name} is quantised: its config.json has {key} "
                f"(quant_method {how!r}). Weights are read as they are: load the checkpoint it was "
                "made of, or dequantise it first (transformers: model.dequantize(), then "
                "save_pretrained)"
            )


def wrong_dtypes(headers: Mapping[str, Header], used: Iterable[str]) -> list[str]:
    """One line for each tensor that is used and holds no floating point numbers."""
    return [
        f"dtype: {name} is {headers[name].dtype}, a weight is one of {', '.join(_FLOATS)}; "
        "a quantised checkpoint must be dequantised first"
        for name in dict.fromkeys(used)
        if name in headers and headers[name].dtype not in _FLOATS
    ]


def refuse_sizes(cfg: LoopedConfig, headers: Mapping[str, Header], name: str) -> None:
    """Raise if a config implies far more numbers than are stored, before anything is allocated.

    Raises:
        CheckpointError: it does.
    """
    stored = sum(math.prod(header.shape) for header in headers.values())
    heads = 2 * (cfg.n_heads + cfg.n_kv_heads) * cfg.d_head
    sizes = {
        f"an embedding of {cfg.d_vocab} * {cfg.d_model}": cfg.d_vocab * cfg.d_model,
        f"{cfg.n_prelude + cfg.n_core + cfg.n_coda} layers of at least {cfg.d_model} * "
        f"({heads} + 3 * {cfg.d_mlp})": (cfg.n_prelude + cfg.n_core + cfg.n_coda)
        * cfg.d_model
        * (heads + 3 * (cfg.d_mlp or 0)),
    }
    for what, n in sizes.items():
        if n > _TOO_MANY * stored:
            raise CheckpointError(
                f"{name}: config.json asks for {what} = {n} numbers, and the files hold {stored} "
                "in all; the config is not that of these tensors"
            )


class TensorReader:
    """Tensors of a checkpoint's files, mapped and not copied.

    As long as a file is open, all that was read of it counts as memory of the process, which would
    in the end hold the checkpoint twice. So a file is opened anew from time to time; for each
    tensor it would take as long as the reading itself.
    """

    def __init__(self, headers: Mapping[str, Header]) -> None:
        self.headers = headers
        stored = sum(header.n_bytes for header in headers.values())
        self._reopen_after = min(REOPEN_AFTER, stored // _SHARE)
        self._path: Path | None = None
        self._file: Any = None
        self._n_bytes = 0

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.__exit__(*error)
        self._path = self._file = None

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name, as it is stored."""
        path = self.headers[name].path
        if path != self._path or self._n_bytes > self._reopen_after:
            self.__exit__(None, None, None)
            self._path, self._n_bytes = path, 0
            self._file = safe_open(path, framework="pt").__enter__()
        tensor: Tensor = self._file.get_tensor(name)
        self._n_bytes += tensor.nbytes
        return tensor
