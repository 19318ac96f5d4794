"""Quantisation as arithmetic: ranges from samples, and layers that compute as if their numbers were integers."""
