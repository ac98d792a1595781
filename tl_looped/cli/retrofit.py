"""``tl-looped retrofit``."""

from __future__ import annotations

import json
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_looped.cli.console import console, note
from tl_looped.cli.runs import Dtype, Revision
from tl_looped.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tl_looped import LoopedTransformer


class ModeName(str, Enum):
    """Modes of ``tl_looped.retrofit``, repeated here so that ``--help`` imports nothing."""

    RETROFIT = "retrofit"
    VIRTUAL_LOOP = "virtual-loop"


class FormatName(str, Enum):
    """Formats of ``LoopedTransformer.save_pretrained``."""

    AUTO = "auto"
    ORIGINAL = "original"
    NATIVE = "native"


def retrofit(
    model: Annotated[
        str, typer.Argument(help="Hub id or folder of a Llama, OLMo-2, Mistral or Qwen2/3.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the looped model.")],
    core: Annotated[str, typer.Option(help="Layers of the loop: 6-11, or 6,8-10.")],
    prelude: Annotated[
        str | None,
        typer.Option(help="Layers before the loop; all before the core if left out, '' for none."),
    ] = None,
    coda: Annotated[
        str | None,
        typer.Option(help="Layers after the loop; all after the core if left out, '' for none."),
    ] = None,
    mode: Annotated[
        ModeName,
        typer.Option(
            help="retrofit: the loop takes its input through an adapter [0 | I], to be trained. "
            "virtual-loop: the core runs again on its own output."
        ),
    ] = ModeName.RETROFIT,
    recurrences: Annotated[int, typer.Option(help="How often the loop runs.")] = 4,
    dtype: Dtype = "float32",
    format: Annotated[
        FormatName,
        typer.Option(
            help="original: that of the published retrofits. native: tl_looped's own. "
            "auto: original where it can hold the model."
        ),
    ] = FormatName.AUTO,
    revision: Revision = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Whether the model reads text with BOS; as its tokenizer does if left out.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the looped model in OUT.")
    ] = False,
) -> None:
    """Make a looped model of a feedforward one: some layers loop, those not named are dropped.

    Example: tl-looped retrofit meta-llama/Llama-3.2-1B looped --prelude 0-3 --core 6-11
    --coda 12-15
    """
    _check_out(out, overwrite)
    if mode is ModeName.VIRTUAL_LOOP and format is FormatName.ORIGINAL:
        raise ConfigError(
            "format original is that of retrofits, and a virtual loop has no adapter: --format "
            "native, or leave it out"
        )
    from tl_looped import retrofit as make
    from tl_looped.retrofitting import parse_layers

    stages = {"prelude": prelude, "core": core, "coda": coda}
    layers: dict[str, Any] = {
        stage: None if text is None else parse_layers(text) for stage, text in stages.items()
    }
    looped = make(
        model,
        **layers,
        mode=mode.value,
        n_recurrences=recurrences,
        device="cpu",
        dtype=dtype,
        revision=revision,
        default_prepend_bos=bos,
    )
    saved_as = _save(looped, out, format)
    _tell(looped, out, saved_as)


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, before gigabytes are read for nothing."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; a looped model is saved as a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not _holds_looped_model(out):
        raise CheckpointError(f"{out} is not empty and holds no looped model; name a new folder")
    if not overwrite:
        raise CheckpointError(
            f"{out} holds a looped model already; name a new folder, or replace it by --overwrite"
        )


def _holds_looped_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in ("tl_looped", "huginn_raven")


def _save(looped: LoopedTransformer, out: Path, format: FormatName) -> str:
    """Save, and leave no empty folder if that fails.

    Returns:
        The format that was chosen.
    """
    from safetensors import SafetensorError

    from tl_looped.checkpoints import in_original_format

    chosen = format.value
    if format is FormatName.AUTO:
        chosen = "original"
        try:
            in_original_format(looped.cfg, dict(looped.named_parameters()), looped.tokenizer)
        except ConfigError as error:
            chosen = "native"
            note(f"saved in tl_looped's own format, because {error}")
    is_new = not out.exists()
    try:
        looped.save_pretrained(out, format=chosen)
    except BaseException as error:
        if is_new:
            with suppress(OSError):
                out.rmdir()  # only if it is empty
        if isinstance(error, SafetensorError):
            raise CheckpointError(f"{out} cannot be written: {error}") from error
        raise
    return chosen


def _tell(looped: LoopedTransformer, out: Path, saved_as: str) -> None:
    cfg, layers = looped.cfg, looped.cfg.source_layers or {}
    shape = f"({cfg.n_prelude}, {cfg.n_core} x {cfg.n_recurrences}, {cfg.n_coda})"
    console.print(
        f"{shape}, {cfg.n_layers} effective layers, of {layers['model']}:", highlight=False
    )
    for stage in ("prelude", "core", "coda"):
        text = ", ".join(map(str, layers[stage])) or "none"
        console.print(f"  {stage}: layers {text}", highlight=False, soft_wrap=True)
    if looped.tokenizer is None:
        note("the source has no tokenizer.json, so the looped model takes token ids only")
    else:
        console.print(looped.describe_bos(), highlight=False, soft_wrap=True)
    console.print(f"Saved in [bold]{out.resolve()}[/bold], {saved_as} format", soft_wrap=True)
