"""Section 4.2: looped models of random weights."""
