"""The data that one-shot pruning measures a model's activations with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparse_pretrain.config import PruneConfig
from sparse_pretrain.config_data import TextConfig
from sparse_pretrain.data.build import data_module
from sparse_pretrain.data.sources import file_documents, find_files
from sparse_pretrain.data.tokenizer import load_tokenizer
from sparse_pretrain.data.tokenizer_files import checkpoint_tokenizer
from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluate import recorded_data
from sparse_pretrain.models.huggingface import is_hugging_face
from sparse_pretrain.objective import MASKED_LM, objective_of
from sparse_pretrain.tasks.sampling import sampling
from sparse_pretrain.tasks.task import Batch, batch_size
from sparse_pretrain.tasks.trained import Trained

PIECE = 8  # characters of a text per token asked for: enough for nearly every text, and few to tokenize
HUGGING_FACE_SEQ_LEN = 512


@dataclass(frozen=True)
class Calibration:
    """batches: as the model's task takes them; facts: what they are, with a digest of all of them."""

    batches: list[Batch]
    facts: dict[str, Any]


def calibration(cfg: PruneConfig, trained: Trained) -> Calibration:
    """`cfg.samples` sequences of `cfg.text`, or examples of what the model was trained on.

    Raises:
        UserError: there is no such data, not enough of it, or options of texts for a model of something else.
    """
    data = trained.cfg.data
    hugging_face = is_hugging_face(trained.checkpoint)
    for option in ("text", "seq_len"):
        if getattr(cfg, option) and not isinstance(data, TextConfig):
            raise UserError(option, f"set for a model of {data.task}", "this only for a language model")
    facts: dict[str, Any] = {"samples": cfg.samples}
    if isinstance(data, TextConfig):
        length = cfg.seq_len or (min(data.seq_len, HUGGING_FACE_SEQ_LEN) if hugging_face else data.seq_len)
        limit = getattr(trained.cfg.model, "max_seq_len", length)
        if length > limit:
            raise UserError("seq_len", length, f"at most the {limit} that the model is made for")
        data = dataclasses.replace(data, seq_len=length)
        facts["seq_len"] = length
    if cfg.text:
        facts["data"] = ", ".join(cfg.text)
        batches = _of_text(cfg, trained, facts["seq_len"])
    elif hugging_face:
        raise UserError(
            "text",
            "nothing for a Hugging Face folder",
            "text files to calibrate with",
            hint="For a model of anything but text, prune a run that `finetune` made of it",
        )
    else:
        store = recorded_data(trained)
        facts["data"] = f"{store.manifest['name']}, train split"
        steps = -(-cfg.samples // cfg.batch_size)
        module = data_module(
            data,
            store,
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            total_steps=steps,
            eval_batches=1,
            **sampling(trained.cfg),
        )
        batches = list(module.train_loader(range(steps)))
        rest = cfg.samples - sum(map(batch_size, batches[:-1]))
        batches[-1] = _first(batches[-1], rest)
    facts["sha256"] = _digest(batches)
    return Calibration(batches, facts)


def _of_text(cfg: PruneConfig, trained: Trained, seq_len: int) -> list[Batch]:
    content = checkpoint_tokenizer(trained.tokenizer_path, trained.checkpoint)
    tokenizer = load_tokenizer(content, str(trained.tokenizer_path))
    files = find_files(cfg.text, "text")
    documents = [document for path in files for document in file_documents(path, "text")]
    masked = objective_of(trained.cfg) == MASKED_LM
    rows = windows(documents, tokenizer, cfg.samples, seq_len + (not masked), cfg.seed)
    parts = rows.split(cfg.batch_size)
    return [{"tokens": part, "labels": part} for part in parts] if masked else list(parts)


def windows(documents: Sequence[str], tokenizer: Tokenizer, samples: int, length: int, seed: int) -> Tensor:
    """Sequences from all over the documents, (samples, length) int64: documents are cut into pieces, of which some are
    drawn; a sequence is the beginning of a piece, or of several one after another where they are short.

    Raises:
        UserError: there is not enough text.
    """
    size = PIECE * length
    pieces = [document[start : start + size] for document in documents for start in range(0, len(document), size)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    rows: list[list[int]] = []
    short: list[int] = []
    for number in order.tolist():
        ids = tokenizer.encode(pieces[number], add_special_tokens=False).ids
        if len(ids) < length:
            short += ids
            ids = short
        if len(ids) >= length:
            rows.append(ids[:length])
            if ids is short:
                short = []
        if len(rows) == samples:
            return torch.tensor(rows)
    raise UserError("samples", samples, f"at most {len(rows)} sequences of {length} tokens with this text")


def _first(batch: Batch, number: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[:number]
    return {name: tensor[:number] for name, tensor in batch.items()}


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in [batch] if isinstance(batch, Tensor) else batch.values():
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
