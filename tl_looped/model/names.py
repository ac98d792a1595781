"""Hook names: canonical ones, their aliases, and helpful refusals.

Canonical are ``blocks.{i}.…`` with i the effective layer, ``recurrence.{r}.hook_…`` for the loop's
own hooks, and the global ones (``hook_embed``, ``ln_final.hook_scale``, …). Aliases name the same
HookPoint, never a second one:

- ``recurrence.{r}.blocks.{l}.…``, ``prelude.{l}.…``, ``coda.{l}.…``
- ``blocks.(r, l).…``, which is what TransformerLens's ``get_act_name("z", (r, l))`` returns
- ``blocks.{i}.attn.hook_q_input``, TransformerBridge's name of ``blocks.{i}.hook_q_input``, and so
  for keys and values
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

from tl_looped.errors import GatedHookError, HookNameError
from tl_looped.model.block import GATED_HOOKS
from tl_looped.model.geometry import LoopGeometry

_TUPLE = re.compile(r"blocks\.\((-?\d+), ?(-?\d+)\)\.(.+)")
_RECURRENCE_BLOCK = re.compile(r"recurrence\.(\d+)\.blocks\.(\d+)\.(.+)")
_STAGE = re.compile(r"(prelude|coda)\.(\d+)\.(.+)")
_BLOCK = re.compile(r"blocks\.(-?\d+)\.(.+)")
# TransformerBridge's spelling; get_act_name("q_input", i) leaves the component out.
_ATTENTION_INPUT = re.compile(r"^(.*[\d)])\.attn\.(hook_[qkv]_input)$")
_RECURRENCE = re.compile(r"recurrence\.(\d+)\.(.+)")

WHY_NONE: dict[str, str] = {
    "hook_pos_embed": (
        "positions are rotations of queries and keys (attn.hook_rot_q, attn.hook_rot_k), and "
        "nothing is added to the stream for them"
    ),
    "hook_tokens": "edit the tokens and run the model on them: a run takes any",
}
"""Hooks of HookedTransformer's that no looped model has, and why."""

_BRIDGE_NAMES: dict[str, str] = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "ln1.hook_in": "hook_resid_pre",
    "ln2.hook_in": "hook_resid_mid",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "attn.hook_attn_in": "hook_attn_in",
    "attn.hook_out": "hook_attn_out",
    "mlp.gate.hook_out": "mlp.hook_pre",
    "mlp.in.hook_out": "mlp.hook_pre_linear",
    "mlp.out.hook_in": "mlp.hook_post",
    "mlp.hook_out": "hook_mlp_out",
    "ln1_post.hook_out": "hook_attn_out",
    "ln2_post.hook_out": "hook_mlp_out",
    "embed.hook_out": "hook_embed",
}
"""TransformerBridge's names, within a block or global, of activations that have others here."""

_POST_NORMS = {"attn.hook_out": "ln1_post", "mlp.hook_out": "ln2_post"}
"""Sublayers' own outputs, and the norms behind which they are another activation than ours."""


def canonical_name(name: str, loop: LoopGeometry) -> str:
    """The canonical spelling of a hook name; a name that is not an alias is returned as it is.

    Raises:
        LayerIndexError: if an alias names a recurrence or layer out of range.
    """
    name = _ATTENTION_INPUT.sub(r"\1.\2", name)
    if match := _TUPLE.fullmatch(name):
        return f"blocks.{loop.index(int(match[1]), int(match[2]))}.{match[3]}"
    if match := _RECURRENCE_BLOCK.fullmatch(name):
        return f"blocks.{loop.index(int(match[1]), int(match[2]))}.{match[3]}"
    if match := _STAGE.fullmatch(name):
        stage_index = loop.prelude_index if match[1] == "prelude" else loop.coda_index
        return f"blocks.{stage_index(int(match[2]))}.{match[3]}"
    return name


def resolve_name(name: str, loop: LoopGeometry, known: Mapping[str, object]) -> str:
    """The canonical name of a hook that exists now, or an error that says why there is none.

    Args:
        name: Canonical name or alias.
        loop: Geometry at the current number of recurrences.
        known: Canonical names of the hooks that exist.

    Raises:
        HookNameError: unknown name, with the valid ranges or near matches.
        GatedHookError: the hook exists only while a flag is on.
        LayerIndexError: an alias out of range.
    """
    canonical = canonical_name(name, loop)
    if canonical in known:
        return canonical
    if match := _BLOCK.fullmatch(canonical):
        i, suffix = int(match[1]), match[2]
        if not 0 <= i < loop.n_layers:
            raise HookNameError(
                f"hook {name!r}: effective layer {i} is out of range; at R={loop.R} the model of "
                f"shape {loop} has layers 0..{loop.n_layers - 1}. set_recurrences changes R."
            )
        if suffix in GATED_HOOKS:
            flag = GATED_HOOKS[suffix]
            raise GatedHookError(
                f"hook {name!r} exists only while cfg.{flag} is on: call model.set_{flag}(True)"
            )
        raise HookNameError(_unknown(name, suffix, known, f"blocks.{i}."))
    if match := _RECURRENCE.fullmatch(canonical):
        r, suffix = int(match[1]), match[2]
        if r >= loop.R:
            raise HookNameError(
                f"hook {name!r}: recurrence {r} is out of range; at R={loop.R} valid are "
                f"0..{loop.R - 1}. set_recurrences changes R."
            )
        raise HookNameError(_unknown(name, suffix, known, f"recurrence.{r}."))
    raise HookNameError(_unknown(name, canonical, known, ""))


def bridge_spelling(name: str) -> str | None:
    """TransformerBridge's spelling of a canonical name, if it has another that is an alias here."""
    match = re.fullmatch(r"(blocks\.\d+)\.(hook_[qkv]_input)", name)
    return f"{match[1]}.attn.{match[2]}" if match else None


def own_name(name: str, known: Collection[str]) -> str | None:
    """The name here of an activation that TransformerBridge calls by another, or None.

    Args:
        name: TransformerBridge's.
        known: Canonical names that there are; the name here is one of them.
    """
    match = _BLOCK.fullmatch(name)
    prefix, suffix = (f"blocks.{int(match[1])}.", match[2]) if match else ("", name)
    own, post = _BRIDGE_NAMES.get(suffix), _POST_NORMS.get(suffix)
    if own is None or (post is not None and f"{prefix}{post}.hook_scale" in known):
        return None
    return prefix + own if prefix + own in known else None


def _unknown(name: str, suffix: str, known: Collection[str], prefix: str) -> str:
    if suffix in WHY_NONE:
        return f"there is no hook {name!r}: {WHY_NONE[suffix]}"
    if (own := own_name(name, known)) is not None:
        return f"hook {name!r} is TransformerBridge's name: here it is {own!r}"
    # Comparing within one block keeps this fast at tens of thousands of hooks.
    if prefix:
        candidates = [n.removeprefix(prefix) for n in known if n.startswith(prefix)]
    else:
        candidates = [n for n in known if not n.startswith(("blocks.", "recurrence."))]
        candidates += [n for n in known if n.startswith(("blocks.0.", "recurrence.0."))]
    near = difflib.get_close_matches(suffix, candidates, n=4, cutoff=0.4) or candidates[:4]
    shown = ", ".join(prefix + n for n in near)
    return f"there is no hook {name!r}; near matches: {shown}"
