"""Fixtures: the five golden cases, and small random models of every kind.

The tree follows the house: a room of the package has its tests in the folder of the same name, and
what belongs to no room (README, docs, notebooks, files) is in ``package``. Names of test files are
unique across the folders. Modules beside this one are helpers, imported by their names.

Three lanes read two marks:

* ``make test``, some minutes: every promise with one family or layout of blocks, the first that its
  test names. What is marked ``every_family`` (golden parity, what adapters read) runs with all.
  Annotations are not checked at run time.
* ``make test-all``: everything, and every call's arguments and results against the annotations.
  ``full`` marks what it alone has: trainings, processes, notebooks, pages, whole experiments.
* ``make test-lanes``: the sums of floats on other kernels, without what is marked ``once``.

Beside them, ``make real`` fetches a pretrained model (93 MB) and runs ``tests/real`` on it; no
other lane collects that folder.

``pytest tests/model`` and the like run as in ``make test-all``.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_looped import (
    InitialState,
    Injection,
    LoopedConfig,
    LoopedTransformer,
    NormLayout,
    RotaryStyle,
)

# One major version of TransformerLens has what each of these directories tests: 4.x its new tools,
# 3.x HookedTransformer, which 4.0 removed. `make test` and `make compat` run one each, and
# `make outside` what needs other people's libraries.
collect_ignore = ["compat" if int(version("transformer-lens").split(".")[0]) >= 4 else "bridge"]
if find_spec("sae_lens") is None:
    collect_ignore.append("outside")

# One of the lanes of `make test-lanes`.
if os.environ.get("TL_LOOPED_MKLDNN") == "off":
    torch.backends.mkldnn.enabled = False

GOLDEN = Path(__file__).parent / "golden"
CASES = ("huginn", "retrofit_llama", "retrofit_tinyllama", "retrofit_olmo", "ouro")
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``tests/real`` is collected where it is asked for by its path: its model must be fetched."""
    real = Path(__file__).parent / "real"
    if collection_path != real:
        return None
    asked = (Path(config.invocation_params.dir, x.split("::")[0]) for x in config.args)
    return None if any(real in (path, *path.parents) for path in asked) else True


def family_of(item: pytest.Item) -> str | None:
    """The golden case or layout that a test runs with."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return next((x for x in values if isinstance(x, str) and (x in CASES or x in VARIANTS)), None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All families of a promise but the first are ``full``."""
    first: dict[Any, str] = {}
    for item in items:
        family = family_of(item)
        if family is None or item.get_closest_marker("every_family"):
            continue
        if family != first.setdefault(item.function, family):
            item.add_marker(pytest.mark.full)


@dataclass(frozen=True)
class Golden:
    """A reference checkpoint and what the authors' code computes from it."""

    name: str
    folder: Path
    tensors: dict[str, Tensor]

    @property
    def run(self) -> dict[str, Any]:
        """Arguments of the reference run besides the tokens."""
        return {"initial_state": self.tensors["initial_state"]} if self.is_raven else {}

    @property
    def is_raven(self) -> bool:
        return self.name != "ouro"

    @property
    def tokens(self) -> Tensor:
        return self.tensors["input_ids"]

    def load(self, **kwargs: Any) -> LoopedTransformer:
        return LoopedTransformer.from_pretrained(self.folder, device="cpu", **kwargs)


def load_golden(name: str) -> Golden:
    return Golden(name, GOLDEN / name, load_file(GOLDEN / name / "golden.safetensors"))


def copy_of(name: str, folder: Path) -> Path:
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, folder)
    return folder


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The kernel refuses longer files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture
def golden_model(golden: Golden) -> LoopedTransformer:
    return golden.load()


