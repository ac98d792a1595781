"""The looped model: parts below `transformer/`, which puts them together."""
