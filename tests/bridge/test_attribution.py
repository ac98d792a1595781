"""TransformerLens's attribution and path patching of 4.x, unmodified, on looped models.

3.x has path patching too, but without the refusals that are tested here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import SAME, assert_rounded_once
from conftest import VARIANTS
from test_transformerlens_patching import ALL, CLEAN, CORRUPTED, metric, small
from torch import Tensor
from transformer_lens import patching
from transformer_lens.tools.analysis import attribution_patching as attribution

from tl_looped import LoopedTransformer, NormLayout


def edge_methods(model: LoopedTransformer) -> dict[str, Callable[[], Any]]:
    clean, corrupted = CLEAN[:1], CORRUPTED[:1]
    edges = attribution.EdgeAttributionConfig(granularity="edge")
    return {
        "direct path": lambda: patching.get_act_patch_direct_path(
            model,
            corrupted,
            model.run_with_cache(clean)[1],
            model.run_with_cache(corrupted)[1],
            metric,
            src_layer=0,
            src_head=0,
            verbose=False,
        ),
        "edge": lambda: attribution.attribution_patch(model, clean, corrupted, metric, edges),
        "faithfulness": lambda: attribution.faithfulness(model, clean, corrupted, metric, []),
    }


NOT_A_SUM = {
    "pre-injection": {},
    "residual-injection": {},
    "post-qk-norm": {},
    "sandwich-loop-norm": {},
    "post": {"norm_layout": NormLayout.POST},
    "residual": {"norm_layout": NormLayout.RESIDUAL},
    "loop norm": {"loop_norm": True},
    "norm before the coda": {"pre_coda_norm": True},
}


@pytest.mark.parametrize("method", ["direct path", "edge", "faithfulness"])
@pytest.mark.parametrize("kind", NOT_A_SUM)
def test_edge_methods_refuse_models_that_rescale_writes(kind: str, method: str) -> None:
    model = small(kind if kind in VARIANTS else "pre", **NOT_A_SUM[kind])
    refused = "normalized or scaled before the residual add"
    with pytest.raises(ValueError, match=refused):
        edge_methods(model)[method]()


def test_a_direct_path_adds_the_head_write_to_one_query_input() -> None:
    model = small()
    paths = edge_methods(model)["direct path"]()
    model.set_use_attn_result(True)
    clean, corrupted = (
        model.run_with_cache(tokens[:1])[1]["result", 0][:, :, 0] for tokens in (CLEAN, CORRUPTED)
    )
    model.set_use_attn_result(False)
    model.set_use_split_qkv_input(True)

    def add(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, 1] += clean - corrupted
        return value

    for layer in (2, 5):
        hooks = [(f"blocks.{layer}.attn.hook_q_input", add)]
        by_hand = metric(model.run_with_hooks(CORRUPTED[:1], fwd_hooks=hooks))
        assert_rounded_once(paths[layer, 1], by_hand)


def test_edge_attributions_of_a_plain_model_add_up_to_its_node_attributions() -> None:
    model = small(n_core=1)
    edges = edge_methods(model)["edge"]()
    nodes = attribution.attribution_patch(model, CLEAN[:1], CORRUPTED[:1], metric)
    assert edges.node_scores == pytest.approx(nodes.node_scores, abs=SAME)


@pytest.mark.parametrize("variant", VARIANTS)
def test_node_attribution_is_the_slope_of_the_activation_patch(variant: str) -> None:
    model = small(variant, dtype=torch.float64)
    clean, corrupted = CLEAN[:1], CORRUPTED[:1]
    scores = attribution.attribution_patch(model, clean, corrupted, metric).node_scores
    _, clean_cache = model.run_with_cache(clean)
    _, corrupted_cache = model.run_with_cache(corrupted)
    last = model.loop.n_layers - 1
    nodes = [attribution.Node("embed", 1)]
    for layer in (0, model.loop.index(1, 0), last):
        nodes += [
            attribution.Node("attn_head_out", 1, layer, 1),
            attribution.Node("mlp_out", 1, layer),
        ]
    for node in nodes:
        part = (ALL, node.position) if node.head is None else (ALL, node.position, node.head)
        delta = (clean_cache[node.hook_name] - corrupted_cache[node.hook_name])[part]

        def patched(step: float, node: Any = node, part: Any = part, delta: Tensor = delta) -> Any:
            def move(value: Tensor, hook: Any) -> Tensor:
                value = value.clone()
                value[part] += step * delta
                return value

            return metric(model.run_with_hooks(corrupted, fwd_hooks=[(node.hook_name, move)]))

        slope = (patched(1e-4) - patched(-1e-4)).item() / 2e-4
        assert scores[node] == pytest.approx(slope, rel=1e-5, abs=1e-7)
