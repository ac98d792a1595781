"""The registry, and a third party's family in one adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import GOLDEN
from rawcheckpoints import raw_config, write_checkpoint
from safetensors.torch import load_file

from tl_looped import (
    Adapter,
    CheckpointError,
    HubAlias,
    LoopedConfig,
    LoopedTransformer,
    OuroAdapter,
    RegistryError,
    Source,
    UnknownArchitectureError,
    known_adapters,
    register_adapter,
    unregister_adapter,
)
from tl_looped.model.parameters import parameter_names

pytestmark = pytest.mark.once


class ToyAdapter(Adapter):
    """A family nobody has heard of: own config keys, own tensor names."""

    name = "toy"
    aliases: ClassVar = {"toy-small": HubAlias("toys/small", 3)}

    def matches(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        return config.get("kind") == "toy"

    def config(self, config: Mapping[str, Any]) -> LoopedConfig:
        return LoopedConfig(
            architecture=self.name,
            d_model=config["width"], d_head=8, n_heads=2, d_mlp=24, n_ctx=32, d_vocab=11,
            n_prelude=1, n_core=config["depth"], n_recurrences=config["loops"],
        )  # fmt: skip

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        out = {name: Source((f"toy.{name}",)) for name in parameter_names(cfg)}
        for block in ("prelude.0", *(f"core.{i}" for i in range(cfg.n_core))):
            qkv = tuple(f"toy.{block}.{letter}" for letter in "qkv")
            out[f"{block}.attn.qkv"] = Source(qkv, rows=(16, 16, 16))
            out[f"{block}.ln1.w"] = Source(("toy.norms",), index=(0,))
            out[f"{block}.ln2.w"] = Source(("toy.norms",), index=(1,))
        return out


@pytest.fixture
def toy() -> Iterator[None]:
    assert register_adapter(ToyAdapter) is ToyAdapter
    yield
    if "toy" in known_adapters():
        unregister_adapter("toy")


@pytest.mark.usefixtures("toy")
def test_third_party_family_is_loaded_and_run(tmp_path: Path) -> None:
    raw = {"kind": "toy", "width": 16, "depth": 2, "loops": 3}
    reference = LoopedTransformer.from_config(ToyAdapter().config(raw))
    gains = torch.stack((torch.linspace(0.5, 1.5, 16), torch.linspace(1.5, 0.5, 16)))
    tensors = {"toy.norms": gains}
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.endswith(("ln1.w", "ln2.w")):
                p.copy_(gains[int(name.endswith("ln2.w"))])
            elif name.endswith(".attn.qkv"):
                block = name.removesuffix(".attn.qkv")
                for letter, part in zip("qkv", p.detach().split(16), strict=True):
                    tensors[f"toy.{block}.{letter}"] = part.clone()
            else:
                tensors[f"toy.{name}"] = p.detach().clone()
    write_checkpoint(tmp_path, raw, tensors)
    model = LoopedTransformer.from_pretrained(tmp_path, device="cpu")
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens), reference(tokens))
    model.save_pretrained(tmp_path / "again")
    again = LoopedTransformer.from_pretrained(tmp_path / "again", device="cpu")
    assert torch.equal(again(tokens), reference(tokens))
    unregister_adapter("toy")
    assert "toy" not in known_adapters()
    with pytest.raises(UnknownArchitectureError, match=r"huginn.*ouro"):
        LoopedTransformer.from_pretrained(tmp_path, device="cpu")


@pytest.mark.usefixtures("toy")
def test_a_taken_name_is_refused() -> None:
    class Impostor(ToyAdapter):
        aliases: ClassVar = {}

    with pytest.raises(RegistryError, match=r"'toy' is registered already \(ToyAdapter\)"):
        register_adapter(Impostor)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("alias", ["toy-small", "huginn"])
def test_a_taken_alias_is_refused(alias: str) -> None:
    class Impostor(ToyAdapter):
        name = "impostor"
        aliases: ClassVar = {alias: HubAlias("else/where")}

    with pytest.raises(RegistryError, match=alias):
        register_adapter(Impostor)
    assert "impostor" not in known_adapters()


def test_an_unknown_name_cannot_be_unregistered() -> None:
    with pytest.raises(RegistryError, match=r"'nobody'.*known: .*'huginn'"):
        unregister_adapter("nobody")


def test_a_checkpoint_that_two_adapters_claim_is_refused() -> None:
    class Claims(ToyAdapter):
        name = "claims-all"
        aliases: ClassVar = {}

        def matches(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
            return True

    register_adapter(Claims)
    try:
        with pytest.raises(UnknownArchitectureError, match=r"several .*\['claims-all', 'ouro'\]"):
            LoopedTransformer.from_pretrained(GOLDEN / "ouro", device="cpu")
    finally:
        unregister_adapter("claims-all")


def test_a_parameter_that_an_adapter_forgets_is_named(tmp_path: Path) -> None:
    class Forgetful(OuroAdapter):
        name = "forgetful"

        def matches(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
            return config.get("model_type") == "forgetful"

        def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
            made = super().sources(cfg)
            del made["core.1.attn.qkv"]
            return made

    Forgetful.aliases = {}
    register_adapter(Forgetful)
    try:
        raw = raw_config("ouro", model_type="forgetful", architectures=[])
        write_checkpoint(tmp_path, raw, load_file(GOLDEN / "ouro" / "model.safetensors"))
        with pytest.raises(CheckpointError, match=r"no source for \['core.1.attn.qkv'\]"):
            LoopedTransformer.from_pretrained(tmp_path, device="cpu")
    finally:
        unregister_adapter("forgetful")
