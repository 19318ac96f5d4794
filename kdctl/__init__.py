"""kdctl: one YAML in, a small model out, with proof that it is as good as it claims."""

__version__ = "0.1.0"
