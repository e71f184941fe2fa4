"""The tokens of a tokenizer that stand for no text, and how they frame one."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, processors

from sparse_pretrain.data.corpus import END_OF_TEXT
from sparse_pretrain.errors import UserError

# What published tokenizers call them; the first that a tokenizer has counts.
NAMES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "start": ("[CLS]", "<s>", "<|begin_of_text|>", "<bos>", END_OF_TEXT),
    "end": (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]"),
    "separator": ("[SEP]", "</s>", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "unknown": ("[UNK]", "<unk>"),
}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens; None for one that the tokenizer does not have. Two may be the same token.

    pad: fills a batch up. start: before a text, or before what a decoder writes. end: after a document or a target.
    separator: after each part of an encoder's input. mask: instead of a hidden token.
    """

    pad: int | None
    start: int | None
    end: int | None
    separator: int | None
    mask: int | None
    unknown: int | None

    @property
    def ids(self) -> list[int]:
        """All there are, without repetition, ascending."""
        return sorted({value for value in vars(self).values() if value is not None})

    @property
    def fill(self) -> int:
        """What stands where there is no token: pad, else end, else 0. Nothing is ever learnt of it."""
        return next((value for value in (self.pad, self.end) if value is not None), 0)


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The special tokens of a tokenizer, known by the names that published ones give them."""

    def first(names: tuple[str, ...]) -> int | None:
        ids = (tokenizer.token_to_id(name) for name in names)
        return next((int(value) for value in ids if value is not None), None)

    return SpecialTokens(**{role: first(names) for role, names in NAMES.items()})


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document.

    Raises:
        UserError: naming data.tokenizer, if it has none.
    """
    end = special_tokens(tokenizer).end
    if end is None:
        names = NAMES["end"]
        raise UserError(
            "data.tokenizer", "a tokenizer without an end-of-text token", f"one with {' or '.join(map(str, names))}"
        )
    return end


def frame(tokenizer: Tokenizer) -> None:
    """Make `tokenizer` put special tokens around texts and pairs of them, if it does not by itself: its separator (or
    end) after each, as GPT's authors do to fine-tune a decoder (Radford et al. 2018).

    Raises:
        UserError: naming data.tokenizer, if it has neither.
    """
    if tokenizer.num_special_tokens_to_add(False):
        return
    tokens = special_tokens(tokenizer)
    token_id = end_of_text_id(tokenizer) if tokens.separator is None else tokens.separator
    token = tokenizer.id_to_token(token_id)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {token}", pair=f"$A {token} $B:1 {token}:1", special_tokens=[(token, token_id)]
    )


def frame_of(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    encoding = tokenizer.encode("a")
    own = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
