"""The report: numbers of runs in words, and the pages that show them."""
