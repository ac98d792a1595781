"""Section 5.1: small models trained for it."""
