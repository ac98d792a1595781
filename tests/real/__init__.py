"""Tests on a pretrained model: ``make real``."""
