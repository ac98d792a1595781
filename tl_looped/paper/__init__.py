"""What belongs to arXiv 2604.11791 alone: its figures, their runs, Sections 4.2 and 5.1."""
