"""A corpus: a stream of documents, each for training or for validation, and a digest that identifies it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "validation"]
Document = str

END_OF_TEXT = "<|endoftext|>"
FEW_DOCUMENTS = 100  # below this, held-out documents would be too few and too uneven: see `hold_out`


@dataclass(frozen=True)
class Corpus:
    """Documents of both splits, in an order that is always the same.

    Args:
        digest: hex sha256; two corpora with the same digest give the same documents. Of the text itself where
            that is at hand, of the request (dataset name, splits, ...) for Hugging Face datasets.
        read: starts a new pass over all documents, each with its split.
    """

    digest: str
    read: Callable[[], Iterator[tuple[Split, Document]]]

    def documents(self, split: Split) -> Iterator[Document]:
        return (document for its_split, document in self.read() if its_split == split)


def digest_of(value: Any) -> str:
    """Hex sha256 of plain values (dicts, lists, strings, numbers)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_hash(document: Document) -> bytes:
    return hashlib.sha256(document.encode()).digest()


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document belongs to validation, by its content alone: in any order, on any machine."""
    return int.from_bytes(content_hash(document)[:8], "big") < share * 2**64


def hold_out(documents: Iterable[Document], share: float) -> Iterator[tuple[Split, Document]]:
    """Split a stream that has no validation split of its own.

    With FEW_DOCUMENTS or more: by document, each held out with probability `share`, decided by the hash of
    its text. With fewer (tinyshakespeare is one): the last `share` of the characters, from a paragraph border
    on; the document that the border lies in is cut in two there.
    """
    stream = iter(documents)
    first = list(itertools.islice(stream, FEW_DOCUMENTS))
    if len(first) < FEW_DOCUMENTS:
        yield from _hold_out_tail(first, share)
        return
    for document in itertools.chain(first, stream):
        yield ("validation" if is_held_out(document, share) else "train"), document


def _hold_out_tail(documents: list[Document], share: float) -> Iterator[tuple[Split, Document]]:
    remaining = int(sum(map(len, documents)) * (1 - share))  # characters still to go to train
    for document in documents:
        if remaining >= len(document):
            yield "train", document
        elif remaining <= 0:
            yield "validation", document
        else:
            border = paragraph_border(document, remaining)
            yield "train", document[:border]
            if border < len(document):
                yield "validation", document[border:]
        remaining -= len(document)


def paragraph_border(text: str, position: int) -> int:
    """Where to cut `text` at or after `position`: after a blank line, else after a line, else right there."""
    for border in ("\n\n", "\n"):
        found = text.find(border, position)
        if found >= 0 and text[found + len(border) :].strip():
            return found + len(border)
    return position
