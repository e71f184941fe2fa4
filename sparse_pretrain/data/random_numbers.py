"""Random numbers that are a function of (seed, step, example) and of nothing else: no generator, no state."""

from __future__ import annotations

import numpy as np

from sparse_pretrain.seeds import hash_seed

VALIDATION_STEP = 2**40  # where a step is asked for and there is none: the same numbers at every validation
GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, step: int, examples: np.ndarray, count: int, purpose: int) -> np.ndarray:
    """`count` numbers for each example, uniform in [0, 1): (examples, count) float64.

    SplitMix64 (Steele et al. 2014), started for each example by a hash of seed, step, purpose and the example.

    Args:
        examples: (examples,) their numbers in the split.
        purpose: what the numbers are for; other purposes give others.
    """
    with np.errstate(over="ignore"):
        start = _mixed(
            np.asarray(examples).astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(hash_seed(seed, step, purpose))
        )
        counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        bits = _mixed(start[:, None] + counter)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
