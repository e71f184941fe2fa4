"""Every objective: it is learned sparse, in whatever micro-batches, and resumed bit for bit; and what it scores."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from sparse_pretrain import evaluate, finetune, runs, scoring, train
from sparse_pretrain.checkpoint import store
from sparse_pretrain.config import EvaluateConfig, FinetuneConfig, TrainConfig
from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.crosscheck import check
from sparse_pretrain.data.build import data_module, open_store
from sparse_pretrain.data.tokenizer import load_tokenizer
from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluation import generation
from sparse_pretrain.objective import objective_of
from sparse_pretrain.sparsity import SparseLinear, load_recipe
from sparse_pretrain.tasks.build import build_model, build_task
from sparse_pretrain.tasks.classification import ImageClassification
from sparse_pretrain.tasks.sampling import sampling
from sparse_pretrain.tasks.task import Sizes
from sparse_pretrain.tasks.trained import load_trained
from tests.tasks.toy_tasks import TASKS, task_config, write_text, write_vocabulary

CPU = torch.device("cpu")


def rows_of(run_dir) -> list[dict[str, str]]:
    return runs.read_rows(run_dir / runs.METRICS_FILE)


def state_of(run_dir) -> dict[str, torch.Tensor]:
    checkpoint, _ = store.newest_valid(run_dir / runs.CHECKPOINTS)
    return store.load(checkpoint)["state_dict"]


def figures(capsys) -> dict[str, str]:
    """What `evaluate` printed, by name."""
    return {line[:17].strip(): line[18:] for line in capsys.readouterr().out.splitlines() if line[17:18] == " "}


@pytest.mark.parametrize("task", TASKS)
def test_it_is_learned_with_2_4_weights_and_resumed_bit_for_bit(task, tmp_path):
    whole = train.run(task_config(task, tmp_path))
    rows = rows_of(whole)
    assert float(rows[-1]["val/loss"]) < float(rows[5]["val/loss"]) or task in ("question_answering",)
    losses = [float(row["train/loss"]) for row in rows]
    assert sum(losses[-3:]) < sum(losses[:3])
    model = load_trained(str(whole), CPU).model
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(sparse) == (8 if task == "seq2seq" else 4)
    for layer in sparse:
        kept = (layer.current_weight() != 0).view(layer.out_features, -1, 4).sum(-1)
        assert (kept == 2).all()

    part = task_config(task, tmp_path, "part", trainer__stop_after=6)
    train.run(part)
    part.trainer.stop_after = None
    train.run(part)
    for name, value in state_of(whole).items():
        assert torch.equal(value, state_of(tmp_path / "part")[name]), name


@pytest.mark.parametrize("task", ["masked_lm", "seq2seq", "image_classification"])
def test_micro_batches_with_different_numbers_of_targets_give_the_mean_over_all(task, tmp_path):
    one, many = (
        train.run(task_config(task, tmp_path, name, trainer__micro_batch_size=size, trainer__steps=3))
        for name, size in (("one", None), ("many", 2))
    )
    for a, b in zip(rows_of(one), rows_of(many), strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-5)
        assert float(a["train/grad_norm"]) == pytest.approx(float(b["train/grad_norm"]), rel=1e-4)


METRICS = {
    "masked_lm": {"loss", "accuracy", "perplexity"},
    "seq2seq": {"bleu", "chrf", "rougeL", "meteor_exact_stem", "exact_match"},
    "conditional_lm": {"bleu", "exact_match"},
    "image_classification": {"top_1", "top_5", "accuracy"},
    "text_classification": {"accuracy"},
    "regression": {"pearson", "spearman"},
    "question_answering": {"exact_match", "f1", "questions"},
}


@pytest.mark.parametrize("task", METRICS)
def test_evaluate_gives_the_metrics_of_the_task(task, tmp_path, capsys):
    if task in ("seq2seq", "conditional_lm"):
        pytest.importorskip("sacrebleu")
        pytest.importorskip("rouge_score")
    steps = {"seq2seq": 60, "text_classification": 60, "image_classification": 30}.get(task, 12)
    run_dir = train.run(task_config(task, tmp_path, trainer__steps=steps, trainer__eval_every=100))
    capsys.readouterr()
    evaluate.run(EvaluateConfig(checkpoint=str(run_dir), accelerator="cpu", beams=2))
    found = figures(capsys)
    assert METRICS[task] <= found.keys()
    assert float(found["loss"]) == pytest.approx(float(rows_of(run_dir)[-1]["val/loss"]), rel=1e-4)
    if task == "image_classification":
        assert float(found["top_1"]) == 1.0
    if task == "text_classification":
        assert float(found["accuracy"]) > 0.7
        assert found["accuracy"] == f"{float(rows_of(run_dir)[-1]['val/accuracy']):.6g}"


@pytest.mark.parametrize("task", ["seq2seq", "conditional_lm"])
def test_with_one_beam_the_likeliest_token_is_written_each_time(task, tmp_path):
    """Against whole forward passes over what the validation batches hold."""
    run_dir = train.run(task_config(task, tmp_path, trainer__steps=40))
    trained = load_trained(str(run_dir), CPU)
    data, cfg = evaluate.recorded_data(trained), trained.cfg
    tokenizer = load_tokenizer(data.tokenizer_path.read_bytes(), "")
    start, end = data.manifest["target_start"], data.manifest["target_end"]
    module = data_module(cfg.data, data, batch_size=4, seed=1, total_steps=1, eval_batches=100, **sampling(cfg))
    batch = next(iter(module.validation_loader()))
    expected = []
    for row in range(4):
        if task == "seq2seq":
            source, mask, written = batch["source"][row : row + 1], batch["source_mask"][row : row + 1], [start]
        else:
            text = batch["tokens"][row].tolist()
            source, written = None, text[: text.index(start) + 1]
        begin = len(written)
        for _ in range(cfg.data.max_target_len):
            tokens = torch.tensor([written])
            logits = trained.model(tokens) if source is None else trained.model(source, tokens, mask)
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == end:
                break
        expected.append(tokenizer.decode([token for token in written[begin:] if token != end]).strip())
    assert len(set(expected)) > 1
    assert list(scoring.generate(trained, data, [0, 1, 2, 3], 2, beams=1)) == expected


def finetuning(pretrained, task, folder, **changes) -> FinetuneConfig:
    cfg = task_config(task, folder)
    cfg.data.tokenizer = None
    own = {"recipe": load_recipe("dense"), "optimizer": cfg.optimizer, "trainer": cfg.trainer, "epochs": 2.0}
    return FinetuneConfig(
        checkpoint=str(pretrained), data=cfg.data, runs_dir=str(folder / "runs"), **{**own, **changes}
    )


@pytest.fixture
def pretrained(tmp_path):
    """A BERT whose sparse phase is its last."""
    return train.run(task_config("masked_lm", tmp_path / "pretrained"))


def test_finetuning_starts_from_what_the_checkpoint_computes(pretrained, tmp_path):
    """Dense from its 2:4 weights, sparse from its master weights; the head is new."""
    source = load_trained(str(pretrained), CPU)
    for recipe, weight_of in (("dense", SparseLinear.current_weight), ("ste", lambda layer: layer.weight)):
        cfg = finetuning(pretrained, "text_classification", tmp_path / recipe, recipe=load_recipe(recipe))
        cfg.optimizer.lr, cfg.epochs = 0.0, 0.1
        run_dir = finetune.run(cfg)
        state, steps = state_of(run_dir), runs.read_config(run_dir).trainer.steps
        assert steps == math.ceil(0.1 * 64 / 8)
        for name, layer in source.model.named_modules():
            if isinstance(layer, SparseLinear):
                assert torch.equal(state[f"model.body.{name}.weight"], weight_of(layer)), name
        assert torch.equal(state["model.body.tok_embed.weight"], source.model.tok_embed.weight)
        assert "model.classifier.weight" in state


def test_lora_finetuning_trains_adapters_and_the_new_head_alone(pretrained, tmp_path):
    recipe = load_recipe("dense")
    recipe.train_weights, recipe.adapter.kind, recipe.adapter.rank = False, "lora", 2
    recipe.include = ["*.attn.qkv"]
    run_dir = finetune.run(finetuning(pretrained, "text_classification", tmp_path / "lora", recipe=recipe))
    before, after = state_of(pretrained), state_of(run_dir)
    body = [name for name in before if name.startswith("model.") and ".ffn." not in name]
    same = [name for name in body if name.replace("model.", "model.body.", 1) in after]
    assert len(same) > 10
    for name in same:
        assert torch.equal(before[name], after[name.replace("model.", "model.body.", 1)]), name
    torch.manual_seed(1)
    fresh = build_model(
        runs.read_config(run_dir), Sizes(vocab_size=len(before["model.tok_embed.weight"]), num_classes=2)
    )
    assert not torch.equal(after["model.classifier.weight"], fresh.state_dict()["classifier.weight"])
    assert any(".adapter." in name and value.any() for name, value in after.items() if name.endswith("adapter.b"))


def test_finetuning_goes_on_where_it_was_stopped(pretrained, tmp_path):
    whole = finetune.run(finetuning(pretrained, "text_classification", tmp_path / "whole"))
    cfg = finetuning(pretrained, "text_classification", tmp_path / "part")
    cfg.trainer.stop_after = 7
    finetune.run(cfg)
    cfg.trainer.stop_after = None
    part = finetune.run(cfg, "sparse-pretrain finetune …")
    assert runs.read_json(part / runs.RUN_FILE)["command"] == "sparse-pretrain finetune …"
    for name, value in state_of(whole).items():
        assert torch.equal(value, state_of(part)[name]), name


def test_finish_shows_the_metrics(pretrained, tmp_path, capsys):
    run_dir = finetune.run(finetuning(pretrained, "regression", tmp_path / "stsb"))
    finetune.finish([run_dir])
    out = capsys.readouterr().out
    assert "pearson" in out
    assert "accuracy" in out  # of the table: a score has none


def test_an_epoch_of_hidden_words_goes_through_the_text_once(pretrained, tmp_path):
    """Two tokens of a sequence frame it."""
    cfg = finetuning(pretrained, "masked_lm", tmp_path / "masked", recipe=load_recipe("dense"))
    cfg.epochs, cfg.warmup_share, cfg.dropout = 1.0, 0.5, 0.3
    run_dir = finetune.run(cfg)
    facts = runs.read_json(run_dir / runs.RUN_FILE)
    tokens = open_store(Path(facts["data"])).num_tokens("train")
    made = runs.read_config(run_dir)
    assert made.trainer.steps == math.ceil((tokens - 1) // (16 - 2) / 8)
    assert made.scheduler.warmup_steps == round(made.trainer.steps / 2)
    assert made.model.dropout == 0.3


def test_scores_of_other_data_without_training(pretrained, tmp_path):
    """A learning rate of 0, as the documents say: what evaluates a run on another split."""
    first = finetune.run(finetuning(pretrained, "text_classification", tmp_path / "first"))
    cfg = finetuning(first, "text_classification", tmp_path / "second", epochs=1e-6)
    cfg.optimizer.lr = 0.0
    second = finetune.run(cfg)
    assert runs.read_config(second).trainer.steps == 1
    for name, value in state_of(first).items():
        if name.startswith("model."):
            assert torch.equal(value, state_of(second)[name]), name
    assert rows_of(first)[-1]["val/accuracy"] == rows_of(second)[-1]["val/accuracy"]


@pytest.fixture
def hugging_face(tmp_path):
    """A BERT of transformers, with the older vocab.txt."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, max_position_embeddings=32, **shape))
    model.save_pretrained(tmp_path / "hf")
    write_vocabulary(tmp_path / "hf")
    return tmp_path / "hf"


