"""Training small looped models from scratch."""
