"""Arithmetic on weights: what an adapter changes, in the formats that other tools read."""
