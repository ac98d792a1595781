"""The runs that reproduce arXiv 2604.11791, model by model.

Numbers of figures, models, prompts and recurrences are the paper's (see its captions); where it
does not state the recurrences of a path or a step size, 128 is taken, and 8 for the sheet of all
attention maps (Fig. 63). Which feedforward model belongs to which looped one: the retrofits' own
base models, and Llama 3.2 1B for Ouro, as in Figures 8 and 40.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace

from tl_looped.errors import InputError
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.paper.figures import with_needs

SQUARE_ROOT = PromptSet("text", texts=("The square root of 16 is",))
SENTENCE = PromptSet("sentence")


@dataclass(frozen=True)
class PaperModel:
    """What the paper shows of one model.

    Args:
        loops: Of its figures of few recurrences.
        few, middle, many: Figures at ``loops``, 32 and 128 recurrences, on the main prompts.
        ablated: At ``loops``, without the MLP output of ``ablate_mlp``.
        sentence: At 128 recurrences on the test sentence.
        sheet: At ``loops`` on the test sentence.
        root: At 128 recurrences on "The square root of 16 is".
        hellaswag: At ``loops`` on HellaSwag.
        over: Figures of the run of few recurrences over that of the feedforward model.
        feedforward: The feedforward model; None without one.
        feedforward_kind: ``"feedforward"`` for a TransformerBridge, ``"looped"`` for a loop of one
            recurrence without prelude and coda.
        ablate_mlp: See ``Experiment.ablate_mlp``.
    """

    few: tuple[int, ...]
    loops: int = 8
    middle: tuple[int, ...] = ()
    many: tuple[int, ...] = ()
    ablated: tuple[int, ...] = ()
    sentence: tuple[int, ...] = ()
    sheet: tuple[int, ...] = ()
    root: tuple[int, ...] = ()
    hellaswag: tuple[int, ...] = ()
    over: tuple[int, ...] = ()
    feedforward: str | None = None
    feedforward_kind: str = "feedforward"
    ablate_mlp: tuple[str, ...] = ("prelude.1",)


_LONG = (3, 4, 22, 23, 24, 25)
_LLAMA = "meta-llama/Llama-3.2-1B"
_LLAMA_FIGURES = PaperModel(
    few=(2, 7, 19, 33, 34, 37), middle=(20, 21), many=(*_LONG, 9, 11, 12, 18, 49, 52),
    ablated=(41,), sentence=(5,), sheet=(63,), hellaswag=(44,), over=(8,), feedforward=_LLAMA,
)  # fmt: skip

PAPER: dict[str, PaperModel] = {
    "demo": replace(
        _LLAMA_FIGURES, many=(*_LONG, 9, 11, 12, 13, 14, 49, 52), over=(8, 40),
        feedforward="demo-control", feedforward_kind="looped",
    ),
    "ouro-1.4b": PaperModel(
        few=(2, 19, 33, 34, 35), many=(*_LONG, 11, 12, 47, 50), sentence=(26,), root=(28,),
        hellaswag=(42,), over=(8,), feedforward=_LLAMA,
    ),
    "ouro-2.6b": PaperModel(few=(), loops=4, over=(40,), feedforward=_LLAMA),
    "huginn": PaperModel(
        few=(2, 19, 33, 34, 36), middle=(20, 21), many=(*_LONG, 13, 14, 16, 17, 48, 51),
        sentence=(15, 27), hellaswag=(43,),
    ),
    "recurrent-llama-3.2": _LLAMA_FIGURES,
    "recurrent-olmo-2": PaperModel(
        few=(33, 38), middle=(20, 21), hellaswag=(45,), over=(8,),
        feedforward="allenai/OLMo-2-0425-1B",
    ),
    "recurrent-tinyllama-3t": PaperModel(
        few=(33, 39), middle=(20, 21), hellaswag=(46,), over=(8,),
        feedforward="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PaperRun:
    """A run of the paper and the figures that are drawn from it."""

    spec: Experiment
    figures: tuple[int, ...]


@dataclass(frozen=True)
class Overlay:
    """Figures of two runs: a looped one, and a feedforward one on the same prompts."""

    looped: Experiment
    feedforward: Experiment
    figures: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All runs of one model, and what is drawn from two of them."""

    runs: list[PaperRun]
    overlays: list[Overlay] = field(default_factory=list)


def parse_models(text: str) -> tuple[str, ...]:
    """Models from ``"demo,huginn"`` or ``"all"``.

    Raises:
        InputError: for a model that the paper's figures do not name.
    """
    if text == "all":
        return tuple(PAPER)
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    for name in names:
        if name not in PAPER:
            near = difflib.get_close_matches(name, PAPER, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(
                f"models: {name!r} is none of {', '.join(PAPER)}, all{hint} (tl-looped analyze "
                "takes any model)"
            )
    if not names:
        raise InputError(f"models: none was given; there are {', '.join(PAPER)}, all")
    return tuple(dict.fromkeys(names))


def paper_plan(
    model: str,
    prompts: PromptSet,
    hellaswag: PromptSet | None,
    dtype: str = "float32",
    feedforward: str | None = None,
    batching: str = "length",
    checkpoint: str | None = None,
    prepend_bos: bool | None = None,
) -> Plan:
    """The runs of one model.

    Args:
        model: One of ``PAPER``.
        prompts: GSM8K, or what takes its place.
        hellaswag: HellaSwag; its runs are left out if None.
        dtype: Of the weights.
        feedforward: A hub id or folder in place of the paper's feedforward model.
        batching: Of looped models, see ``Experiment``.
        checkpoint: A hub id or folder in place of the one that ``model`` stands for.
        prepend_bos: Of all runs, see ``Experiment``.
    """
    paper = PAPER[model]
    base = feedforward or paper.feedforward
    few = Experiment(
        checkpoint or model,
        prompts=prompts,
        recurrences=paper.loops,
        dtype=dtype,
        feedforward=base,
        batching=batching,
        prepend_bos=prepend_bos,
    )
    ablated = replace(few, ablate_mlp=paper.ablate_mlp, feedforward=None)
    wanted = [
        (few, paper.few, bool(paper.over) and base is not None),
        (replace(few, recurrences=32), paper.middle, False),
        (replace(few, recurrences=128, extras=("confirm",)), paper.many, False),
        (ablated, paper.ablated, False),
        (replace(few, prompts=SENTENCE), paper.sheet, False),
        (replace(few, prompts=SENTENCE, recurrences=128), paper.sentence, False),
        (replace(few, prompts=SQUARE_ROOT, recurrences=128), paper.root, False),
    ]
    if hellaswag is not None:
        wanted.append((replace(few, prompts=hellaswag), paper.hellaswag, False))
    runs = [
        PaperRun(with_needs(spec, numbers), numbers)
        for spec, numbers, is_compared in wanted
        if numbers or is_compared
    ]
    if base is None or not paper.over:
        return Plan(runs)
    kind = "feedforward" if feedforward else paper.feedforward_kind
    other = Experiment(base, kind=kind, prompts=prompts, dtype=dtype, prepend_bos=prepend_bos)
    other = replace(other, batching=batching) if kind == "looped" else other
    last = PaperRun(with_needs(other, (32,)), (32,))
    return Plan([*runs, last], [Overlay(runs[0].spec, last.spec, paper.over)])
