"""Checkpoints with code of their own, adapters that declare it, and an environment that runs it.

The code is ``by_hand.py`` beside this file, the interpreter that of a venv which borrows the
packages of the running one. The adapters are those of the package, but for the version of
transformers that they declare.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from conftest import GOLDEN
from rawcheckpoints import raw_config, write_checkpoint
from safetensors.torch import load_file

from tl_looped.adapters import (
    Adapter,
    HuginnAdapter,
    OuroAdapter,
    Package,
    RetrofitLlamaAdapter,
    RetrofitOlmoAdapter,
    register_adapter,
    unregister_adapter,
)

STYLES = {
    "huginn": ("huginn", HuginnAdapter),
    "retrofit_llama": ("llama", RetrofitLlamaAdapter),
    "retrofit_tinyllama": ("llama", RetrofitLlamaAdapter),
    "retrofit_olmo": ("olmo", RetrofitOlmoAdapter),
    "ouro": ("ouro", OuroAdapter),
}
INSTALLED = tuple(Package(name, version(name)) for name in ("transformers", "torch"))


def make_environment(folder: Path) -> Path:
    """An interpreter of its own that finds the packages of the running one, and not tl_looped."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(str(Path(torch.__file__).parent.parent))
    return folder / "bin" / "python"


def declared(of: type[Adapter], **changes: Any) -> Adapter:
    """An adapter of the package that declares the installed versions."""
    assert of.reference is not None
    reference = replace(of.reference, packages=INSTALLED)
    return type(of.__name__, (of,), {"reference": reference} | changes)()


def with_code(case: str, folder: Path, fault: str | None = None, **changes: Any) -> Path:
    """A golden checkpoint with its code."""
    kind = "Ouro" if case == "ouro" else "Raven"
    own = {"style": STYLES[case][0], "fault": fault, "marker": str(folder / "marker")}
    code = {"AutoConfig": f"by_hand.{kind}Config", "AutoModelForCausalLM": f"by_hand.{kind}Model"}
    raw = raw_config(case, by_hand=own, auto_map=code, **changes)
    write_checkpoint(folder, raw, load_file(GOLDEN / case / "model.safetensors"))
    shutil.copy(Path(__file__).parent / "by_hand.py", folder)
    return folder


@contextmanager
def registered(of: type[Adapter], **changes: Any) -> Iterator[None]:
    """That adapter in place of the package's own."""
    unregister_adapter(of.name)
    register_adapter(type(declared(of, **changes)))
    try:
        yield
    finally:
        unregister_adapter(of.name)
        register_adapter(of)
