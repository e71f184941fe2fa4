"""`sparse-pretrain evaluate`: how good a checkpoint is at what it learned: perplexity, or the metrics of its task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_pretrain import runs, scoring
from sparse_pretrain.config import EvaluateConfig
from sparse_pretrain.config_data import TextConfig
from sparse_pretrain.data.build import Store, open_store, prepare
from sparse_pretrain.data.corpus import Split
from sparse_pretrain.data.sources import file_documents, find_files
from sparse_pretrain.data.token_store import TokenStore
from sparse_pretrain.data.tokenizer import encode_documents, load_tokenizer, vocab_size
from sparse_pretrain.data.tokenizer_files import checkpoint_tokenizer
from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluation.acceptance import tokens_per_pass, total_acceptance
from sparse_pretrain.evaluation.perplexity import perplexities, text_loss, windows
from sparse_pretrain.evaluation.wikitext import detokenize_wikitext
from sparse_pretrain.hardware import pick_device, precision_dtype
from sparse_pretrain.sparsity.represent import represent
from sparse_pretrain.tasks.causal_lm import CausalLM
from sparse_pretrain.tasks.teacher import TeacherFolder, find_teacher, load_teacher
from sparse_pretrain.tasks.trained import Trained, load_trained

DRAFT_TOKENS = (1, 2, 4, 8)  # for which the tokens per pass are shown


def run(cfg: EvaluateConfig) -> None:
    """Prints the figures of a checkpoint.

    Raises:
        UserError: no such checkpoint, no such text, `weights` that the checkpoint does not have, a teacher that does
            not fit, or options of texts for another task.
    """
    device = pick_device(cfg.accelerator, "accelerator")
    dtype = precision_dtype(cfg.precision, device, "precision")
    autocast = nullcontext if dtype == torch.float32 else lambda: torch.autocast(device.type, dtype)
    trained = load_trained(cfg.checkpoint, device)
    weights = represent(trained.model, cfg.weights)
    shown = {"checkpoint": f"{trained.checkpoint} (step {trained.step})", "weights": weights}
    if isinstance(trained.task, CausalLM):
        shown |= evaluate_text(cfg, trained, device, autocast)
    else:
        for option in ("text", "wikitext", "stride", "seq_len", "teacher"):
            if getattr(cfg, option):
                raise UserError(
                    option,
                    f"set for a {trained.cfg.model.name} of data.task={trained.cfg.data.task}",
                    "unset: it is for causal language models",
                )
        shown |= evaluate_task(cfg, trained, autocast)
    for name, value in shown.items():
        print(f"{name:<17} {value}")


def evaluate_task(
    cfg: EvaluateConfig, trained: Trained, autocast: Callable[[], AbstractContextManager]
) -> dict[str, str]:
    """The metrics of a task's data."""
    if cfg.split != "validation":
        raise UserError("split", f"{cfg.split} for a model of {trained.cfg.data.task}", ["validation"])
    data = recorded_data(trained)
    scores = scoring.score(trained, data, cfg.batch_size, cfg.batches, cfg.beams, autocast)
    shown = {name: show(value) for name, value in scores.items()}
    return {"data": f"{data.manifest['name']}, validation split", **shown}


