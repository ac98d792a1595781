"""``tl-looped demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for runs and report.")] = Path("demo-report"),
) -> None:
    """Run the paper's experiments on the bundled model and 32 bundled word problems."""
    # Imported here: `--help` and a mistyped option answer at once.
    from tl_looped.cli.execution import carry_out
    from tl_looped.experiments.spec import PromptSet
    from tl_looped.paper.plan import paper_plan

    # Padded, the 32 prompts are four batches: many small ones take three times as long.
    plan = paper_plan("demo", PromptSet("bundled"), None, batching="padded")
    carry_out([plan], out, "cpu", "8")
