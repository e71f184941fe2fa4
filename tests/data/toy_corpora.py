"""Small corpora to build stores from."""

from __future__ import annotations

import random
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def document(seed: int, words: int = 80) -> str:
    rng = random.Random(seed)
    vocabulary = [
        "sparse",
        "dense",
        "mask",
        "weight",
        "prune",
        "über",
        "层",
        "tensor",
        "decay",
        "\n\n",
        "λ=0.1",
    ]
    return f"Document {seed}. " + " ".join(rng.choice(vocabulary) for _ in range(words)) + "\n"


def write_corpus(path: Path, seeds: range, words: int = 80) -> Path:
    path.write_text("".join(document(seed, words) + "<|endoftext|>\n" for seed in seeds), encoding="utf-8")
    return path
