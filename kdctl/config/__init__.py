"""Configuration: from YAML files and overrides to a checked, typed experiment. Nothing here imports torch."""
