"""Pre-train transformers with 2:4 sparse linear layers."""

__version__ = "0.1.0"
