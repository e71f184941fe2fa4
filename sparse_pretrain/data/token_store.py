"""The packed token store: a split's documents as one memory-mapped run of token ids.

A store is a folder with train.bin and validation.bin (token ids, each document followed by the end-of-text
id), tokenizer.json and manifest.json. The manifest is written last: a folder without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from sparse_pretrain.data.corpus import Corpus, Document, Split, digest_of
from sparse_pretrain.data.files import cache_errors, locked, make_folder, remembered_sha256, sha256_file, write_atomic
from sparse_pretrain.data.sources import open_corpus
from sparse_pretrain.data.tokenizer import (
    encode_documents,
    end_of_text_id,
    load_tokenizer,
    token_dtype,
    tokenizer_json,
    tokenizer_sha256,
    vocab_size,
)
from sparse_pretrain.errors import UserError
from sparse_pretrain.paths import cache_dir

if TYPE_CHECKING:
    from sparse_pretrain.config_data import TextConfig

FORMAT = 1
SPLITS: tuple[Split, ...] = ("train", "validation")
SHARD_CHARACTERS = 32_000_000  # of text per shard: what a killed build loses at most, per split


@dataclass(frozen=True)
class TokenStore:
    """An opened token store. Small and picklable: the tokens stay on disk.

    Args:
        folder: where it is.
        manifest: the content of its manifest.json.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Open a finished store, checking its manifest, its tokenizer and the sizes of its token files.

        Raises:
            UserError: if something is missing or damaged, saying what to delete.
        """
        try:
            store = cls(folder, json.loads((folder / "manifest.json").read_text()))
            if store.manifest["format"] != FORMAT:
                raise _damaged(folder, f"format {store.manifest['format']}")
            if sha256_file(store.tokenizer_path) != store.manifest["tokenizer_sha256"]:
                raise _damaged(folder, "tokenizer.json with a wrong checksum")
            for split in SPLITS:
                size, wanted = (
                    store._bin(split).stat().st_size,
                    store.num_tokens(split) * store.dtype.itemsize,
                )
                if size != wanted:
                    raise _damaged(folder, f"{split}.bin of {size} bytes instead of {wanted}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, f"{type(error).__name__}: {error}") from error
        return store

    def verify(self) -> None:
        """Compare the tokens with their checksums (reads all of them, large ones once).

        Raises:
            UserError: naming the first damaged file.
        """
        for split in SPLITS:
            if remembered_sha256(self._bin(split)) != self.manifest["splits"][split]["sha256"]:
                raise _damaged(self.folder, f"{split}.bin with a wrong checksum")

    def split(self, split: Split) -> np.ndarray:
        """The split's tokens, memory-mapped and read-only: (tokens,) uint16 or uint32."""
        if not self.num_tokens(split):  # numpy cannot map an empty file
            return np.empty(0, self.dtype)
        return np.memmap(self._bin(split), dtype=self.dtype, mode="r")

    def num_tokens(self, split: Split) -> int:
        return int(self.manifest["splits"][split]["tokens"])

    def num_documents(self, split: Split) -> int:
        return int(self.manifest["splits"][split]["documents"])

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.manifest["dtype"])

    @property
    def vocab_size(self) -> int:
        """The tokenizer's real size: one more than the highest id."""
        return int(self.manifest["vocab_size"])

    @property
    def eot_id(self) -> int:
        return int(self.manifest["eot_id"])

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def digest(self) -> str:
        """Hex sha256 of what a model sees: tokenizer and both splits. To be shown with every result."""
        return digest_of(
            [self.manifest["tokenizer_sha256"]] + [self.manifest["splits"][split]["sha256"] for split in SPLITS]
        )

    def _bin(self, split: Split) -> Path:
        return self.folder / f"{split}.bin"


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"token store {folder}", what, "a complete store", "Delete the folder to have it built anew")


def prepare(cfg: TextConfig) -> TokenStore:
    """The token store for `cfg`: opened if it is there, else built (source, tokenizer, tokens) and kept in
    the cache.

    A build that was killed goes on where it stopped; a damaged store is rebuilt; of several processes one
    builds and the others wait for it.

    Raises:
        UserError: naming the option at fault, or SPARSE_PRETRAIN_CACHE if the cache cannot be written.
    """
    corpus = open_corpus(cfg)
    tokenizer = tokenizer_json(cfg, corpus)
    key = digest_of([FORMAT, corpus.digest, tokenizer_sha256(tokenizer)])[:16]
    folder = cache_dir() / "tokens" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', cfg.name)}-{key}"
    store = _open_finished(folder, say=False)
    if store is None:
        make_folder(folder.parent)
        with locked(folder.with_name(folder.name + ".lock")):
            # another process may have built it meanwhile
            store = _open_finished(folder, say=True) or _build(folder, corpus, tokenizer, cfg.name)
    check_length(store, cfg.seq_len)
    return store


