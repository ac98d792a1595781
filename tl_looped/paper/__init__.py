"""What belongs to arXiv 2604.11791 alone: its figures, their runs, Sections 4.2 and 5.1."""

from tl_looped.paper.figures import FIGURES, draw
from tl_looped.paper.plan import PAPER, paper_plan

__all__ = ["FIGURES", "PAPER", "draw", "paper_plan"]
