"""Pre-train transformers with 2:4 sparse linear layers."""

import sys
from pathlib import Path

__version__ = "0.1.0"

# Straight from a checkout, `sparse24` is in kernels/ beside this package; once installed it is found like any other.
_kernels = Path(__file__).resolve().parent.parent / "kernels"
if (_kernels / "sparse24").is_dir() and str(_kernels) not in sys.path:
    sys.path.append(str(_kernels))