def test_finetuning_a_folder_with_a_vocabulary_file(hugging_face, tmp_path):
    run_dir = finetune.run(finetuning(hugging_face, "text_classification", tmp_path / "run", epochs=0.1))
    tokenizer = load_tokenizer((run_dir / runs.TOKENIZER_FILE).read_bytes(), "")
    assert tokenizer.encode("red bird").tokens == ["[CLS]", "red", "bird", "[SEP]"]


def test_finetuning_does_not_ignore_what_it_cannot_do(pretrained, hugging_face, tmp_path):
    cfg = finetuning(pretrained, "text_classification", tmp_path / "run")
    cfg.data.tokenizer = "other.json"
    with pytest.raises(UserError, match=r"data\.tokenizer: found other\.json; allowed: null: texts are cut as"):
        finetune.run(cfg)
    values = json.loads((hugging_face / "config.json").read_text())
    (hugging_face / "config.json").write_text(json.dumps({**values, "model_type": "roberta"}))
    cfg = finetuning(hugging_face, "text_classification", tmp_path / "run", dropout=0.2)
    with pytest.raises(UserError, match=r"dropout: found 0\.2; allowed: null with model\.family=hf"):
        finetune.run(cfg)


def refuses(expected: str, checkpoint, **options) -> None:
    with pytest.raises(UserError, match=expected):
        evaluate.run(EvaluateConfig(checkpoint=str(checkpoint), accelerator="cpu", **options))


