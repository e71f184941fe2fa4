"""Tokenizers from the files that models are published with."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sparse_pretrain.data.corpus import END_OF_TEXT
from sparse_pretrain.errors import UserError

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALLOWED = (
    "bpe, wordpiece, or the path of a tokenizer.json, a vocab.txt (BERT), a vocab.json with merges.txt beside it "
    "(GPT-2), or a folder with one of these"
)
FILES = ("tokenizer.json", "vocab.txt", "vocab.json")  # in a folder; the first that is there counts


def read_tokenizer(path: Path) -> bytes:
    """The tokenizer.json that the file or folder `path` amounts to.

    Raises:
        UserError: naming data.tokenizer, if it is not there or not the files of a tokenizer.
    """
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return read_tokenizer(path / name)
    if not path.is_file():
        raise UserError("data.tokenizer", path, ALLOWED)
    try:
        if path.name.endswith(".txt"):
            return wordpiece(path.read_text(encoding="utf-8").splitlines()).to_str().encode()
        if path.name == "vocab.json":
            return _byte_level_bpe(path).to_str().encode()
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError("data.tokenizer", f"{path} ({error})", ALLOWED) from error
    return path.read_bytes()


def checkpoint_tokenizer(path: Path, checkpoint: Path) -> bytes:
    """The tokenizer.json that a model's texts are cut by, in a Hugging Face folder also from a vocab.txt or vocab.json.

    Args:
        path: where a tokenizer.json would be.

    Raises:
        UserError: naming `checkpoint`: there is none.
    """
    try:
        return read_tokenizer(path if path.is_file() else path.parent)
    except UserError as error:
        raise UserError("checkpoint", f"{checkpoint} without a tokenizer", f"one with {' or '.join(FILES)}") from error


def wordpiece(vocabulary: list[str]) -> Tokenizer:
    """BERT's tokenizer (Devlin et al. 2019) with the pieces `vocabulary`, each one's id its place in the list.

    Texts become lower case, without accents, unless a piece has a capital: then it is a cased vocabulary.

    Raises:
        UserError: naming data.tokenizer, if special tokens of BERT are missing.
    """
    missing = [token for token in BERT_TOKENS if token not in vocabulary]
    if missing:
        raise UserError(
            "data.tokenizer", f"a vocabulary without {', '.join(missing)}", "one with BERT's special tokens"
        )
    cased = any(piece != piece.lower() for piece in vocabulary if piece not in BERT_TOKENS)
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    return as_bert(tokenizer, lowercase=not cased)


def as_bert(tokenizer: Tokenizer, lowercase: bool) -> Tokenizer:
    """Give a WordPiece model BERT's normalisation, words, frame ([CLS] a [SEP] b [SEP]) and decoding."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in BERT_TOKENS])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ids = {token: tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(ids.items())
    )
    return tokenizer


def _byte_level_bpe(vocabulary: Path) -> Tokenizer:
    """GPT-2's tokenizer, from its vocab.json and the merges.txt beside it."""
    merges = vocabulary.with_name("merges.txt")
    if not merges.is_file():
        raise UserError("data.tokenizer", f"{vocabulary} without a merges.txt beside it", ALLOWED)
    lines = merges.read_text(encoding="utf-8").splitlines()
    splits = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
    pairs = [(first, second) for first, _, second in splits]
    tokenizer = Tokenizer(models.BPE(json.loads(vocabulary.read_text(encoding="utf-8")), pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return tokenizer
