"""The tables of hook names on reference/hooks.md, read off the code.

Each family's model is built small and random, from the configuration that its adapter makes of the
family's own ``config.json``, and run once. Names come from ``model.hook_dict``, shapes from the
activations, the order from the run, and conditions from switching one field of the configuration
at a time. Typed by hand are only the few words of ``MEANING`` and ``PLACES``; a hook without one,
or words without a hook, stop the build.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tl_looped import Injection, LoopedConfig, LoopedTransformer, NormLayout
from tl_looped.model.block import GATED_HOOKS
from tl_looped.model.geometry import LoopGeometry

_GOLDEN = Path(__file__).parents[2] / "tests" / "golden"

FAMILIES: dict[str, str | Path] = {
    "Huginn": _GOLDEN / "huginn",
    "Ouro": _GOLDEN / "ouro",
    "retrofitted Llama": _GOLDEN / "retrofit_llama",
    "retrofitted OLMo-2": _GOLDEN / "retrofit_olmo",
    "demo": "demo",
}
"""Folders with a family's ``config.json``, or names of bundled models."""

BATCH, POS = 2, 7
_SIZES = {
    "d_model": 50, "d_head": 10, "n_heads": 6, "n_key_value_heads": 3, "d_mlp": 44, "d_vocab": 97,
    "n_ctx": 64,
}  # fmt: skip
# Every size once, so that a number in a shape tells which one it is.
_SYMBOLS = {
    BATCH: "batch", POS: "pos", 6: "head", 3: "kv_head", 10: "d_head", 50: "d_model", 44: "d_mlp",
    97: "d_vocab", 1: "1", 60: "head × d_head", 30: "kv_head × d_head",
}  # fmt: skip
_FLAGS = tuple(dict.fromkeys(GATED_HOOKS.values()))

MEANING: dict[str, str] = {
    "hook_embed": "token embeddings",
    "hook_initial_state": "the state that recurrence 0 starts from",
    "hook_state_in": "the state, as it enters the recurrence",
    "hook_injected": "what the adapter makes of state and prelude output",
    "hook_state_out": "the state, as it leaves the recurrence",
    "hook_exit_gate": "logit of leaving the loop here",
    "hook_resid_pre": "residual stream before the layer",
    "hook_resid_mid": "residual stream between attention and MLP",
    "hook_resid_post": "residual stream after the layer",
    "hook_resid_mid_sum": "residual stream plus attention, before `ln_mid`",
    "hook_resid_post_sum": "residual stream plus MLP, before `ln_out`",
    "hook_attn_in": "a copy of the stream for each head",
    "hook_mlp_in": "residual stream that the MLP reads, before its norm",
    "hook_attn_out": "what attention adds to the stream",
    "hook_mlp_out": "what the MLP adds to the stream",
    "hook_q_input": "a copy of the stream for each head's queries",
    "hook_k_input": "a copy of the stream for each head's keys",
    "hook_v_input": "a copy of the stream for each head's values",
    "attn.hook_q": "queries, before the rotation",
    "attn.hook_k": "keys, before the rotation",
    "attn.hook_v": "values",
    "attn.hook_rot_q": "queries, rotated",
    "attn.hook_rot_k": "keys, rotated",
    "attn.hook_attn_scores": "scores, masked with -inf",
    "attn.hook_pattern": "attention weights",
    "attn.hook_z": "mixed values of each head, before W_O",
    "attn.hook_result": "each head's output, after W_O",
    "mlp.hook_pre": "gate, before its activation",
    "mlp.hook_pre_linear": "the linear branch",
    "mlp.hook_post": "neurons: activated gate times linear branch",
    "hook_scale": "denominator of the norm",
    "hook_normalized": "quotient of the norm, without its gain",
    "hook_in": "what the unembedding reads, gain included",
    "hook_out": "logits",
}
"""What is at a hook, by the longest fitting end of its name."""

PLACES: dict[str, str] = {
    "block": "every layer",
    "recurrence": "every recurrence",
    "global": "once a run",
}


@dataclass(frozen=True)
class Row:
    """One kind of hook.

    Attributes:
        pattern: Its name with ``{i}`` for an effective layer and ``{r}`` for a recurrence.
        shape: Names of the dimensions.
        place: A key of ``PLACES``.
        flag: The flag that must be on, or None.
    """

    pattern: str
    shape: tuple[str, ...]
    place: str
    flag: str | None

    @property
    def suffix(self) -> str:
        """The name within its block or recurrence."""
        return self.pattern.split("}.", 1)[-1]


def small(cfg: LoopedConfig, **changes: Any) -> LoopedConfig:
    """A configuration of the same family with the sizes of this module."""
    short = {"n_prelude": min(cfg.n_prelude, 1), "n_core": 1, "n_coda": min(cfg.n_coda, 1)}
    random = {"n_recurrences": 2, "init_mode": "fan_in", "device": "cpu"}
    return replace(cfg, **(_SIZES | short | random | changes))


def family_config(name: str) -> LoopedConfig:
    """What the family's adapter makes of its ``config.json``; no weight is read."""
    return LoopedTransformer.from_pretrained(FAMILIES[name], device="meta").cfg