def test_evaluate_says_what_it_cannot_do(pretrained, hugging_face, tmp_path):
    refuses(r"wikitext: found set for a bert of data\.task=language_modeling", pretrained, wikitext=True)
    refuses(r"text: found set for a bert", pretrained, text=["x.txt"])
    refuses("split: found train", pretrained, split="train")
    refuses("hf, a Hugging Face folder, which does not say what it was trained on; .*finetune", hugging_face)
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    text = [str(write_text(tmp_path))]
    refuses("gpt2 without a tokenizer; allowed: one with tokenizer.json or", tmp_path / "gpt2", text=text)
    refuses("wikitext: found true without text", tmp_path / "gpt2", wikitext=True)


def test_metrics_that_are_not_installed_are_told_before_any_text_is_written(tmp_path, monkeypatch):
    run_dir = train.run(task_config("seq2seq", tmp_path, trainer__steps=2))
    monkeypatch.setattr(generation, "LIBRARIES", ("no_such_library",))
    monkeypatch.setattr(scoring, "total_scores", None)
    refuses("no-such-library: found no such package", run_dir)


def image_task(tmp_path, **changes) -> tuple[ImageClassification, dict[str, torch.Tensor]]:
    cfg = task_config("image_classification", tmp_path, **changes)
    task = ImageClassification(cfg, Sizes(num_classes=4))
    torch.manual_seed(0)
    return task, {"images": torch.randn(6, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 3, 0, 1])}


