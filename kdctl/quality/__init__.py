"""Numbers about predictions: calibration, fidelity to a teacher, single classes, several labels a sample."""
