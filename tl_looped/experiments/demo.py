"""The demo: the bundled model on bundled word problems, at eight times its trained recurrences.

Each prompt runs alone, unpadded. Per core layer and recurrence: ColSum concentration of the
attention patterns (mean over heads), the step from the previous recurrence and the distance to the
last recurrence's state (both relative to the norm, mean over tokens); then mean, standard
deviation and the 10 and 90 % quantiles over prompts. Between all effective layers: attention
similarity, ``1 - d / sqrt(2 T)`` with d the Frobenius distance, so that 1 is the same pattern and
prompts of different lengths T can be averaged.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from tl_looped._version import __version__
from tl_looped.errors import DataError
from tl_looped.experiments.files import write_figure, write_text
from tl_looped.metrics import (
    colsum_concentration,
    fixed_point_distance,
    pairwise_attention_distance,
    successive_difference,
)
from tl_looped.model.geometry import LoopGeometry
from tl_looped.plots import by_recurrence, layer_heat_map
from tl_looped.transformer import LoopedTransformer

PROMPTS = Path(__file__).parents[1] / "data" / "word_problems.jsonl"
RECURRENCES = 32
STATE_SEED = 0

METRICS = {
    "colsum_concentration": "ColSum concentration (0 even, 1 one key)",
    "step": "relative step ||x_r - x_(r-1)|| / ||x_r||",
    "distance": "relative distance ||x_r - x_last|| / ||x_last||",
}


@dataclass(frozen=True)
class DemoResult:
    """Numbers of a demo run.

    Args:
        loop: Geometry of the run.
        numbers: One row a metric, recurrence and layer: mean, standard deviation, quantiles and
            number of prompts.
        similarity: ``[effective layer, effective layer]``, mean over heads and prompts.
        settings: What was run.
    """

    loop: LoopGeometry
    numbers: pd.DataFrame
    similarity: np.ndarray
    settings: dict[str, Any]

    def grid(self, metric: str, column: str = "mean") -> np.ndarray:
        """One metric as ``[recurrence, layer]``."""
        rows = self.numbers[self.numbers["metric"] == metric]
        table = rows.pivot(index="recurrence", columns="layer", values=column)
        return table.to_numpy(dtype=float)


def read_prompts(path: Path = PROMPTS) -> list[str]:
    """The questions of a jsonl file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines if line.strip()]


@torch.inference_mode()
def run_demo(
    model: LoopedTransformer,
    prompts: list[str],
    n_recurrences: int = RECURRENCES,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> DemoResult:
    """Run the demo's metrics on a model.

    Args:
        model: Any looped model with a tokenizer.
        prompts: Texts; each runs alone.
        n_recurrences: Recurrences of every run.
        track: Wraps the prompts, for a progress bar.

    Raises:
        DataError: if there is no prompt.
    """
    if not prompts:
        raise DataError("there is no prompt to run")
    collected: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    similarity: torch.Tensor | float = 0.0
    trained = model.loop.R
    keep = ("hook_pattern", "hook_resid_post")
    with model.recurrences(n_recurrences):
        loop = model.loop
        for prompt in track(prompts):
            _, cache = model.run_with_cache(
                prompt,
                names_filter=lambda name: name.endswith(keep),
                state_seed=STATE_SEED,
                return_type=None,
                remove_batch_dim=True,
            )
            states = cache.stack_recurrences("resid_post")
            patterns = cache.stack_recurrences("pattern")
            for name, values in (
                ("colsum_concentration", colsum_concentration(patterns).mean(-1)),
                ("step", successive_difference(states, "rel")),
                ("distance", fixed_point_distance(states, "rel")),
            ):
                collected[name].append(values.numpy())
            every = cache.stack_activation("pattern")
            distance = pairwise_attention_distance(every)
            similarity = similarity + (1 - distance / math.sqrt(2 * every.shape[-1]))
    assert isinstance(similarity, torch.Tensor)
    return DemoResult(
        loop=loop,
        numbers=_tidy(collected),
        similarity=(similarity / len(prompts)).numpy(),
        settings={
            "model": model.cfg.model_name,
            "shape": str(loop),
            "prompts": len(prompts),
            "recurrences": n_recurrences,
            "trained_recurrences": trained,
            "state_seed": STATE_SEED,
            "dtype": str(model.cfg.dtype),
            "tl_looped": __version__,
            "transformer_lens": version("transformer-lens"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    )


def _tidy(collected: dict[str, list[np.ndarray]]) -> pd.DataFrame:
    rows = []
    for metric, per_prompt in collected.items():
        stacked = np.stack(per_prompt)
        for r, layer in np.ndindex(*stacked.shape[1:]):
            values = stacked[:, r, layer]
            values = values[~np.isnan(values)]
            n = len(values)
            mean = values.mean() if n else math.nan
            sd = values.std(ddof=1) if n > 1 else math.nan
            low, high = np.quantile(values, (0.1, 0.9)) if n else (math.nan, math.nan)
            rows.append((metric, r, layer, mean, sd, low, high, n))
    columns = ["metric", "recurrence", "layer", "mean", "sd", "p10", "p90", "prompts"]
    return pd.DataFrame(rows, columns=columns)


def figures(result: DemoResult) -> dict[str, Figure]:
    """The demo's four figures by file name."""
    settings = result.settings
    caption = (
        f"{settings['model']} {settings['shape']}, {settings['prompts']} word problems, "
        f"state seed {settings['state_seed']}; lines are means, bands 10 to 90 % of prompts"
    )
    titles = {
        "colsum_concentration": "How concentrated attention is, by recurrence",
        "step": "How far the state moves from one recurrence to the next",
        "distance": "How far the state is from that of the last recurrence",
    }
    out = {
        name: by_recurrence(
            result.grid(name),
            result.grid(name, "p10"),
            result.grid(name, "p90"),
            titles[name],
            label,
            caption,
            trained=settings["trained_recurrences"],
            log=name != "colsum_concentration",
        )
        for name, label in METRICS.items()
    }
    loop = result.loop
    starts = [loop.index(r, 0) for r in range(loop.R)]
    shown = [r for r in range(loop.R) if r % max(1, loop.R // 8) == 0]
    labels = [(loop.index(r, 0) + (loop.k - 1) / 2, f"r{r}") for r in shown]
    if loop.p:
        labels.insert(0, ((loop.p - 1) / 2, "prelude"))
    if loop.c:
        labels.append((loop.n_layers - (loop.c + 1) / 2, "coda"))
    out["attention_similarity"] = layer_heat_map(
        result.similarity,
        [*starts, loop.n_layers - loop.c],
        labels,
        "Attention similarity between all effective layers",
        "1 - Frobenius distance / sqrt(2 T), mean over heads",
        caption.split(";")[0] + "; mean over heads and prompts",
    )
    return out


def write_demo(result: DemoResult, out: Path) -> list[Path]:
    """Write figures, numbers and settings; every file is complete or not there.

    Returns:
        The files, in the order a reader wants them.
    """
    written = [write_figure(figure, out / f"{n}.png") for n, figure in figures(result).items()]
    # Six digits: the same on every run, and more than the spread over prompts supports.
    numbers = result.numbers.to_csv(index=False, float_format="%.6g")
    written.append(write_text(numbers, out / "numbers.csv"))
    labels = result.loop.labels()
    matrix = pd.DataFrame(result.similarity, index=labels, columns=labels)
    text = matrix.to_csv(float_format="%.6g", index_label="effective_layer")
    written.append(write_text(text, out / "attention_similarity.csv"))
    settings = json.dumps(result.settings, indent=2) + "\n"
    written.append(write_text(settings, out / "settings.json"))
    return written