def test_mixup_mixes_images_and_labels_by_the_same_share(tmp_path):
    task, batch = image_task(tmp_path, data__mixup=0.8)
    mixed = task.augment(batch, step=3)
    share = (mixed["labels"][1, 1]).item()
    assert 0 < share < 1
    torch.testing.assert_close(mixed["images"], share * batch["images"] + (1 - share) * batch["images"].flip(0))
    torch.testing.assert_close(mixed["labels"].sum(1), torch.ones(6))
    again, other = task.augment(batch, step=3), task.augment(batch, step=4)
    assert torch.equal(mixed["images"], again["images"])
    assert not torch.equal(mixed["images"], other["images"])


def test_cutmix_labels_are_the_shares_of_the_pixels(tmp_path):
    task, batch = image_task(tmp_path, data__cutmix=1.0)
    shares = set()
    for step in range(20):
        mixed = task.augment(batch, step)
        kept = (mixed["images"] == batch["images"]).all(dim=1).double().mean().item()
        assert mixed["labels"][1, 1].item() == pytest.approx(kept)
        shares.add(round(kept, 4))
    assert len(shares) > 5
    assert task.augment(batch, 0).keys() == batch.keys()
    plain, _ = image_task(tmp_path / "plain")
    assert plain.augment(batch, 0) is batch


def test_either_way_of_mixing_gets_half_of_the_steps(tmp_path):
    task, batch = image_task(tmp_path, data__mixup=0.8, data__cutmix=1.0)
    cut = 0
    for step in range(200):
        mixed = task.augment(batch, step)["images"]
        cut += bool(((mixed == batch["images"]) | (mixed == batch["images"].flip(0))).all())
    assert 70 < cut < 130


def test_label_smoothing_goes_over_mixed_labels(tmp_path):
    task, batch = image_task(tmp_path, data__mixup=0.8, data__label_smoothing=0.1)
    mixed = task.augment(batch, step=3)
    loss, _ = task.losses(mixed, 3, 0)
    wanted = 0.9 * mixed["labels"] + 0.1 / 4
    logits = task.model(mixed["images"])
    assert loss.item() == pytest.approx(-(wanted * logits.log_softmax(-1)).sum(1).mean().item(), rel=1e-5)