def rows(cfg: LoopedConfig) -> list[Row]:
    """Every kind of hook of a model, in the order in which they fire."""
    found: dict[str, Row] = {}
    # hook_attn_in and the split inputs exclude each other, so that two runs see all flags.
    for flags in (_FLAGS[:2] + _FLAGS[3:], _FLAGS[2:]):
        model = LoopedTransformer.from_config(small(cfg))
        for flag in flags:
            getattr(model, f"set_{flag}")(True)
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.arange(BATCH * POS).reshape(BATCH, POS))
        known = set(model.hook_dict.canonical)
        if set(cache) != known:
            raise RuntimeError(f"hooks that do not fire: {known - set(cache)}")
        new = _kinds({name: tuple(cache[name].shape) for name in cache})
        found = _merged(list(found.values()), new)
    return list(found.values())


def _kinds(shapes: Mapping[str, tuple[int, ...]]) -> list[Row]:
    out: dict[str, Row] = {}
    for name, sizes in shapes.items():
        pattern = _pattern(name)
        place = {"b": "block", "r": "recurrence"}.get(pattern[0]) if "{" in pattern else "global"
        flag = GATED_HOOKS.get(pattern.split("}.", 1)[-1])
        row = Row(pattern, _symbols(pattern, sizes, flag), place or "global", flag)
        if out.setdefault(pattern, row) != row:
            raise RuntimeError(f"{pattern} has several shapes: {row.shape}, {out[pattern].shape}")
    return list(out.values())


def _pattern(name: str) -> str:
    name = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)
    return re.sub(r"^recurrence\.\d+\.", "recurrence.{r}.", name)


def _symbols(pattern: str, sizes: tuple[int, ...], flag: str | None) -> tuple[str, ...]:
    names = [_SYMBOLS[size] for size in sizes]
    if names[-2:] == ["pos", "pos"]:
        names[-2:] = ["query", "key"]
    if pattern.endswith(("ln1.hook_scale", "ln1.hook_normalized")) and len(names) == 4:
        del names[2]  # one a head while the inputs of the heads are split
    return tuple(names)


def _merged(first: list[Row], second: list[Row]) -> dict[str, Row]:
    """Both lists as one, every new row behind the one that it follows."""
    out = list(first)
    known = {row.pattern for row in first}
    for n, row in enumerate(second):
        if row.pattern in known:
            continue
        before = second[n - 1].pattern if n else ""
        at = next((i for i, one in enumerate(out, 1) if one.pattern == before), 0)
        out.insert(at, row)
        known.add(row.pattern)
    return {row.pattern: row for row in out}


def meaning(suffix: str) -> str:
    """The words for a hook."""
    fitting = [end for end in MEANING if suffix == end or suffix.endswith("." + end)]
    if not fitting:
        raise RuntimeError(f"hook_reference.MEANING has no words for {suffix}")
    return MEANING[max(fitting, key=len)]


def refuse_unused_words(suffixes: Iterable[str]) -> None:
    """Stop if ``MEANING`` has words for a hook that no model has."""
    unused = set(MEANING.values()) - {meaning(suffix) for suffix in suffixes}
    if unused:
        raise RuntimeError(f"hook_reference.MEANING has words for no hook: {sorted(unused)}")


def conditions() -> dict[str, str]:
    """For each kind of hook that some models lack: which field of the configuration gives it.

    Found by switching one field at a time, away from a plain model with prelude and coda.
    """
    plain = LoopedConfig(n_core=2, n_prelude=1, n_coda=1, **_SIZES)
    names = {layout: _suffixes(replace(plain, norm_layout=layout)) for layout in NormLayout}
    always = set.intersection(*names.values())
    out: dict[str, str] = {}
    for suffix in sorted(set.union(*names.values()) - always):
        layouts = ", ".join(f"`{layout.value}`" for layout in NormLayout if suffix in names[layout])
        out[suffix] = f"`norm_layout` {layouts}"
    switches: dict[str, Any] = {
        "injection": Injection.LINEAR, "loop_norm": True, "pre_coda_norm": True, "exit_gate": True,
        "qk_norm": True,
    }  # fmt: skip
    for field, value in switches.items():
        shown = f"`{field}`" if value is True else f"`{field}` `{value.value}`"
        for suffix in _suffixes(replace(plain, **{field: value})) - always:
            out.setdefault(suffix, shown)
    for suffix, flag in GATED_HOOKS.items():
        out[suffix] = f"with `{flag}`"
    return out


def _suffixes(cfg: LoopedConfig) -> set[str]:
    model = LoopedTransformer.from_config(small(cfg, device="meta"))
    return {_pattern(name).split("}.", 1)[-1] for name in model.hook_dict}


