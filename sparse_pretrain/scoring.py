"""What a trained model scores on its data: the loss, and the metrics that its task is known by."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from sparse_pretrain.config_data import PairsConfig, SentencesConfig
from sparse_pretrain.data.build import Store, data_module
from sparse_pretrain.data.example_store import ExampleStore
from sparse_pretrain.data.pairs import to_generate
from sparse_pretrain.data.questions import questions, window_offsets
from sparse_pretrain.data.tokenizer import load_tokenizer
from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluation import generation
from sparse_pretrain.evaluation.classification import glue_metrics, in_top
from sparse_pretrain.evaluation.question_answering import AnswerWindow, best_answer, squad_scores
from sparse_pretrain.models.generation import beam_search
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.models.seq2seq import Seq2Seq
from sparse_pretrain.tasks.classification import ImageClassification, TextClassification
from sparse_pretrain.tasks.metrics import total_scores
from sparse_pretrain.tasks.question_answering import QuestionAnswering
from sparse_pretrain.tasks.sampling import sampling
from sparse_pretrain.tasks.task import Batch, to_device
from sparse_pretrain.tasks.text_to_text import ConditionalLM, EncoderDecoder
from sparse_pretrain.tasks.trained import Trained

Scores = dict[str, float | int | str]
Autocast = Callable[[], AbstractContextManager]


@torch.no_grad()
def score(
    trained: Trained, data: Store, batch_size: int, batches: int | None, beams: int, autocast: Autocast
) -> Scores:
    """Scores on the validation split of `data`.

    Args:
        batches: at most that many of them; null = all.
        beams: of the search for generated texts.

    Raises:
        UserError: a metric needs a package that is not installed.
    """
    task, cfg = trained.task, trained.cfg
    generates = isinstance(task, EncoderDecoder | ConditionalLM) and isinstance(task.model, GPT | Seq2Seq)
    if generates:
        generation.check_installed()
    module = data_module(
        cfg.data,
        data,
        batch_size=batch_size,
        seed=cfg.seed,
        total_steps=1,
        eval_batches=batches or sys.maxsize // batch_size,
        **sampling(cfg),
    )

    def loader() -> Iterable[Batch]:
        return tqdm(module.validation_loader(), desc="evaluating", unit="batch", disable=None, leave=False)

    sums = total_scores(task, loader(), autocast)
    scores: Scores = {"examples": _count(loader())}
    scores |= {name: float(total / count) for name, (total, count) in sums.items()}
    if isinstance(task, TextClassification):
        assert isinstance(cfg.data, SentencesConfig)
        logits, labels = _outputs(task, loader(), autocast)
        predictions = logits[:, 0] if task.sizes.num_classes == 1 else logits.argmax(-1)
        scores |= glue_metrics(cfg.data.glue_task, predictions, labels)
    elif isinstance(task, ImageClassification):
        logits, labels = _outputs(task, loader(), autocast)
        scores |= {f"top_{k}": float(in_top(logits, labels, k).double().mean()) for k in (1, 5)}
    elif isinstance(task, QuestionAnswering):
        assert isinstance(data, ExampleStore)
        scores |= answer_scores(task, data, loader(), autocast)
    elif generates:
        assert isinstance(data, ExampleStore)
        scores |= generation_scores(trained, data, batch_size, batches, beams, autocast)
    else:
        scores["perplexity"] = math.exp(min(float(scores["loss"]), 700))
    return scores


def _count(batches: Iterable[Batch]) -> int:
    return sum(len(batch if isinstance(batch, Tensor) else next(iter(batch.values()))) for batch in batches)


def _outputs(
    task: ImageClassification | TextClassification, batches: Iterable[Batch], autocast: Autocast
) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) fp32 and labels (n,) of all examples, on the CPU."""
    logits, labels = [], []
    for batch in batches:
        batch = to_device(batch, task.device)
        assert isinstance(batch, dict)
        with autocast():
            logits.append(task.logits(batch).float().cpu())
        labels.append(batch["labels"].cpu())
    return torch.cat(logits), torch.cat(labels)