def test_a_distillation_token_learns_the_teachers_choice(tmp_path):
    """Half of the loss is the labels' through one token, half the teacher's likeliest class through the other."""
    teacher = train.run(
        task_config("image_classification", tmp_path, "teacher", recipe=load_recipe("dense"), trainer__steps=30)
    )
    cfg = task_config("image_classification", tmp_path, "student", model__distillation_token=True, trainer__steps=30)
    cfg.recipe.teacher.models, cfg.recipe.teacher.weight = [str(teacher)], 0.5
    student = train.run(cfg)
    rows = rows_of(student)
    assert float(rows[-1]["train/distillation_loss"]) < float(rows[0]["train/distillation_loss"])
    model, images = load_trained(str(student), CPU).model, torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 1.0)])
    _, distilled = model.forward_heads(images)
    assert torch.equal(distilled.argmax(-1), load_trained(str(teacher), CPU).model(images).argmax(-1))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("masked_lm", {"data__seq_len": 100}, "data.seq_len: found 100; allowed: at most model.max_seq_len=24"),
        ("seq2seq", {"data__max_source_len": 30}, "data.max_source_len: found 30; allowed: at most model.max_seq_len=24"),
        ("conditional_lm", {"data__max_target_len": 40}, "lengths whose sum is at most model.max_seq_len=48"),
        ("image_classification", {"data__image_size": 16}, "data.image_size: found 16; allowed: model.image_size=8"),
        ("text_classification", {"recipe__teacher__models": ["x"]}, "recipe.teacher.models: found set for text_class"),
        ("image_classification", {"recipe__teacher__models": ["x"], "recipe__teacher__logits": "y"}, "recipe.teacher.logits"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_any_work(task, changes, message, tmp_path):
    cfg = task_config(task, tmp_path, **changes)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        check(cfg)


def test_models_learn_from_data_of_their_kind(tmp_path):
    cfg: TrainConfig = task_config("image_classification", tmp_path)
    cfg.model = GPTConfig(name="gpt", n_layer=1, n_head=1, d_model=8)
    with pytest.raises(
        UserError,
        match=r"data: found image_classification \(image_classification\).*gpt model cannot.*"
        r"model\.family vit or torchvision or hf for these",
    ):
        objective_of(cfg)


def test_label_smoothing_of_a_text_leaves_out_what_is_not_asked_for(tmp_path):
    cfg = task_config("seq2seq", tmp_path)  # with data.label_smoothing=0.1
    task = build_task(cfg, Sizes(vocab_size=64))
    labels = torch.tensor([[5, 6, -100, -100], [7, -100, -100, -100]])
    logits = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1))
    task.logits = lambda batch: logits
    asked = logits.log_softmax(-1)[labels >= 0]
    likelihood = 0.9 * asked[range(3), [5, 6, 7]] + 0.1 * asked.mean(-1)
    assert task.losses({"labels": labels}, 0, 0)[0].item() == pytest.approx(-likelihood.mean().item(), rel=1e-6)
    scores = task.scores({"labels": labels})
    assert scores["loss"].tolist() == pytest.approx([-asked[range(3), [5, 6, 7]].sum().item(), 3], rel=1e-6)


@pytest.mark.parametrize("task", ["question_answering", "regression", "seq2seq"])
def test_the_truth_scores_full_marks(task, tmp_path, monkeypatch):
    for package in ("sacrebleu", "rouge_score", "nltk"):
        pytest.importorskip(package)
    trained = load_trained(str(train.run(task_config(task, tmp_path, trainer__steps=2))), CPU)
    data = evaluate.recorded_data(trained)

    def answers(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        positions = torch.stack((batch["start"], batch["end"]), dim=1)
        return torch.nn.functional.one_hot(positions, batch["tokens"].shape[1]).float()

    def texts(trained, data, examples, batch_size, beams):
        column = data.column("validation", "text")
        return (column[example]["target"] for example in examples)

    truth = {"question_answering": answers, "regression": lambda batch: 2 * batch["labels"][:, None] + 1}
    if task in truth:
        trained.task.logits = truth[task]
    monkeypatch.setattr(scoring, "generate", texts)
    scores = scoring.score(trained, data, 8, None, 1, nullcontext)
    full = {"question_answering": ("exact_match", 100), "regression": ("pearson", 1), "seq2seq": ("exact_match", 100)}
    name, value = full[task]
    assert scores[name] == pytest.approx(value)
