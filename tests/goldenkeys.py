"""Where in a run the activations of the golden cases stand."""

from __future__ import annotations

from typing import Any

from tl_looped import LoopedTransformer


def golden_keys(model: LoopedTransformer, is_raven: bool) -> dict[str, Any]:
    """Name of a golden tensor -> cache key, for every activation of a stage or of the loop."""
    loop = model.loop
    keys: dict[str, Any] = {"embed": "hook_embed"}
    for stage, n in (("prelude", loop.p), ("coda", loop.c)):
        for i in range(n):
            keys[f"{stage}.{i}"] = f"{stage}.{i}.hook_resid_post"
            keys[f"attn.{stage}.{i}"] = f"{stage}.{i}.attn.hook_pattern"
    for r in range(loop.R):
        keys[f"loop_out.{r}"] = f"recurrence.{r}.hook_state_out"
        for i in range(loop.k):
            keys[f"core.{r}.{i}"] = ("resid_post", (r, i))
            keys[f"attn.core.{r}.{i}"] = ("pattern", (r, i))
    if is_raven:
        keys |= {f"injected.{r}": f"recurrence.{r}.hook_injected" for r in range(loop.R)}
    return keys