def answer_scores(task: QuestionAnswering, data: ExampleStore, batches: Iterable[Batch], autocast: Autocast) -> Scores:
    """SQuAD's exact match and F1, in percent, over the questions all of whose windows are in `batches`."""
    logits: dict[int, Tensor] = {}
    for batch in batches:
        batch = to_device(batch, task.device)
        assert isinstance(batch, dict)
        with autocast():
            rows = task.logits(batch).float().cpu()
        logits |= dict(zip(batch["index"].tolist(), rows, strict=True))
    predictions, answers = {}, {}
    for question in questions(data):
        if not all(window in logits for window in question.windows):
            continue
        windows = []
        for window in question.windows:
            offsets = window_offsets(data, window)
            start, end = logits[window][:, : len(offsets)].tolist()
            windows.append(AnswerWindow(start, end, offsets))
        predictions[question.id] = best_answer(question.context, windows)
        answers[question.id] = question.answers
    if not answers:
        raise UserError("batches", "too few for all windows of one question", "more, or null for all")
    return {"questions": len(answers), **squad_scores(predictions, answers)}


def generation_scores(
    trained: Trained, data: ExampleStore, batch_size: int, batches: int | None, beams: int, autocast: Autocast
) -> Scores:
    """Metrics of the texts generated from each source, against all its references."""
    assert isinstance(trained.cfg.data, PairsConfig)
    wanted = to_generate(trained.cfg.data, data)[: None if batches is None else batches * batch_size]
    references = [item.references for item in wanted]
    with autocast():
        texts = list(generate(trained, data, [item.index for item in wanted], batch_size, beams))
    bleu, chrf = generation.bleu(texts, references), generation.chrf(texts, references)
    return {
        "texts": len(texts),
        "bleu": bleu.value,
        "bleu signature": bleu.signature,
        "chrf": chrf.value,
        **generation.rouge(texts, references),
        "meteor_exact_stem": generation.meteor_exact_stem(texts, references),
        "exact_match": generation.exact_match(texts, references),
    }


def generate(trained: Trained, data: ExampleStore, examples: list[int], batch_size: int, beams: int) -> Iterator[str]:
    """What the model writes for the sources of these examples of the validation split."""
    cfg, model = trained.cfg.data, trained.model
    assert isinstance(cfg, PairsConfig)
    assert data.tokenizer_path is not None
    tokenizer = load_tokenizer(data.tokenizer_path.read_bytes(), str(data.tokenizer_path))
    facts, sources = data.manifest, data.column("validation", "source")
    start, end, fill = facts["target_start"], facts["target_end"], facts["fill"]
    device = trained.task.device
    bar = tqdm(total=len(examples), desc="generating", unit="text", disable=None, leave=False)
    if isinstance(model, Seq2Seq):
        room = cfg.max_source_len - len(facts["source_before"]) - len(facts["source_after"])
        for first in range(0, len(examples), batch_size):
            rows = [
                [*facts["source_before"], *sources[example][:room].tolist(), *facts["source_after"]]
                for example in examples[first : first + batch_size]
            ]
            source = torch.full((len(rows), max(map(len, rows))), fill, device=device)
            mask = torch.zeros_like(source, dtype=torch.bool)
            for i, row in enumerate(rows):
                source[i, : len(row)] = torch.tensor(row, device=device)
                mask[i, : len(row)] = True
            tokens = model.generate(source, mask, start, end, cfg.max_target_len, beams)
            bar.update(len(rows))
            yield from (_text(tokenizer, row[1:], end) for row in tokens.tolist())
    else:
        assert isinstance(model, GPT)
        for example in examples:  # one at a time: prompts have different lengths
            prompt = [*sources[example][: cfg.max_source_len - 1].tolist(), start]
            step = model.step(len(prompt) + cfg.max_target_len)
            found = beam_search(step, torch.tensor([prompt], device=device), beams, cfg.max_target_len, end)
            bar.update(1)
            yield _text(tokenizer, found[0, len(prompt) :].tolist(), end)
    bar.close()


def _text(tokenizer: Tokenizer, tokens: list[int], end: int) -> str:
    """Up to the end token."""
    written = tokens[: tokens.index(end)] if end in tokens else tokens
    return tokenizer.decode(written).strip()