def _open_finished(folder: Path, say: bool) -> TokenStore | None:
    """The store, or None if it is unfinished or damaged; the latter is printed if `say`."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        store = TokenStore.open(folder)
        store.verify()
        return store
    except UserError as error:
        if say:
            print(f"{folder} is damaged, building it anew: {error}", file=sys.stderr, flush=True)
        return None


def check_length(store: TokenStore, seq_len: int) -> None:
    """Both splits must give at least one sequence: seq_len inputs and the target after the last of them.

    Raises:
        UserError: naming data.seq_len, the tokens found and the longest sequence they allow.
    """
    for split in SPLITS:
        tokens = store.num_tokens(split)
        if tokens < seq_len + 1:
            longest = min(store.num_tokens(split) for split in SPLITS) - 1
            allowed = f"at most {longest} with this corpus" if longest > 0 else "a corpus with more text"
            raise UserError(
                "data.seq_len",
                f"{seq_len}, but {split} has {tokens} tokens ({store.num_documents(split)} documents)",
                allowed,
                "data.validation_share, a larger corpus or a shorter sequence changes that",
            )


def _build(folder: Path, corpus: Corpus, tokenizer_content: bytes, name: str) -> TokenStore:
    """Tokenize the corpus shard by shard, join the shards, write the manifest. Finished shards are reused."""
    tokenizer = load_tokenizer(tokenizer_content, "data.tokenizer")
    size = vocab_size(tokenizer)
    dtype = token_dtype(tokenizer)
    shards_folder = folder / "shards"
    make_folder(shards_folder)
    with cache_errors(folder):
        (folder / "manifest.json").unlink(missing_ok=True)

    shards: dict[Split, list[Path]] = {split: [] for split in SPLITS}
    documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    reused = 0
    # On a terminal the bar moves all the time; in a log file it is a line now and then.
    interval = 0.5 if sys.stderr.isatty() else 30
    with tqdm(desc=f"tokenizing {name}", unit="char", unit_scale=True, mininterval=interval) as bar:
        for split, texts in _chunks(corpus):
            shard = shards_folder / f"{split}-{len(shards[split]):05d}-{_chunk_hash(texts)}.bin"
            if shard.is_file():
                reused += 1
            else:
                write_atomic(shard, [_encode(tokenizer, texts, dtype)])
            shards[split].append(shard)
            documents[split] += len(texts)
            bar.update(sum(map(len, texts)))
    if reused:
        print(f"{name}: reused {reused} shards of a build that was interrupted", file=sys.stderr, flush=True)

    write_atomic(folder / "tokenizer.json", [tokenizer_content])
    manifest = {
        "format": FORMAT,
        "name": name,
        "dtype": dtype.name,
        "vocab_size": size,
        "eot_id": end_of_text_id(tokenizer),
        "tokenizer_sha256": tokenizer_sha256(tokenizer_content),
        "source_digest": corpus.digest,
        "splits": {},
    }
    for split in SPLITS:
        path = folder / f"{split}.bin"
        digest = hashlib.sha256()
        write_atomic(path, _joined(shards[split], digest))
        manifest["splits"][split] = {  # type: ignore[index]
            "tokens": path.stat().st_size // dtype.itemsize,
            "documents": documents[split],
            "sha256": digest.hexdigest(),
        }
    write_atomic(folder / "manifest.json", [json.dumps(manifest, indent=1).encode()])
    shutil.rmtree(shards_folder, ignore_errors=True)
    return TokenStore.open(folder)


def _chunks(corpus: Corpus) -> Iterator[tuple[Split, list[Document]]]:
    """The corpus cut into the texts of one shard each; the same cuts every time."""
    texts: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    characters: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for split, document in corpus.read():
        texts[split].append(document)
        characters[split] += len(document)
        if characters[split] >= SHARD_CHARACTERS:
            yield split, texts[split]
            texts[split], characters[split] = [], 0
    for split in SPLITS:
        if texts[split]:
            yield split, texts[split]


def _chunk_hash(texts: list[Document]) -> str:
    """In a shard's name, so that a shard is only ever reused for the very same texts."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def _encode(tokenizer: Tokenizer, texts: list[Document], dtype: np.dtype[Any]) -> bytes:
    return encode_documents(tokenizer, texts, dtype).tobytes()


def _joined(shards: list[Path], digest: hashlib._Hash) -> Iterator[bytes]:
    """The shards' bytes one after the other, fed to `digest` on their way."""
    for shard in shards:
        with open(shard, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                yield chunk
