"""Rows of a Hugging Face dataset: one on the Hub, or a local folder that `datasets` understands."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_pretrain.data.corpus import Corpus, Document, Split, digest_of, hold_out
from sparse_pretrain.data.files import remembered_sha256
from sparse_pretrain.errors import UserError

if TYPE_CHECKING:
    from sparse_pretrain.config_data import ExamplesConfig, TextConfig


def corpus(cfg: TextConfig) -> Corpus:
    """A column of a dataset, a row a document; empty rows are skipped. Nothing is deduplicated: published
    corpora are, and the hashes of a web-scale one would fill the memory.

    The digest is of the request (and, for a local folder, of its files), so that a finished token store is
    found again without a network. It does not notice when a dataset on the Hub changes: delete the store to
    read it anew.

    Raises:
        UserError: naming the option; for a dataset on the Hub only when its documents are first read.
    """
    request = {
        **requested(cfg),
        "column": cfg.hf_text_column,
        "share": None if cfg.hf_validation_split else cfg.validation_share,
        "max_documents": cfg.max_documents,
    }

    def read() -> Iterator[tuple[Split, Document]]:
        if cfg.hf_validation_split is None:
            yield from hold_out(_documents(cfg, cfg.hf_train_split, "data.hf_train_split"), cfg.validation_share)
            return
        for document in _documents(cfg, cfg.hf_validation_split, "data.hf_validation_split"):
            yield "validation", document
        for document in _documents(cfg, cfg.hf_train_split, "data.hf_train_split"):
            yield "train", document

    return Corpus(digest_of(["huggingface", request]), read)


def requested(cfg: TextConfig | ExamplesConfig) -> dict[str, Any]:
    """What identifies a dataset: its name, config and splits; of a local folder its files' contents.

    Raises:
        UserError: naming data.hf_path, if it is not set.
    """
    if not cfg.hf_path:
        raise UserError("data.hf_path", "nothing", "the name of a Hugging Face dataset, or a local folder")
    folder = Path(cfg.hf_path).expanduser()
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return {
        "path": None if files else cfg.hf_path,
        "files": [[str(path.relative_to(folder)), remembered_sha256(path)] for path in files],
        "config": cfg.hf_config,
        "splits": [cfg.hf_train_split, cfg.hf_validation_split],
    }


def _documents(cfg: TextConfig, split: str, option: str) -> Iterator[Document]:
    rows = load(cfg, split, option, streaming=cfg.hf_streaming)
    column = cfg.hf_text_column
    texts = _texts(cfg, rows, column)
    yield from itertools.islice((text for text in texts if text and text.strip()), cfg.max_documents)


def _texts(cfg: TextConfig, rows: Any, column: str) -> Iterator[Any]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except (ConnectionError, FileNotFoundError) as error:
            raise _unreachable(cfg, error) from error
        if column not in row or not isinstance(row[column], str | None):
            texts = sorted(name for name, value in row.items() if isinstance(value, str))
            raise UserError("data.hf_text_column", column, texts or "a column of text; this dataset has none")
        yield row[column]


def load(
    cfg: TextConfig | ExamplesConfig, split: str, option: str, *, revision: str | None = None, streaming: bool = False
) -> Any:
    """A split as `datasets` gives it.

    Args:
        option: that names the split, for the message.

    Raises:
        UserError: naming the option at fault.
    """
    import datasets  # takes a second or two: only for those who use it

    try:
        path = os.path.expanduser(cfg.hf_path or "")
        return datasets.load_dataset(path, cfg.hf_config, split=split, revision=revision, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        raise _unreachable(cfg, error) from error
    except datasets.exceptions.DatasetsError as error:  # its files hold something else
        raise UserError(
            "data.hf_path", cfg.hf_path, "a dataset that `datasets` can load", str(error.__cause__ or error)
        ) from error
    except RuntimeError as error:  # a dataset that needs code of its own, which is never run
        raise UserError("data.hf_path", cfg.hf_path, "a dataset of data files", str(error)) from error
    except ValueError as error:  # says which splits or configs there are
        message = str(error)
        if "split" in message.lower():
            raise UserError(option, split, f"a split of {cfg.hf_path}", message) from error
        if "config" in message.lower():
            raise UserError("data.hf_config", cfg.hf_config, f"a config of {cfg.hf_path}", message) from error
        raise UserError("data.hf_path", cfg.hf_path, "a dataset that `datasets` can load", message) from error


def _unreachable(cfg: TextConfig | ExamplesConfig, error: Exception) -> UserError:
    return UserError(
        "data.hf_path",
        f"{cfg.hf_path}, which cannot be loaded ({error})",
        "a dataset on the Hugging Face Hub (needs a network unless cached), or a local folder",
    )
