"""The tokenizer: trained on the corpus, or given by a path; and text to token ids with it."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sparse_pretrain.data.corpus import END_OF_TEXT, Corpus, Document, digest_of
from sparse_pretrain.data.files import locked, make_folder, write_atomic
from sparse_pretrain.data.special_tokens import end_of_text_id
from sparse_pretrain.data.tokenizer_files import ALLOWED, BERT_TOKENS, as_bert, read_tokenizer
from sparse_pretrain.errors import UserError
from sparse_pretrain.paths import cache_dir

if TYPE_CHECKING:
    from sparse_pretrain.config_data import PairsConfig, TextConfig

PAIR_TOKENS = ("<pad>", "<s>", "</s>")  # of a BPE for texts and what they become
ALPHABET = 1000  # of a WordPiece: the commonest characters; words with others are unknown
TRAINING_BYTES = 64_000_000  # of text that a tokenizer is trained on: the first documents of the train split
ENCODE_CHARACTERS = 8_000_000  # of text handed to the encoder's threads at once; bounds its memory


def tokenizer_json(cfg: TextConfig | PairsConfig, corpus: Corpus) -> bytes:
    """The tokenizer.json that `cfg.tokenizer` asks for: read from that path or, for "bpe" and "wordpiece", trained on
    the corpus the first time and kept in the cache.

    Raises:
        UserError: naming data.tokenizer, if the path is not there or not a usable tokenizer.
    """
    if cfg.tokenizer == "bpe":
        if cfg.task == "text_to_text":
            return _cached(corpus, cfg.vocab_size, train_pair_bpe, {"kind": "pairs"})
        return _cached(corpus, cfg.vocab_size, train_bpe, {})
    if cfg.tokenizer == "wordpiece":
        return _cached(corpus, cfg.vocab_size, train_wordpiece, {"kind": "wordpiece"})
    return given_tokenizer_json(cfg.tokenizer)


def given_tokenizer_json(path: str | None) -> bytes:
    """The tokenizer.json that a path amounts to.

    Raises:
        UserError: naming data.tokenizer, if there is no path, or nothing usable there.
    """
    if path is None:
        raise UserError("data.tokenizer", "null", ALLOWED, "A fine-tuning takes its checkpoint's tokenizer by itself")
    content = read_tokenizer(Path(path).expanduser())
    end_of_text_id(load_tokenizer(content, path))
    return content


def _cached(
    corpus: Corpus, vocab_size: int, train: Callable[[Iterator[Document], int], bytes], settings: dict[str, Any]
) -> bytes:
    settings = {
        "corpus": corpus.digest,
        "vocab_size": vocab_size,
        "training_bytes": TRAINING_BYTES,
        "version": 1,
        **settings,
    }
    path = cache_dir() / "tokenizers" / f"{digest_of(settings)[:32]}.json"
    if (content := _usable(path)) is not None:
        return content
    make_folder(path.parent)
    with locked(path.with_suffix(".lock")):
        if (content := _usable(path)) is not None:  # another process made it meanwhile
            return content
        kind = "WordPiece" if train is train_wordpiece else "BPE"
        print(f"training a {kind} tokenizer of {vocab_size} tokens", file=sys.stderr, flush=True)
        content = train(corpus.documents("train"), vocab_size)
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
    return _trained_bpe(documents, vocab_size, [END_OF_TEXT]).to_str().encode()


def train_pair_bpe(documents: Iterator[Document], vocab_size: int) -> bytes:
    """As `train_bpe`, with `<pad>`, `<s>` and `</s>` as ids 0 to 2; a text of its own ends with `</s>`."""
    tokenizer = _trained_bpe(documents, vocab_size, list(PAIR_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", PAIR_TOKENS.index("</s>"))]
    )
    return tokenizer.to_str().encode()


def _trained_bpe(documents: Iterator[Document], vocab_size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents), trainer)
    return tokenizer


def train_wordpiece(documents: Iterator[Document], vocab_size: int) -> bytes:
    """Train an uncased WordPiece as BERT's (Devlin et al. 2019), [PAD] [UNK] [CLS] [SEP] [MASK] as ids 0 to 4, on the
    first TRAINING_BYTES. As deterministic as `train_bpe`.

    Returns:
        The tokenizer.json.

    Raises:
        UserError: if there are no documents.
    """
    bert = as_bert(
        Tokenizer(models.WordPiece({token: i for i, token in enumerate(BERT_TOKENS)}, unk_token="[UNK]")), True
    )
    sample = [bert.normalizer.normalize_str(document) for document in _sample(documents)]
    counts = Counter(itertools.chain.from_iterable(sample))
    by_count = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet, rare = sorted(by_count[:ALPHABET]), by_count[ALPHABET:]
    # The trainer numbers the pieces inside words in the order of a hash table, another in each process, unless they
    # are there from the start: as special tokens, of which only the names come to count.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT_TOKENS, *alphabet, *(f"##{c}" for c in alphabet)],
        show_progress=False,
    )
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = bert.pre_tokenizer
    trained.train_from_iterator((text.translate({ord(c): " " for c in rare}) for text in sample), trainer)
    vocabulary = models.WordPiece(trained.get_vocab(), unk_token="[UNK]")
    return as_bert(Tokenizer(vocabulary), lowercase=True).to_str().encode()


def _sample(documents: Iterator[Document]) -> Iterator[Document]:
    """The first TRAINING_BYTES, for a trainer that may use all cores."""
    _allow_threads()
    sample = _first_bytes(documents, TRAINING_BYTES)
    first = next(sample, None)
    if first is None:
        raise UserError("data", "a corpus without documents", "one with text")
    return itertools.chain([first], sample)


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
        raise UserError("data.tokenizer", f"{origin} ({error})", ALLOWED) from error
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


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest that holds all of a tokenizer's ids: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size(tokenizer) <= 2**16 else np.uint32)


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
