"""Where configs, runs and caches are. Every path the rest of the code uses is absolute."""

from __future__ import annotations

import os
from pathlib import Path


def config_dir() -> Path:
    """The shipped YAML: inside the package when installed as a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def cache_dir() -> Path:
    """Tokenizers and token stores: $SPARSE_PRETRAIN_CACHE, else the user's cache folder."""
    explicit = os.environ.get("SPARSE_PRETRAIN_CACHE")
    if explicit:
        return Path(explicit).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser().resolve() / "sparse-pretrain"