def random_config(**changes: Any) -> LoopedConfig:
    """A (2, 3 x 4, 1) model of 32 dimensions that `changes` turns into what a test needs."""
    values: dict[str, Any] = {
        "d_model": 32,
        "d_head": 8,
        "n_heads": 4,
        "d_mlp": 48,
        "n_ctx": 64,
        "d_vocab": 50,
        "n_prelude": 2,
        "n_core": 3,
        "n_coda": 1,
        "n_recurrences": 4,
        "init_mode": "fan_in",
        "device": "cpu",
        "default_prepend_bos": False,
    }
    return LoopedConfig(**(values | changes))


# A (1, 1 x 2, 1) model of eight dimensions, as a dictionary: for tests of what is refused.
TINY: dict[str, Any] = {
    "d_model": 8, "d_head": 4, "n_heads": 2, "n_ctx": 32, "d_vocab": 11, "d_mlp": 8,
    "n_prelude": 1, "n_core": 1, "n_coda": 1, "n_recurrences": 2, "injection": "linear",
    "initializer_range": 0.3,
}  # fmt: skip


def exact_config(**changes: Any) -> LoopedConfig:
    """The same in fp64.

    For tests that compare two runs: they compare what is computed, and not how this processor
    rounds. See closeness.py.
    """
    return random_config(**({"dtype": torch.float64} | changes))


# One model of every norm layout, with and without injection, grouped heads, gate, loop norm. The
# first, with the most parts, is that of `make test`.
VARIANTS: dict[str, dict[str, Any]] = {
    "residual-injection": {
        "norm_layout": NormLayout.RESIDUAL,
        "injection": Injection.LINEAR,
        "initial_state": InitialState.RANDOM,
        "initial_state_std": 0.5,
        "pre_coda_norm": True,
        "qk_bias": True,
        "rotary_style": RotaryStyle.INTERLEAVED,
        "rotary_in_fp32": True,
        "tie_embeddings": True,
    },
    "pre": {},
    "pre-injection": {
        "injection": Injection.LINEAR,
        "initial_state": InitialState.RANDOM,
        "initial_state_std": 0.5,
    },
    "post-qk-norm": {"norm_layout": NormLayout.POST, "qk_norm": True, "n_key_value_heads": 2},
    "sandwich-loop-norm": {
        "norm_layout": NormLayout.SANDWICH,
        "loop_norm": True,
        "exit_gate": True,
        "n_prelude": 0,
        "n_coda": 0,
    },
}


def with_gains(model: LoopedTransformer) -> LoopedTransformer:
    """The model with gains that are not one, biases that are not zero: what is left out shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".w"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("_bias"):
                parameter.normal_(generator=generator)
    return model


@pytest.fixture(scope="module")
def plain() -> LoopedTransformer:
    """(2, 3 x 4, 1) without injection, in fp64."""
    return LoopedTransformer.from_config(exact_config())


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config(**VARIANTS[request.param]))


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def exact_bridges(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens 4's attention in fp64 where the model is in fp64.

    Its softmax and its rotation of interleaved pairs are in fp32 whatever the model is. With this
    fixture a bridge in fp64 is compared as exactly as anything else; what the fp32 parts do to a
    bridge's numbers is a test of its own.
    """
    from transformer_lens.model_bridge.generalized_components import (
        position_embeddings_attention as module,
    )

    softmax = module.PositionEmbeddingsAttentionBridge._masked_softmax

    def softmax_as_scores(self: Any, scores: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(self, scores, None if scores.dtype == torch.float64 else dtype)

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **layout: bool) -> Any:
        assert layout == {"relayout_cos_sin": False}
        turned = (torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k))
        cos, sin = cos[:, None].to(q.dtype), sin[:, None].to(q.dtype)
        return tuple(x * cos + y * sin for x, y in zip((q, k), turned, strict=True))

    monkeypatch.setattr(
        module.PositionEmbeddingsAttentionBridge, "_masked_softmax", softmax_as_scores
    )
    monkeypatch.setattr(module, "_apply_rotary_pos_emb_adjacent_pairs", rotated)


@pytest.fixture
def as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own for code of a page, and the mode of autograd of before behind it."""
    monkeypatch.chdir(tmp_path)
    grad = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(grad)
