"""Seeds for random numbers that are a function of where they are used."""

from __future__ import annotations


def hash_seed(*values: int) -> int:
    """A 63-bit seed for several integers, as (seed, step, rank): SplitMix64's finaliser (Steele et al. 2014) over each
    in turn."""
    mixed = 0
    for value in values:
        mixed = (mixed + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        mixed ^= mixed >> 31
    return mixed >> 1