def show(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def evaluate_text(
    cfg: EvaluateConfig, trained: Trained, device: torch.device, autocast: Callable[[], AbstractContextManager]
) -> dict[str, str]:
    """Perplexity over a text in windows; with a teacher also how good a draft model of it this is."""
    data = trained.cfg.data
    assert isinstance(data, TextConfig)
    seq_len = cfg.seq_len or data.seq_len
    limit = getattr(trained.cfg.model, "max_seq_len", seq_len)
    if seq_len > limit:
        raise UserError("seq_len", seq_len, f"at most the {limit} that the model is made for")
    stride = cfg.stride or seq_len
    tokens, text, where = evaluation_tokens(cfg, trained)
    if cfg.batches is not None:
        tokens, text = tokens[: cfg.batches * cfg.batch_size * seq_len + 1], None
    teacher = teacher_for(trained, cfg.teacher, seq_len) if cfg.teacher is not None else None
    loss, count = text_loss(trained.model, tokens, seq_len, stride, cfg.batch_size, device, autocast), len(tokens) - 1
    shown = {
        "text": f"{where}: {count:,} tokens predicted, in sequences of {seq_len}"
        + (f", a new one every {stride}" if stride < seq_len else ""),
        "loss": f"{loss / count:.6f}",
    }
    figures = perplexities(loss, count, text or ".")
    shown["perplexity"] = f"{figures['perplexity']:.4f}"
    if text is not None:
        shown["by word"] = f"{figures['word_perplexity']:.4f}"
        shown["bits per byte"] = f"{figures['bits_per_byte']:.4f}"
    if teacher is not None:
        target = load_teacher(teacher.folder, device, "teacher")
        size = vocab_size(
            load_tokenizer(
                checkpoint_tokenizer(trained.tokenizer_path, trained.checkpoint), str(trained.tokenizer_path)
            )
        )
        batches: Iterator[Tensor] = (batch for batch, _ in windows(tokens, seq_len, seq_len, cfg.batch_size))
        sums, count = total_acceptance(trained.model, target, batches, size, device, autocast)
        sampled, greedy = (sums / count).tolist()
        drafts = "  ".join(f"{n}: {tokens_per_pass(sampled, n):.3f}" for n in DRAFT_TOKENS)
        shown["teacher"] = str(teacher.folder)
        shown["acceptance"] = f"{sampled:.6f} of tokens sampled at temperature 1, {greedy:.6f} of the likeliest ones"
        shown["tokens per pass"] = f"of the teacher, by the number drafted  {drafts}"
    return shown


def teacher_for(trained: Trained, path: str, seq_len: int) -> TeacherFolder:
    """The model at `path`, which is to accept the trained one's tokens.

    Raises:
        UserError: naming `teacher`: there is none, it has another tokenizer, or it is made for shorter sequences.
    """
    teacher = find_teacher(path, "teacher")
    if not teacher.has_tokenizer(checkpoint_tokenizer(trained.tokenizer_path, trained.checkpoint)):
        raise UserError("teacher", f"{path}, which has another tokenizer than the checkpoint", "one with the same")
    if teacher.max_seq_len is not None and teacher.max_seq_len < seq_len:
        raise UserError(
            "teacher", f"{path}, made for sequences of {teacher.max_seq_len}", f"one for at least seq_len={seq_len}"
        )
    return teacher


def evaluation_tokens(cfg: EvaluateConfig, trained: Trained) -> tuple[np.ndarray, str | None, str]:
    """The token ids to evaluate on, the text that they are of where there is one, and a name for them.

    Raises:
        UserError: files that are not there, or a corpus whose tokenizer is no longer the checkpoint's.
    """
    if not cfg.text:
        if cfg.wikitext:
            raise UserError("wikitext", "true without text", "text=[...], WikiText's files, with it")
        data = recorded_data(trained)
        assert isinstance(data, TokenStore)
        split: Split = "train" if cfg.split == "train" else "validation"
        return data.split(split), None, f"{data.manifest['name']}, {split} split"
    files = find_files(cfg.text, "text")
    tokenizer = load_tokenizer(
        checkpoint_tokenizer(trained.tokenizer_path, trained.checkpoint), str(trained.tokenizer_path)
    )
    documents = [document for path in files for document in file_documents(path, "text")]
    text = "\n".join(documents)
    if cfg.wikitext:  # one text, of which nothing marks the end, as published perplexities have it
        encoded = tokenizer.encode(detokenize_wikitext(text), add_special_tokens=False)
        return np.array(encoded.ids), text, ", ".join(cfg.text)
    return encode_documents(tokenizer, documents, np.int64), text, ", ".join(cfg.text)


def recorded_data(trained: Trained) -> Store:
    """What a run was trained on.

    Raises:
        UserError: it gives another tokenizer here than the checkpoint's; or this is a Hugging Face folder, which does
            not say.
    """
    run_dir = trained.checkpoint.parent.parent
    if not (run_dir / runs.CONFIG_FILE).is_file():
        raise UserError(
            "checkpoint",
            f"{trained.checkpoint}, a Hugging Face folder, which does not say what it was trained on",
            "a run; or for a causal language model text=[...]",
            hint="`finetune checkpoint=FOLDER data=… epochs=1e-6 optimizer.lr=0` makes a run of it as it is",
        )
    folder = Path(runs.read_json(run_dir / runs.RUN_FILE).get("data", ""))
    data = open_store(folder) if (folder / "manifest.json").is_file() else prepare(trained.cfg.data)
    if data.tokenizer_path is not None and data.tokenizer_path.read_bytes() != checkpoint_tokenizer(
        trained.tokenizer_path, trained.checkpoint
    ):
        raise UserError(
            "checkpoint",
            f"a run whose data ({trained.cfg.data.name}) give another tokenizer here",
            "one trained on the data as they are on this machine",
            hint="A language model can be evaluated on files with text=[...]",
        )
    return data
