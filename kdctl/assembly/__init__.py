"""The parts that a stage is built of: models with their weights, terms with their adapters."""
