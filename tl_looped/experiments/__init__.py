"""Experiments: a specification, prompts and a model become results on disk.

::

    finished = run(Experiment("demo", recurrences=32), Path("runs"))
    data = load(finished.folder)

Figures of the paper are drawn of ``data`` by :func:`tl_looped.paper.draw`, and kept by
:func:`save_figures`; :func:`tl_looped.report.write_report` says in words what was found.
"""

from tl_looped.experiments.compare import compare_runs, load_runs
from tl_looped.experiments.drawing import save_figures
from tl_looped.experiments.reading import load
from tl_looped.experiments.runner import Run
from tl_looped.experiments.runner import run_experiment as run
from tl_looped.experiments.spec import Experiment, PromptSet

__all__ = [
    "Experiment",
    "PromptSet",
    "Run",
    "compare_runs",
    "load",
    "load_runs",
    "run",
    "save_figures",
]
