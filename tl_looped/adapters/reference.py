"""How the authors' own code of a family is run, so that it can be compared with this package.

A declaration, read by ``tl_looped.verification``: which packages run the code, how it takes the
number of recurrences and the initial state, and where in its modules stand the activations that
have names here. It holds no code, and nothing of it is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tl_looped.checks import checked, whole
from tl_looped.errors import ConfigError
from tl_looped.model.config import LoopedConfig

_STAGES = {"prelude": "n_prelude", "recurrence": "n_core", "coda": "n_coda"}


@checked
@dataclass(frozen=True)
class Package:
    """A package that the authors' code needs.

    Args:
        name: Name on the package index.
        tested: Version that was tried. Another major version is refused; another minor one is
            noted in the finding.
    """

    name: str
    tested: str

    @property
    def pin(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.tested}"


@checked
@dataclass(frozen=True)
class Reference:
    """The authors' code of a family.

    Module patterns hold ``{l}`` for a layer of the stage; names of activations hold ``{r}`` for the
    recurrence as well. Of a module that runs once per recurrence, the calls in their order are the
    recurrences.

    Args:
        packages: What its environment needs beside Python.
        activations: Module pattern by hook name, such as
            ``"recurrence.{r}.blocks.{l}.hook_resid_post": "model.layers.{l}"``: the module's
            output, or the first of several, is that activation.
        rotary: Path of the buffer with the rotary frequencies ``[half]`` or the table of cosines
            and sines ``[1, position, 1, half, 2]``.
        rotary_is: Which of the two: ``"frequencies"`` or ``"table"``.
        norm_eps: Attribute of its norms that holds epsilon. A norm is found by the checkpoint's
            name of its gain.
        recurrences_argument: Argument of ``forward`` that takes the number of recurrences.
        recurrences_config: Fields of its config that are set before the model is made, each to the
            number of recurrences R plus the offset that is given here: ``{"total_ut_steps": 0}``
            sets it to R.
        state_argument: Argument of ``forward`` that takes the state of recurrence 0.
        arguments: Further arguments of ``forward``.
        auto_class: Class of transformers that opens the checkpoint.
    """

    packages: tuple[Package, ...]
    activations: Mapping[str, str]
    rotary: str
    rotary_is: Literal["frequencies", "table"] = "frequencies"
    norm_eps: str = "eps"
    recurrences_argument: str | None = None
    recurrences_config: Mapping[str, int] = field(default_factory=dict)
    state_argument: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    auto_class: str = "AutoModelForCausalLM"

    def __post_init__(self) -> None:
        if not self.packages:
            raise ConfigError("packages is empty: the authors' code needs transformers at least")
        for ours, theirs in self.activations.items():
            stage = ours.partition(".")[0]
            fields = set(re.findall(r"{(.*?)}", ours)), set(re.findall(r"{(.*?)}", theirs))
            allowed = {"l", "r"} if stage == "recurrence" else {"l"}
            if stage not in _STAGES or fields[0] - allowed or fields[1] != fields[0] - {"r"}:
                raise ConfigError(
                    f"activations: {ours!r} on {theirs!r} must be a hook name of {list(_STAGES)}, "
                    "with {l} in both or in neither and {r} in that of a recurrence alone"
                )

    @property
    def environment(self) -> str:
        """The command that makes an environment for it."""
        folder = "reference-" + "-".join(self.packages[0].pin.split("=="))
        pins = " ".join(package.pin for package in self.packages)
        return f"python3 -m venv {folder} && {folder}/bin/pip install {pins}"

    def places(self, cfg: LoopedConfig, n_recurrences: int) -> Iterator[tuple[str, str, int]]:
        """Every activation of a run: our name, their module, and the number of its call.

        Args:
            cfg: The model's.
            n_recurrences: Recurrences of the run.
        """
        n_recurrences = whole(n_recurrences, "n_recurrences")
        for ours, theirs in self.activations.items():
            size = getattr(cfg, _STAGES[ours.partition(".")[0]])
            for r in range(n_recurrences if "{r}" in ours else 1):
                for layer in range(size if "{l}" in ours else 1):
                    yield ours.format(r=r, l=layer), theirs.format(l=layer), r
