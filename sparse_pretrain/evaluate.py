"""`sparse-pretrain evaluate`: loss and perplexity of a checkpoint, and how often a teacher accepts its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sparse_pretrain import runs
from sparse_pretrain.config import EvaluateConfig
from sparse_pretrain.data.sources import file_documents, find_files
from sparse_pretrain.data.token_store import TokenStore, prepare
from sparse_pretrain.data.tokenizer import encode_documents, load_tokenizer, vocab_size
from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluation.acceptance import tokens_per_pass, total_acceptance
from sparse_pretrain.evaluation.perplexity import total_loss
from sparse_pretrain.hardware import pick_device, precision_dtype
from sparse_pretrain.sparsity.adapters import adapters_of
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.sparsity.packed import pack_model
from sparse_pretrain.sparsity.swap import densify
from sparse_pretrain.tasks.teacher import TeacherFolder, find_teacher, load_teacher
from sparse_pretrain.tasks.trained import Trained, load_trained

DRAFT_TOKENS = (1, 2, 4, 8)  # for which the tokens per pass are shown


def run(cfg: EvaluateConfig) -> None:
    """Prints the mean loss (nats per token) and perplexity over sequences that do not overlap; with a teacher also how
    good a draft model of it this is.

    Raises:
        UserError: no such checkpoint, no such text, `weights` that the checkpoint does not have, or a teacher that
            does not fit.
    """
    device = pick_device(cfg.accelerator, "accelerator")
    dtype = precision_dtype(cfg.precision, device, "precision")
    trained = load_trained(cfg.checkpoint, device)
    weights = represent(trained.model, cfg.weights)
    tokens, where = evaluation_tokens(cfg, trained)
    if len(tokens) < 2:
        raise UserError("text", f"{len(tokens)} tokens", "at least 2")
    teacher = teacher_for(trained, cfg.teacher) if cfg.teacher is not None else None
    target = load_teacher(teacher.folder, device, "teacher") if teacher is not None else None

    def batches() -> Iterator[Tensor]:
        return islice(sequence_batches(tokens, trained.cfg.data.seq_len, cfg.batch_size), cfg.batches)

    autocast = nullcontext if dtype == torch.float32 else lambda: torch.autocast(device.type, dtype)
    loss, count = total_loss(trained.model, batches(), device, autocast)
    mean = float(loss) / count
    print(f"checkpoint  {trained.checkpoint} (step {trained.step})")
    print(f"weights     {weights}")
    print(f"text        {where}: {count:,} tokens predicted, in sequences of {trained.cfg.data.seq_len}")
    print(f"loss        {mean:.6f}")
    print(f"perplexity  {math.exp(min(mean, 700)):.4f}")
    if teacher is not None and target is not None:
        size = vocab_size(load_tokenizer(trained.tokenizer_path.read_bytes(), str(trained.tokenizer_path)))
        sums, count = total_acceptance(trained.model, target, batches(), size, device, autocast)
        sampled, greedy = (sums / count).tolist()
        print(f"teacher     {teacher.folder}")
        print(f"acceptance  {sampled:.6f} of the tokens sampled at temperature 1, {greedy:.6f} of the likeliest ones")
        drafts = "  ".join(f"{n}: {tokens_per_pass(sampled, n):.3f}" for n in DRAFT_TOKENS)
        print(f"tokens per pass of the teacher, by the number drafted  {drafts}")


def teacher_for(trained: Trained, path: str) -> TeacherFolder:
    """The model at `path`, which is to accept the trained one's tokens.

    Raises:
        UserError: naming `teacher`: there is none, it has another tokenizer, or it is made for shorter sequences.
    """
    teacher = find_teacher(path, "teacher")
    if not teacher.has_tokenizer(trained.tokenizer_path.read_bytes()):
        raise UserError("teacher", f"{path}, which has another tokenizer than the checkpoint", "one with the same")
    if teacher.max_seq_len is not None and teacher.max_seq_len < trained.cfg.data.seq_len:
        raise UserError(
            "teacher",
            f"{path}, made for sequences of {teacher.max_seq_len}",
            f"one for at least {trained.cfg.data.seq_len}, the checkpoint's data.seq_len",
        )
    return teacher


def represent(model: nn.Module, weights: str) -> str:
    """Change how the model holds its weights, in place, and not what it computes; says what it holds then.

    Only of a run with `recipe.fp8` packed and dense weights are more precise: they are not quantised.

    Raises:
        UserError: `sparse` or `packed` for a model without layers in their sparse phase, or `packed` where they are
            not 2:4.
    """
    layers = [m for m in model.modules() if isinstance(m, SparseLinear) and m.is_sparse]
    sparse, pattern = len(layers), "{}:{}".format(*layers[0].pattern) if layers else ""
    if weights in ("sparse", "packed") and not sparse:
        raise UserError(
            "weights", f"{weights}, but no layer of this checkpoint is in its sparse phase", ["auto", "dense"]
        )
    if weights == "packed" and pattern != "2:4":
        raise UserError("weights", f"packed, for a checkpoint that is {pattern} sparse", ["auto", "dense", "sparse"])
    adapted = sum(adapter.active for adapter in adapters_of(model).values())
    beside = f", {adapted} adapters beside them" if adapted else ""
    if weights == "packed":
        return f"packed: values and 2-bit metadata in {pack_model(model)} layers{beside}"
    if weights == "dense":
        densify(model)
        if sparse and adapted:
            return f"dense, adapters merged into the {pattern} weights of {sparse} layers"
        return f"dense, with {pattern} zeros in {sparse} layers" if sparse else f"dense{beside}"
    return f"{pattern} sparse in {sparse} layers{beside}" if sparse else f"dense{beside}"


def evaluation_tokens(cfg: EvaluateConfig, trained: Trained) -> tuple[np.ndarray, str]:
    """The token ids to evaluate on, and a name for them.

    Raises:
        UserError: files that are not there, or a corpus whose tokenizer is no longer the checkpoint's.
    """
    if cfg.text:
        documents = [doc for path in find_files(cfg.text, "text") for doc in file_documents(path, "text")]
        tokenizer = load_tokenizer(trained.tokenizer_path.read_bytes(), str(trained.tokenizer_path))
        return encode_documents(tokenizer, documents, np.int64), ", ".join(cfg.text)
    recorded = Path(runs.read_json(trained.checkpoint.parent.parent / runs.RUN_FILE).get("token_store", ""))
    store = TokenStore.open(recorded) if (recorded / "manifest.json").is_file() else prepare(trained.cfg.data)
    if store.tokenizer_path.read_bytes() != trained.tokenizer_path.read_bytes():
        raise UserError(
            "checkpoint",
            f"a run whose corpus ({trained.cfg.data.name}) gives another tokenizer here",
            "one trained on the corpus as it is on this machine",
            hint="Evaluate on files with text=[...]",
        )
    return store.split("train" if cfg.split == "train" else "validation"), f"{trained.cfg.data.name}, {cfg.split} split"


def sequence_batches(tokens: np.ndarray, seq_len: int, batch_size: int) -> Iterator[Tensor]:
    """All whole sequences of `tokens`, without overlap, and the shorter rest as a batch of its own."""
    whole = (len(tokens) - 1) // seq_len
    for first in range(0, whole, batch_size):
        rows = np.arange(first, min(first + batch_size, whole))
        batch = tokens[rows[:, None] * seq_len + np.arange(seq_len + 1)]
        yield torch.from_numpy(batch.astype(np.int64))
    rest = tokens[whole * seq_len :]
    if len(rest) > 1:
        yield torch.from_numpy(rest.astype(np.int64))[None]
