"""Reading and writing checkpoints: folders, the hub, the bundled demo.

Nothing from outside is trusted. Only ``config.json``, ``generation_config.json``, safetensors files
and tokenizer files are read; code of the checkpoint is never run and pickles are never opened.
Before a tensor is read, all names and shapes are compared with what the configuration implies, and
every difference is listed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from tl_looped._version import __version__
from tl_looped.adapters import (
    Adapter,
    all_aliases,
    find_adapter,
    get_adapter,
    known_adapters,
)
from tl_looped.adapters.mapping import give_values, problems, stored_tensors
from tl_looped.adapters.native import native_config
from tl_looped.adapters.stored import (
    Header,
    TensorReader,
    read_headers,
    refuse_quantised,
    refuse_sizes,
    tensor_files,
    wrong_dtypes,
)
from tl_looped.errors import CheckpointError, ConfigError, TLLoopedError
from tl_looped.files import is_file, is_folder
from tl_looped.model.bos import adds_bos
from tl_looped.model.config import LoopedConfig

BUNDLED = {
    name: Path(__file__).parent / "data" / name
    for name in ("demo", "demo-base", "demo-bare", "demo-control")
}
ALLOWED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
_GENERATION = "generation_config.json"
_NOT_OF_THE_FORMAT = ("dtype", "model_name", "init_mode", "initializer_range", "seed")
"""Fields of the machine, of the name, and of how random weights were once drawn."""


@dataclass(frozen=True)
class HubOptions:
    """How the hub is asked, in the words of its client.

    Args:
        cache_dir: Folder of downloads, in place of its own.
        token: For private and gated models, in place of the one that is logged in.
        local_files_only: Take what was downloaded before, and ask nobody.
        force_download: Download even what is there.
    """

    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    force_download: bool = False


@dataclass
class Checkpoint:
    """A folder that has been looked through and matched with an adapter.

    Args:
        folder: Where it is.
        name: What the user called it.
        raw: Its ``config.json``.
        headers: Every tensor's file, shape and dtype.
        adapter: The family.
        n_recurrences: Recurrences that the alias asks for, or None.
    """

    folder: Path
    name: str
    raw: dict[str, Any]
    headers: dict[str, Header]
    adapter: Adapter
    n_recurrences: int | None = None

    def config(self) -> LoopedConfig:
        """The model's configuration.

        Raises:
            ConfigError: a value that no supported model has, or a quantised checkpoint.
            CheckpointError: sizes far beyond those of the tensors.
        """
        refuse_quantised(self.raw, self.name)
        try:
            cfg = self.adapter.config(self.raw)
        except TLLoopedError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise ConfigError(
                f"{self.name}: config.json holds a value of the wrong kind "
                f"({type(error).__name__}: {error})"
            ) from error
        refuse_sizes(cfg, self.headers, self.name)
        # The name of a folder, not where it lies: a saved model should not tell its owner's paths.
        cfg.model_name = Path(self.name).name if is_folder(self.name) else self.name
        return cfg

    def generation_config(self) -> dict[str, Any]:
        """What holds of the folder's ``generation_config.json``; empty without one."""
        return self.adapter.generation_config(read_generation_config(self.folder))

    def tokenizer(self) -> Any:
        """The folder's tokenizer with the family's special tokens; None without one."""
        return self.tokenizer_of(self.folder)

    def tokenizer_of(self, folder: Path) -> Any:
        """The tokenizer of another folder, for this family."""
        tokenizer = read_tokenizer(folder)
        if tokenizer is not None:
            for kind, token in self.adapter.special_tokens(tokenizer).items():
                setattr(tokenizer, f"{kind}_token", token)
        return tokenizer

    def check(self, model: nn.Module) -> None:
        """Compare the tensors that there are with those that a model needs, none of them read.

        Args:
            model: Of this checkpoint's configuration, on any device.

        Raises:
            CheckpointError: missing, unexpected, mis-shaped or quantised tensors, all of them
                listed.
        """
        cfg = self.config()
        sources, duplicates = self.adapter.sources(cfg), self.adapter.duplicates(cfg)
        targets = {name: tuple(p.shape) for name, p in model.named_parameters()}
        shapes = {name: header.shape for name, header in self.headers.items()}
        used = [name for source in sources.values() for name in source.names] + [*duplicates]
        optional = self.adapter.ignored(cfg) | set(duplicates)
        found = problems(sources, targets, shapes, optional) + wrong_dtypes(self.headers, used)
        if found:
            listed = "\n  ".join(found)
            raise CheckpointError(
                f"{self.name} does not hold the tensors of a {self.adapter.name} model:\n  {listed}"
            )

    def load_into(
        self,
        model: nn.Module,
        device: torch.device | Mapping[str, torch.device],
        dtype: torch.dtype,
    ) -> None:
        """Give a model on the meta device its values.

        Every tensor goes from its mapped file straight to its device.

        Args:
            model: Its parameters are replaced; :meth:`check` has found its tensors in order.
            device: Of all of them, or of each by name.
            dtype: Of all of them.

        Raises:
            CheckpointError: a weight that is not finite, or a second copy of one that differs.
        """
        cfg = self.config()
        with self.reader() as read:
            for extra, original in self.adapter.duplicates(cfg).items():
                if extra in self.headers and not torch.equal(read(extra), read(original)):
                    raise CheckpointError(
                        f"{self.name}: {extra} is stored and differs from {original}, "
                        "but the config says that the two are tied"
                    )
            give_values(model, self.adapter.sources(cfg), read, device, dtype)

    def reader(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """What reads the tensors by name, while the context lasts."""
        return TensorReader(self.headers)


def generation_config_of(model: Any) -> dict[str, Any]:
    """That of a model in memory; empty where transformers made it up from the model's config."""
    found = getattr(model, "generation_config", None)
    if found is None or getattr(found, "_from_model_config", False):
        return {}
    values: dict[str, Any] = json.loads(found.to_json_string(use_diff=True))
    return values


def open_checkpoint(
    model_name: str | Path, revision: str | None = None, hub: HubOptions | None = None
) -> Checkpoint:
    """Find a checkpoint and match it with its adapter, without reading any tensor.

    Args:
        model_name: A bundled name or an alias, a local folder, or a hub id. A folder that is
            called like an alias is meant by ``./name`` or by a ``Path``.
        revision: Branch, tag or commit, for the hub only.
        hub: How the hub is asked.

    Raises:
        CheckpointError: nothing there, no safetensors, a damaged file.
        UnknownArchitectureError: no adapter recognises it.
    """
    name = str(model_name)
    alias = all_aliases().get(name)
    if isinstance(model_name, Path):
        alias = None
        if not is_folder(model_name):
            raise CheckpointError(f"{name} is not a folder; a checkpoint is one with a config.json")
        folder = model_name
    elif name in BUNDLED:
        folder = BUNDLED[name]
    elif alias is not None:
        folder = download(alias.hub_id, revision, hub)
    elif is_folder(name):
        folder = Path(name)
    elif is_file(name):
        raise CheckpointError(f"{name} is a file; a checkpoint is a folder with config.json in it")
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = download(name, revision, hub)
    else:
        known = ", ".join(sorted([*BUNDLED, *all_aliases()]))
        raise CheckpointError(
            f"{name!r} is neither a folder nor a hub id (owner/name) nor one of: {known}"
        )
    if revision is not None and (folder in BUNDLED.values() or is_folder(name)):
        raise CheckpointError(f"revision={revision!r} is for the hub, but {name} is a folder")
    raw = read_config(folder)
    headers = read_headers(tensor_files(folder))
    adapter = find_adapter(raw, set(headers))
    recurrences = alias.n_recurrences if alias else None
    return Checkpoint(folder, name, raw, headers, adapter, recurrences)


def download(
    hub_id: str,
    revision: str | None,
    hub: HubOptions | None = None,
    patterns: Iterable[str] = ALLOWED,
) -> Path:
    """The local copy of a hub checkpoint: config, safetensors and tokenizer, nothing else.

    Args:
        hub_id: Owner and name.
        revision: Branch, tag or commit; the main one if None.
        hub: How the hub is asked.
        patterns: Of the files' names.

    Raises:
        CheckpointError: it is not to be had.
    """
    try:
        found = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            **(asdict(hub) if hub is not None else {}),
        )
        return Path(found)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"cannot get {hub_id!r} (revision {revision or 'main'}) from the hub: {error}\n"
            "Check the name, the network, and HF_TOKEN for private or gated models; a folder "
            "downloaded elsewhere can be loaded by its path."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's ``config.json``."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json")
    return _read_object(path)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """A folder's ``generation_config.json`` as it is written; empty without one.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = folder / _GENERATION
    return _read_object(path) if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not an object")
    return raw


def read_tokenizer(folder: Path) -> Any:
    """A folder's ``tokenizer.json`` as it is, or None without one.

    The ``Auto`` classes may rebuild it or ask for the checkpoint's code.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{folder}/tokenizer.json cannot be read: {error}") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """While transformers loads a model: without its progress bars, which would mix with ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save(
    model: nn.Module,
    cfg: LoopedConfig,
    tokenizer: Any,
    folder: Path,
    format: str = "native",
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a model: all files aside first, then each renamed into place.

    Args:
        model: Its parameters are written.
        cfg: Its configuration.
        tokenizer: Written too, unless it is None.
        folder: Made if need be.
        format: ``"native"``, or ``"original"`` for that of the family ``cfg.architecture``.
        generation_config: Written as ``generation_config.json`` unless it is empty; one that
            another model left in the folder is removed.

    Raises:
        CheckpointError: no values, no such format, a folder that cannot be written to.
        ConfigError: the family's format cannot hold the model.
    """
    if any(p.device.type == "meta" for p in model.parameters()):
        raise CheckpointError("a model on the meta device has no values to save")
    state = {name: p.detach() for name, p in model.named_parameters()}
    if format == "native":
        raw = native_config(cfg, __version__)
    elif format == "original":
        if cfg.core_layers is not None or cfg.cell != "standard":
            raise ConfigError(
                f"the format of {cfg.architecture!r} holds neither core_layers={cfg.core_layers} "
                f"nor the cell {cfg.cell!r}: save with format='native'"
            )
        raw, state = in_original_format(cfg, state, tokenizer)
    else:
        raise CheckpointError(f"format must be 'native' or 'original', got {format!r}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CheckpointError(f"{folder} is a file; a checkpoint is saved as a folder") from error
    objects = {"config.json": raw}
    if generation_config:
        objects[_GENERATION] = dict(generation_config)
    _write(objects, state, tokenizer, folder)


def in_original_format(
    cfg: LoopedConfig, parameters: Mapping[str, Tensor], tokenizer: Any = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and tensors of a model in the format of its family.

    Whether the format can hold the model is not a list of rules: the configuration is read back and
    compared, field by field.

    Args:
        cfg: Its ``architecture`` names the family.
        parameters: By name.
        tokenizer: What is saved beside them; its habit stands for a BOS that the format does not
            record.

    Raises:
        ConfigError: no such family, none that can be written, or a field that is lost.
    """
    instead = "save_pretrained(folder) keeps everything, in tl_looped's own format"
    if cfg.architecture not in known_adapters():
        raise ConfigError(
            f"there is no checkpoint format of {cfg.architecture!r} models; {instead}"
        )
    adapter = get_adapter(cfg.architecture)
    raw = adapter.raw_config(cfg)
    if raw is None:
        raise ConfigError(f"the format of {cfg.architecture!r} is only read; {instead}")
    wanted, again = cfg.to_json(), adapter.config(raw).to_json()
    if again["default_prepend_bos"] is None and tokenizer is not None:
        again["default_prepend_bos"] = adds_bos(tokenizer)
    lost = [
        f"{name}={wanted[name]!r} would be read back as {again[name]!r}"
        for name in wanted
        if name not in _NOT_OF_THE_FORMAT and wanted[name] != again[name]
    ]
    if lost:
        raise ConfigError(
            f"the format of {cfg.architecture!r} cannot hold this model: {'; '.join(lost)}. "
            + instead
        )
    return raw, stored_tensors(adapter.sources(cfg), parameters)


def _write(
    objects: dict[str, dict[str, Any]], tensors: dict[str, Tensor], tokenizer: Any, folder: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as aside:
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        save_torch_state_dict(tensors, aside)
        for name, values in objects.items():
            text = json.dumps(values, indent=2) + "\n"
            (Path(aside) / name).write_text(text, encoding="utf-8")
        made = sorted(os.listdir(aside))
        mode = (Path(aside) / "config.json").stat().st_mode
        taken = [name for name in made if (folder / name).is_dir()]
        if taken:
            raise CheckpointError(f"{folder} has folders where files would be saved: {taken}")
        # config.json goes first and comes last: a folder without it is not taken for a checkpoint,
        # so an interrupted save never mixes two models.
        (folder / "config.json").unlink(missing_ok=True)
        stale_names = ("*.safetensors", "*.safetensors.index.json", _GENERATION)
        for stale in (path for pattern in stale_names for path in folder.glob(pattern)):
            if stale.name not in made:
                stale.unlink()
        for name in sorted(made, key=lambda n: n == "config.json"):
            os.chmod(Path(aside) / name, mode)  # the library writes tensors for the owner only
            os.replace(Path(aside) / name, folder / name)
