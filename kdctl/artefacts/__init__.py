"""Artefacts: what stages of compression and export leave in a run: made aside, re-loaded, measured, gated, renamed."""
