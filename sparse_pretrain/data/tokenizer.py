"""Byte-level BPE: trained on the corpus, or given as a tokenizer.json; and text to token ids with it."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparse_pretrain.data.corpus import END_OF_TEXT, Corpus, Document, digest_of
from sparse_pretrain.data.files import locked, make_folder, write_atomic
from sparse_pretrain.errors import UserError
from sparse_pretrain.paths import cache_dir

if TYPE_CHECKING:
    from sparse_pretrain.config_data import TextConfig

END_OF_TEXT_TOKENS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
)  # GPT-2, Llama 3, Llama 2 and T5, Gemma
TRAINING_BYTES = 64_000_000  # of text that a BPE is trained on: the first documents of the train split
ENCODE_CHARACTERS = 8_000_000  # of text handed to the encoder's threads at once; bounds its memory


def tokenizer_json(cfg: TextConfig, corpus: Corpus) -> bytes:
    """The tokenizer.json that `cfg.tokenizer` asks for: read from that path or, for "bpe", trained on the
    corpus the first time and kept in the cache.

    Raises:
        UserError: naming data.tokenizer, if the file is not there or not a usable tokenizer.
    """
    if cfg.tokenizer == "bpe":
        return _cached_bpe(corpus, cfg.vocab_size)
    path = Path(cfg.tokenizer).expanduser()
    if not path.is_file():
        raise UserError("data.tokenizer", cfg.tokenizer, "bpe, or the path of a tokenizer.json")
    content = path.read_bytes()
    end_of_text_id(load_tokenizer(content, str(path)))
    return content


def _cached_bpe(corpus: Corpus, vocab_size: int) -> bytes:
    settings = {
        "corpus": corpus.digest,
        "vocab_size": vocab_size,
        "training_bytes": TRAINING_BYTES,
        "version": 1,
    }
    path = cache_dir() / "tokenizers" / f"{digest_of(settings)[:32]}.json"
    if (content := _usable(path)) is not None:
        return content
    make_folder(path.parent)
    with locked(path.with_suffix(".lock")):
        if (content := _usable(path)) is not None:  # another process made it meanwhile
            return content
        print(f"training a BPE tokenizer of {vocab_size} tokens", file=sys.stderr, flush=True)
        content = train_bpe(corpus.documents("train"), vocab_size)
        write_atomic(path, [content])
    return content


def _usable(path: Path) -> bytes | None:
    """The content of a cached tokenizer, if it is there and whole."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        load_tokenizer(content, str(path))
    except UserError:
        return None
    return content


def train_bpe(documents: Iterator[Document], vocab_size: int) -> bytes:
    """Train a byte-level BPE (GPT-2's pre-tokenization, `<|endoftext|>` as id 0) on the first TRAINING_BYTES.

    Deterministic: the same documents give the same bytes, whatever the number of threads. A small corpus may give
    fewer than `vocab_size` tokens.

    Returns:
        The tokenizer.json.

    Raises:
        UserError: if there are no documents.
    """
    _allow_threads()
    sample = _first_bytes(documents, TRAINING_BYTES)
    first = next(sample, None)
    if first is None:
        raise UserError("data", "a corpus without documents", "one with text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain([first], sample), trainer)
    return tokenizer.to_str().encode()


def _first_bytes(documents: Iterator[Document], limit: int) -> Iterator[Document]:
    for document in documents:
        yield document
        limit -= len(document.encode())
        if limit <= 0:
            return


def load_tokenizer(content: bytes, origin: str) -> Tokenizer:
    """Read a tokenizer.json for encoding whole documents: nothing is cut off, padded or added.

    Args:
        content: the file's bytes.
        origin: where they come from, for the message.

    Raises:
        UserError: naming data.tokenizer, if `content` is not a tokenizer.json.
    """
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError(
            "data.tokenizer", f"{origin} ({error})", "bpe, or the path of a valid tokenizer.json"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # "<|endoftext|>" in the middle of a text is text, not the end of it
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_sha256(content: bytes) -> str:
    """What identifies a tokenizer: the hex sha256 of its tokenizer.json."""
    return hashlib.sha256(content).hexdigest()


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the highest id, so that ids index an embedding of this size (ids may have gaps)."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document.

    Raises:
        UserError: naming data.tokenizer, if it has none.
    """
    for token in END_OF_TEXT_TOKENS:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return int(token_id)
    raise UserError(
        "data.tokenizer",
        "a tokenizer without an end-of-text token",
        f"one with {' or '.join(END_OF_TEXT_TOKENS)}",
    )


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document], dtype: npt.DTypeLike) -> np.ndarray:
    """The documents' token ids, each document followed by the end-of-text id, concatenated: (tokens,) of
    `dtype`.

    Uses all cores (the tokenizer's own threads; RAYON_NUM_THREADS sets their number).
    """
    _allow_threads()
    end = [end_of_text_id(tokenizer)]
    parts: list[np.ndarray] = [np.empty(0, dtype)]
    for batch in _batches(documents):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            parts.append(np.array(encoding.ids + end, dtype))
    return np.concatenate(parts)


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= ENCODE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _allow_threads() -> None:
    # Unless this is set, `tokenizers` warns in every process forked later (data loading workers).
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
