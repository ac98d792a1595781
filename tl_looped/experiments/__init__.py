"""Experiments: from a model and prompts to numbers and figures on disk."""
