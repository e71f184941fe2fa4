"""Exported folders in lm-eval: the scores of our own loss."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer

from sparse_pretrain import runs, train
from sparse_pretrain.tasks.trained import load_trained
from tests.cli.test_export import CPU, SPARSE_TO_THE_END

ROLLING = """
task: rolling
dataset_path: text
dataset_kwargs: {data_files: {test: TEXT}, sample_by: document}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: " "
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
def test_lm_eval(tiny, corpus, export, tmp_path):
    """Perplexity and multiple choice by lm-evaluation-harness, told nothing of us: its loglikelihoods are ours."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="lm_eval's models of transformers need accelerate")
    run_dir = train.run(tiny("ste", **SPARSE_TO_THE_END))
    folder, _ = export("dense", run_dir)
    model = load_trained(str(run_dir), CPU).model
    own = Tokenizer.from_file(str(run_dir / runs.TOKENIZER_FILE))
    end = own.token_to_id("<|endoftext|>")
    words = corpus.read_text().split()
    (tmp_path / "text.txt").write_text(" ".join(words[:60]))
    questions = [
        {"question": " ".join(words[i : i + 2]), "choices": words[i + 2 : i + 5], "label": 0} for i in (0, 9, 30)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rolling.yaml").write_text(ROLLING.replace("TEXT", str(tmp_path / "text.txt")))
    (tasks / "choice.yaml").write_text(CHOICE.replace("QUESTIONS", str(tmp_path / "questions.jsonl")))
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32",
         "--tasks", "rolling,choice", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "1",
         "--output_path", str(tmp_path / "results"), "--log_samples"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    (scores,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(scores.read_text())["results"]

    @torch.no_grad()
    def loglikelihood(context: list[int], continuation: list[int]) -> float:
        logits = model(torch.tensor([(context + continuation)[:-1]])).log_softmax(-1)[0, -len(continuation) :]
        return float(logits.gather(1, torch.tensor(continuation)[:, None]).sum())

    # lm-eval's protocol: windows of 16 tokens, each read after the token before it; the last one reads back to 16
    tokens = own.encode((tmp_path / "text.txt").read_text(), add_special_tokens=False).ids
    assert len(tokens) > 32
    total = 0.0
    for start in range(0, len(tokens), 16):
        part = tokens[start : start + 16]
        total += loglikelihood(([end, *tokens])[max(start + len(part) - 16, 0) : start + 1], part)
    assert results["rolling"]["word_perplexity,none"] == pytest.approx(math.exp(-total / 60), rel=1e-4)
    (samples,) = (tmp_path / "results").rglob("samples_choice_*.jsonl")
    for question, line in zip(questions, samples.read_text().splitlines(), strict=True):
        context = own.encode(question["question"], add_special_tokens=False).ids
        for choice, (((there, _),),) in zip(question["choices"], [[r] for r in json.loads(line)["resps"]], strict=True):
            continuation = own.encode(f"{question['question']} {choice}", add_special_tokens=False).ids[len(context) :]
            assert float(there) == pytest.approx(loglikelihood(context, continuation), rel=1e-4)
