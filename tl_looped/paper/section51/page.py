"""Figures and the page of Section 5.1, ``section-5.1.html``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from tl_looped.errors import InputError
from tl_looped.experiments.drawing import save_figures
from tl_looped.paper.figures import draw
from tl_looped.paper.section51.data import Section51
from tl_looped.paper.section51.models import CONTROL, FIGURES_OF, Measured
from tl_looped.paper.section51.statistics import N_PERMUTATIONS
from tl_looped.paper.section51.training import HELD_OUT_ROWS
from tl_looped.plots.recipes import TITLES
from tl_looped.plots.small_models import (
    loss_over_recurrences,
    steps_over_recurrences,
    training_curves,
)
from tl_looped.report.exhibits import named_figures
from tl_looped.report.page import table_of, write_page
from tl_looped.report.parts import PagePart

_PAGE = "section-5.1.html"


def draw_section51(
    measured: Sequence[Measured],
    found: Section51,
    folder: Path,
    command: str,
    say: Callable[[str], None],
) -> list[Path]:
    """Draw Figures 10, 54, 55, 57 and 60, the curves and the steps; what cannot be drawn is said.

    Args:
        measured: Results of every model and seed.
        found: Tables of the same.
        folder: Where figures go.
        command: That made them.
        say: Gets notices.
    """
    runs: dict[str, list[object]] = {}
    for one in measured:
        runs.setdefault(one.trained.configuration, []).append(one.stages)
    control = runs.get(CONTROL)
    models = found.models
    most = int(models.steps["recurrences"].max()) if len(models.steps) else 0
    long = {name: models.runs(name, most) for name in models.looped} if most else {}
    trained = {models.about["models"][name]["recurrences"] for name in models.looped}
    mark = trained.pop() if len(trained) == 1 else None
    wanted: dict[str, Callable[[], object]] = {
        "curves": lambda: [training_curves(models.curves, CONTROL)],
        "loss": lambda: [loss_over_recurrences(models.evaluation, mark, CONTROL)],
        "steps": lambda: [steps_over_recurrences(long)],
        "10": lambda: draw(10, runs, control=control),
    }
    for number, name in FIGURES_OF.items():
        if name in runs:
            wanted[str(number)] = lambda n=number, c=name: draw(n, runs[c], control=control)  # type: ignore[misc]
        else:
            say(f"figure {number}: no model {name}")
    images: list[Path] = []
    for what, make in wanted.items():
        try:
            images += save_figures(make(), folder, command)  # type: ignore[arg-type]
        except InputError as error:
            say(f"figure {what}: {error}")
    return images


def write_section51(found: Section51, out: Path) -> Path:
    """Write ``OUT/section-5.1.html`` of the data and of the figures in ``OUT/figures``."""
    about = found.models.about
    seeds = {name: len(found.models.seeds(name)) for name in found.models.configurations}
    few, many = min(seeds.values()), max(seeds.values())
    n = f"{few}" if few == many else f"{few} to {many}"
    lead = (
        f"{sum(seeds.values())} small models, {n} seeds per configuration, "
        f"{about['architecture']['d_model']} dimensions, trained on a CPU: what Section 5.1 of "
        "arXiv 2604.11791 shows at 512 dimensions and 3.7 billion tokens. Measured on "
        f"{about['prompts']['run']} prompts ({about['prompts']['set']}). All models are pre-norm, "
        "so that nothing here compares norms."
    )
    missing = "; ".join(f"{name} ({why})" for name, why in about["missing"].items())
    notice = missing and f"Not in this report: {missing}."
    parts = [
        _decided(found),
        _trained(found, out),
        _stages(out),
        _mirroring(found),
        _clusters(found),
        _convergence(found, out),
        _contrasts(found),
        _counts(found),
    ]
    title = "Section 5.1: small looped models, at the scale of a CPU"
    return write_page(out / _PAGE, title, parts, lead=lead, notice=notice)


def _decided(found: Section51) -> PagePart:
    contrasts, mirroring = found.statistics.contrasts, found.statistics.mirroring
    text = (
        f"Of {len(contrasts)} paired contrasts between configurations, "
        f"{_decided_in(contrasts)} are decided; of {len(mirroring)} mirroring scores, "
        f"{_decided_in(mirroring)} exceed those of random layer orders, "
        f"{_of_one_seed(mirroring)} of them of one seed, which says nothing about other "
        "trainings. A contrast is decided if its t-interval leaves out 0 and the exact "
        "sign-flip p is at most 0.05; with n seeds that "
        "p cannot fall below 2 / 2^n (0.25 with three, 0.031 with six). Nothing is corrected for "
        "the number of tests."
    )
    both = [*_sentences(contrasts), *_sentences(mirroring)]
    first = [sentence for sentence, shown in both if shown]
    more = [sentence for sentence, shown in both if not shown]
    return PagePart(
        "decided",
        "What this scale decides, and what it cannot",
        (text,),
        findings=tuple(first),
        more=tuple(more),
    )


def _decided_in(table: pd.DataFrame) -> int:
    return int(table["decided"].astype(bool).sum()) if len(table) else 0


def _of_one_seed(mirroring: pd.DataFrame) -> int:
    if not len(mirroring):
        return 0
    return int((mirroring["decided"].astype(bool) & (mirroring["n_seeds"] == 1)).sum())


def _sentences(table: pd.DataFrame) -> list[tuple[str, bool]]:
    """The sentence of every row, and whether it stands before the fold.

    These are what is decided, the rate at the most recurrences, the loss as trained, and the ColSum
    concentration, which is what the paper's Figure 10 compares.
    """
    if not len(table):
        return []
    shown = table["decided"].astype(bool)
    if "quantity" in table:
        rate = table["quantity"] == "rate"
        longest = table.loc[rate, "recurrences"].max()
        loss = table["quantity"] == "held-out loss"
        trained = table.loc[loss, "recurrences"].min()
        shown |= rate & (table["recurrences"] == longest)
        shown |= loss & (table["recurrences"] == trained)
    else:
        shown |= (table["metric"] == "colsum_concentration") & (table["curve"] == "whole")
    order = table.assign(shown=shown).sort_values("decided", ascending=False, kind="stable")
    return list(zip(order["says"].astype(str), order["shown"].astype(bool), strict=True))


def _trained(found: Section51, out: Path) -> PagePart:
    columns = {
        "configuration": "Configuration",
        "shape": "Shape",
        "models": "Models",
        "seeds": "Seeds",
        "parameters": "Parameters",
        "steps": "Steps",
        "tokens_a_model": "Tokens a model",
        "tokens": "Tokens in all",
    }
    caption = "Training: the same rows in the same order for every model; the seed draws weights."
    table = table_of(found.statistics.training, columns, caption)
    text = (
        "Held-out loss is lowest at the trained recurrences in every looped model. "
        if _rises(found)
        else ""
    )
    rows = int(found.models.evaluation["rows"].max())
    text += (
        "How much it rises beyond them is in the conditions below. Losses by recurrences are of "
        f"the first {rows} held-out rows; the curves during training are of {HELD_OUT_ROWS}."
    )
    figures = named_figures(out / "figures", ("fig_curves", "fig_loss"), "training", out)
    return PagePart("training", "Training", (text,), (table,), figures=figures)


def _rises(found: Section51) -> bool:
    """Whether every looped model has its lowest loss at the trained recurrences."""
    models = found.models.about["models"]
    table = found.statistics.conditions
    best = table[table["quantity"] == "best recurrences"].set_index("configuration")["mean"]
    return len(best) > 0 and all(best[name] == models[name]["recurrences"] for name in best.index)


def _stages(out: Path) -> PagePart:
    names = ("fig10", *(f"fig{number}" for number in FIGURES_OF))
    text = (
        "Signature metrics by recurrence over [prelude, block, coda]; bands are over seeds. "
        "Figures 56, 58, 59, 61 and 62 of the paper are of shapes that are not trained here."
    )
    figures = named_figures(out / "figures", names, "stages", out)
    return PagePart("stages", "Signature metrics", (text,), figures=figures)


def _mirroring(found: Section51) -> PagePart:
    columns = {
        "configuration": "Configuration",
        "metric": "Metric",
        "curve": "Curve",
        "mean": "Mean r",
        "sd": "SD over seeds",
        "t": "95 % t-interval",
        "p_permutation": "p, permutation",
        "least_p": "Least p",
        "p_seeds": "p of each seed",
        "n_seeds": "Seeds",
    }
    statistics = found.statistics
    draws = f"{N_PERMUTATIONS:,} random orders of the core layers, in every seed independently"
    caption = (
        "Mirroring score: Pearson's r with the control of the same seed, mean over recurrences, "
        f"then over seeds. p of the mean score against {draws}."
    )
    tables = [table_of(_titled(statistics.mirroring), columns, caption)]
    if len(statistics.ceiling):
        columns = {"metric": "Metric", "mean": "Mean r", "least": "Least", "most": "Most"}
        columns["n_pairs"] = "Pairs"
        text = "Ceiling: the same score between controls of two seeds, over all pairs of seeds."
        tables.append(table_of(_titled(statistics.ceiling), columns, text))
    text = (
        "Curve “block” leaves out prelude and coda, whose order the null does not touch. Residual "
        "entropy rises with depth in most models, and two rising curves correlate whatever they "
        "mean. A t-interval that leaves −1 to 1 says that so few seeds say nothing."
    )
    return PagePart("mirroring", "Mirroring scores", (text,), tuple(tables))


def _titled(table: pd.DataFrame) -> pd.DataFrame:
    """Metrics by the titles that figures have."""
    return table.replace({"metric": TITLES}) if "metric" in table else table


def _clusters(found: Section51) -> PagePart:
    columns = {
        "configuration": "Configuration",
        "quantity": "Quantity",
        "mean": "Mean",
        "sd": "SD over seeds",
        "t": "95 % t-interval",
        "percentile": "95 % bootstrap, seeds",
        "n_seeds": "Seeds",
    }
    caption = (
        "k-means clusters of the control's layers (K = 3), looked for in the looped models: share "
        "of layers in the control's stage at the same depth, and adjusted Rand index (0: chance). "
        "Between recurrences it is of the core alone, and 1 also where the core lies in one stage "
        "at each of them, the same one or not. Means over recurrences, then over seeds."
    )
    return PagePart(
        "clusters",
        "Stages as clusters",
        (),
        (table_of(found.statistics.clusters, columns, caption),),
    )


_INTERVALS: Mapping[str, str] = {
    "mean": "Mean",
    "sd": "SD over seeds",
    "hierarchical": "95 % bootstrap, seeds and prompts",
    "percentile": "95 % bootstrap, seeds",
    "t": "95 % t-interval",
    "n_seeds": "Seeds",
    "n_left_out": "Left out",
}


def _convergence(found: Section51, out: Path) -> PagePart:
    columns = {
        "configuration": "Configuration",
        "recurrences": "Recurrences",
        "quantity": "Quantity",
        **_INTERVALS,
    }
    table = found.statistics.conditions
    draws = "1,000" if not len(table) else f"{int(table['n_resamples'].iloc[0]):,}"
    caption = (
        f"Means over seeds with their intervals ({draws} resamples). Rate: the factor by "
        "which steps shrink, a fit over all above the noise floor, of prompts of all verdicts: of "
        "an approach to a fixed point only as far as the shares say so. Shares: by verdict, "
        "confirmed by runs of twice the recurrences. "
        "Losses in nats per token. Left out: prompts without a rate."
    )
    figures = named_figures(out / "figures", ("fig_steps",), "conditions", out)
    text = (
        "n seeds have few different resamples, ten for three: bootstrap intervals over so few are "
        "too narrow. The control runs once, and its loss is compared with the others' as trained."
    )
    return PagePart(
        "conditions",
        "Convergence and losses",
        (text,),
        (table_of(table, columns, caption),),
        figures=figures,
    )


def _contrasts(found: Section51) -> PagePart:
    columns = {
        "contrast": "Contrast",
        "recurrences": "Recurrences",
        "quantity": "Quantity",
        "mean": "Mean difference",
        "percentile": "95 % bootstrap",
        "bca": "95 % BCa",
        "t": "95 % t-interval",
        "sign_flip_p": "Sign-flip p",
        "least_p": "Least p",
        "n_seeds": "Seeds",
        "decided": "Decided",
    }
    caption = "Paired contrasts: differences between models of the same seed."
    return PagePart(
        "contrasts", "Contrasts", (), (table_of(found.statistics.contrasts, columns, caption),)
    )


def _counts(found: Section51) -> PagePart:
    columns = {
        "configuration": "Configuration",
        "recurrences": "Recurrences",
        "confirmed_at": "Confirmed at",
        "models": "Models",
        "prompts": "Prompts",
        "sequences": "Sequences",
        "forward_passes": "Forward passes",
        "tokens_read": "Tokens read",
    }
    table = found.statistics.counts
    total = int(table["forward_passes"].sum())
    caption = f"What was run of the trained models: {total:,} forward passes of one prompt."
    return PagePart("counts", "What was run", (), (table_of(table, columns, caption),))