def markdown() -> str:
    """The generated part of the page."""
    table = {name: rows(family_config(name)) for name in FAMILIES}
    when = conditions()
    refuse_unused_words(row.suffix for found in table.values() for row in found)
    parts = [
        "## Aliases",
        "",
        *_aliases(),
        "",
        "## Which model has which",
        "",
        *_matrix(table, when),
    ]
    parts += ["", "## Names, shapes and order", "", _LEGEND, ""]
    for name, found in table.items():
        cfg = family_config(name)
        parts += [f'=== "{name}"', ""]
        parts += [f"    {line}".rstrip() for line in _family(cfg, found, when)]
        parts.append("")
    return "\n".join(parts)


_LEGEND = (
    "Rows are in the order in which the hooks of one layer, recurrence or run fire. `{i}` is an "
    "effective layer, `{r}` a recurrence. Sizes: `pos` tokens, `head` of `n_heads`, `kv_head` of "
    "`n_key_value_heads` (as many as heads without grouped-query attention), `query` and `key` "
    "positions. With `past_kv_cache`, `pos` and `query` are the new tokens and `key` is all of "
    "them. A method turns each flag on, `model.set_use_attn_result(True)`. While heads have inputs "
    "of their own (`use_attn_in`, `use_split_qkv_input`), `ln1` runs for queries, keys and values "
    "in turn, and its hooks have a dimension more, the head's; `blocks.{i}.attn.hook_q_input`, "
    "TransformerBridge's spelling, is an alias. With `ungroup_grouped_query_attention` keys and "
    "values have as many heads as queries."
)


def _family(cfg: LoopedConfig, found: list[Row], when: Mapping[str, str]) -> Iterable[str]:
    loop = LoopGeometry(cfg.n_prelude, cfg.n_core, cfg.n_coda, cfg.n_recurrences)
    yield (
        f"Norms `{cfg.norm_layout.value}`, injection `{cfg.injection.value}`, initial state "
        f"`{cfg.initial_state.value}`" + (", exit gate" * cfg.exit_gate) + "."
    )
    for place, title in PLACES.items():
        yield ""
        yield f"**{title.capitalize()}**" + _where(place, loop)
        yield ""
        yield "| name | shape | what | exists |"
        yield "|---|---|---|---|"
        for row in found:
            if row.place == place:
                yield (
                    f"| `{row.pattern}` | `[{', '.join(row.shape)}]` | {meaning(row.suffix)} "
                    f"| {'always' if row.flag is None else when[row.suffix]} |"
                )


def _where(place: str, loop: LoopGeometry) -> str:
    if place == "block":
        stages = [
            text
            for n, text in (
                (loop.p, "prelude `0..p-1`"),
                (loop.k, "core `p..p+kR-1`"),
                (loop.c, "coda `p+kR..p+kR+c-1`"),
            )
            if n
        ]
        return f", `{{i}}` in {', '.join(stages)}"
    return ", `{r}` in `0..R-1`" if place == "recurrence" else ""


def _matrix(table: Mapping[str, list[Row]], when: Mapping[str, str]) -> Iterable[str]:
    """Rows that some models lack; the two hooks of a norm, which come together, are one row."""
    has = {name: {row.pattern for row in found} for name, found in table.items()}
    yield "Left out are the names that all of these models have."
    yield ""
    yield "| name | because of | " + " | ".join(table) + " |"
    yield "|---|---|" + ":-:|" * len(table)
    patterns = {row.pattern: row.suffix for found in table.values() for row in found}
    for pattern, suffix in patterns.items():
        where = [pattern in found for found in has.values()]
        norm = pattern.removesuffix(".hook_scale")
        if all(where) or pattern.endswith(".hook_normalized"):
            continue
        if norm != pattern and where != [f"{norm}.hook_normalized" in one for one in has.values()]:
            raise RuntimeError(f"some model has only one of the two hooks of {norm}")
        shown = pattern if norm == pattern else f"{norm}.hook_*"
        marks = " | ".join("yes" if one else "" for one in where)
        yield f"| `{shown}` | {when[suffix]} | {marks} |"


def _aliases() -> Iterable[str]:
    model = LoopedTransformer.from_pretrained("demo", device="meta")
    p, last = model.loop.p, model.loop.R - 1
    yield (
        f"One hook point, several spellings. For `demo`, which is {model.loop} with "
        f"{model.cfg.n_layers} effective layers:"
    )
    yield ""
    yield "| written | is |"
    yield "|---|---|"
    spellings: list[Any] = [
        "prelude.0.hook_resid_post",
        "coda.1.hook_resid_post",
        f"recurrence.{last}.blocks.1.attn.hook_z",
        f"blocks.({last}, 1).attn.hook_z",
        ("z", (last, 1)),
        ("z", (-1, 1)),
        ("resid_post", p),
        ("resid_post", -1),
    ]
    for spelling in spellings:
        shown = f'("{spelling[0]}", {spelling[1]})' if isinstance(spelling, tuple) else spelling
        yield f"| `{shown}` | `{model.hook_name(spelling)}` |"
    yield ""
    yield (
        "A pair is `(recurrence, layer)` and means the core. Everything counts from 0; in pairs "
        "and tuples negative numbers count from the end, in dotted names they do not. Filter "
        "functions and iteration over a cache see the right column only. In a hook function, "
        "`hook.stage`, `hook.recurrence` and `hook.layer_in_stage` say where the hook stands."
    )
