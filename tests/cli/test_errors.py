"""Every wrong word on the command line is one clear sentence, before any work starts."""

import subprocess
import sys
import time

import pytest

from sparse_pretrain import cli, config, limits, runs, schema
from sparse_pretrain.errors import UserError


def error_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "command: found trian; allowed: train, finetune, decay-search, compare, sweep, sweep-report, plan, prune, evaluate, generate, export, consolidate, inspect, sparsest, report, doctor, bench; did you mean train?"),
        (["train", "model=gpt2_124"], "did you mean gpt2_124m?"),
        (["train", "recipe=fts"], "did you mean fst?"),
        (["train", "model=vit_nano", "data=text"], "data.seq_len: found interpolation key 'model.max_seq_len' not found; allowed: a value, or a model and data that go together"),
        (["train", "trainer.steps=${nowhere}"], "trainer.steps: found interpolation key 'nowhere' not found; allowed: a value"),
        (["train", "model.d_modell=64"], "model.d_modell: found no such option; allowed: model.d_model"),
        (["train", "+model.wings=2"], "model.wings: found no such option"),
        (["train", "steps=10"], "steps: found no such option; allowed: trainer.steps"),
        (["train", "data.task=[text]"], "data.task: found ['text']; allowed: language_modeling, text_to_text"),
        (["train", "model.d_model=wide"], "model.d_model: found 'wide'; allowed: a whole number"),
        (["train", "model.n_layer=1.5"], "model.n_layer: found 1.5; allowed: a whole number"),
        (["train", "model.bias=maybe"], "model.bias: found 'maybe'; allowed: true or false"),
        (["train", "optimizer.lr=nan"], "optimizer.lr: found nan; allowed: a number"),
        (["train", "optimizer.lr=-1"], "optimizer.lr: found -1; allowed: at least 0"),
        (["train", "optimizer.betas=0.9"], "optimizer.betas: found 0.9; allowed: a list"),
        (["train", "optimizer.betas=[0.9]"], "optimizer.betas: found [0.9]; allowed: two numbers"),
        (["train", "model.activation=gleu"], "model.activation: found gleu; allowed: gelu, gelu_erf, relu, silu, relu2, geglu, swiglu; did you mean gelu?"),
        (["train", "model.n_head=5"], "model.n_head: found 5; allowed: a divisor of model.d_model=128"),
        (["train", "model.n_kv_head=3"], "model.n_kv_head: found 3; allowed: a divisor of model.n_head=4"),
        (["train", "data.seq_len=512"], "data.seq_len: found 512; allowed: at most model.max_seq_len=128"),
        (["train", "data=text"], "data.train: found nothing; allowed: a value"),
        (["train", "data=text", "data.train=[]"], "data.train: found nothing; allowed: a list of files"),
        (["train", "trainer.batch_size=9", "trainer.devices=2"], "trainer.batch_size: found 9; allowed: a multiple of trainer.devices=2"),
        (["train", "trainer.micro_batch_size=3"], "trainer.micro_batch_size: found 3; allowed: a divisor of the 8 sequences per device"),
        (["train", "scheduler.warmup_steps=1000"], "scheduler.warmup_steps: found 1000; allowed: at most trainer.steps=800"),
        (["train", "recipe.schedule.dense_warmup=0.9"], "recipe.schedule.dense_finetune: found 0.166667 with recipe.schedule.dense_warmup=0.9"),
        (["train", "recipe=ste", "recipe.decay.factor=1e-4"], "recipe.decay.place: found none with a decay factor above 0"),
        (["train", "recipe.decay.factor=aut"], "recipe.decay.factor: found aut; allowed: a number, auto; did you mean auto?"),
        (["train", "recipe=ste", "recipe.decay.factor=auto"], "recipe.decay.place: found none with a decay factor"),
        (["decay-search", "recipe=ste"], "recipe.decay.place: found none, where a decay factor is searched; allowed: gradient, momentum, weight"),
        (["decay-search", "search.factors=[0]"], "search.factors: found 0; allowed: at least 1e-12"),
        (["decay-search", "search.factor=[1e-5]"], "search.factor: found no such option"),
        (["decay-search", "search.sample_step=50"], "search.sample_step: found 50; allowed: a multiple of recipe.schedule.refresh_every=40 from 80 to"),
        (["train", "recipe=ste", "recipe.pattern=4:2"], "recipe.pattern: found 4:2; allowed: N:M with 0 < N < M <= 16, as 2:4 or 4:8"),
        (["train", "recipe=dense", "recipe.adapter.kind=lora", "recipe.pattern=foo"], "recipe.pattern: found foo"),
        (["train", "recipe=fst", "recipe.pattern=4:8"], "recipe.projection: found transposable with recipe.pattern=4:8; allowed: 2:4, as it is defined for"),
        (["train", "recipe=ste", "recipe.pattern=1:4", "recipe.weight_gradient=mvue"], "recipe.weight_gradient: found mvue with recipe.pattern=1:4"),
        (["train", "recipe=s_ste", "recipe.input_gradient=dense"], "recipe.input_gradient: found dense with recipe.projection=soft_threshold; allowed: same"),
        (["train", "recipe=fst", "recipe.input_gradient=double_pruned"], "recipe.input_gradient: found double_pruned with recipe.projection=transposable; allowed: same, dense"),
        (["train", "recipe=maskllm", "recipe.schedule.refresh_every=2"], "recipe.schedule.refresh_every: found 2 with recipe.projection=learned; allowed: 1"),
        (["train", "recipe=maskllm", "recipe.schedule.dense_finetune=0.1"], "recipe.schedule.dense_finetune: found 0.1 with recipe.train_weights=false"),
        (["train", "recipe=maskllm", "recipe.learned.scale=[1]"], "recipe.learned.scale: found [1.0]; allowed: two numbers above 0"),
        (["train", "recipe=ste", "recipe.learned.logit_lr=1"], "recipe.learned.logit_lr: found set with recipe.projection=magnitude"),
        (["train", "recipe=ste", "recipe.train_weights=false"], "recipe.train_weights: found false, with nothing else to train"),
        (["train", "recipe=ste", "recipe.adapter.rank=4"], "recipe.adapter.rank: found set where recipe.adapter.kind=none"),
        (["train", "recipe=slope", "recipe.adapter.init=sum"], "recipe.adapter.init: found sum with recipe.adapter.kind=lora; allowed: kaiming, normal"),
        (["train", "recipe=slope", "recipe.adapter.start=1"], "recipe.adapter.start: found 1, after the last step"),
        (["train", "recipe=slope", "recipe.adapter.path=no/such"], "recipe.adapter.path: found"),
        (["train", "recipe=ste", "recipe.decay.ramp=0.5"], "recipe.decay.ramp: found 0.5 with recipe.decay.place=none"),
        (["train", "recipe=step", "recipe.schedule.dense_warmup=0.6"], "recipe.schedule.dense_warmup_max: found 0.5, below recipe.schedule.dense_warmup=0.6"),
        (["train", "recipe=step", "recipe.schedule.dense_finetune=0.2"], "recipe.frozen_preconditioner: found true with dense_warmup=0.1, dense_finetune=0.2"),
        (["train", "recipe=step", "optimizer=muon"], "recipe.frozen_preconditioner: found true with optimizer.name=muon"),
        (["train", "recipe=ast", "optimizer=muon"], "recipe.decay.place: found momentum with optimizer.name=muon"),
        (["train", "optimizer=muon", "optimizer.momentum=1"], "optimizer.momentum: found 1, with which nothing would ever move"),
        (["train", "init_from=runs/none"], "init_from: found"),
        (["train", "init_from=a", "resume=b"], "init_from: found a with resume=b, which brings its own weights"),
        (["train", "recipe=dense", "recipe.weight_gradient=mvue"], "recipe.weight_gradient: found set for a dense recipe"),
        (["train", "recipe=dense", "recipe.fp8=true"], "recipe.fp8: found set for a dense recipe; allowed: this only with recipe.projection other than none"),
        (["train", "recipe=s_ste", "recipe.fp8=e4m3"], "recipe.fp8: found 'e4m3'; allowed: true or false"),
        (["train", "trainer.precision=fp8"], "trainer.precision: found fp8; allowed: auto, fp32, bf16, fp16"),
        (["train", "name=a/b"], "name: found 'a/b'; allowed: letters"),
        (["train", "trainer.steps=1,2"], "trainer.steps=1,2: found several values; allowed: one value, or -m"),
        (["train", "--fast"], "options: found unrecognized arguments: --fast; allowed: option=value, -m"),
        (["train", "nonsense"], "nonsense: found something that is not option=value"),
        (["train", "--config-dir", "/nowhere"], "--config-dir: found /nowhere; allowed: a folder"),
        (["train", "-m", "recipe=fst,stee"], "recipe: found stee; allowed: ast, dense, fst, maskllm, s_ste, slope, sr_ste, ste, step; did you mean ste?"),
        (["compare", "recipe=fst,stee"], "recipe: found stee; allowed: ast, dense,"),
        (["compare", "seed=3"], "seed: found 3; allowed: seeds=1,2,3"),
        (["compare", "seeds=1,b"], "seeds: found 'b'; allowed: a whole number"),
        (["compare", "seeds=[]"], "seeds: found none; allowed: one or more"),
        (["compare", "seeds=-1"], "seeds: found -1; allowed: at least 0"),
        (["compare", "optimizer.lr=1e-3,1e-4"], "optimizer.lr=1e-3,1e-4: found several values; allowed: one value"),
        (["compare", "run_dir=here"], "run_dir: found here; allowed: runs_dir=FOLDER"),
        (["compare", "outt=here"], "outt: found no such option; allowed: out"),
        (["compare", "steps=10"], "steps: found no such option; allowed: trainer.steps"),
        (["compare", "recipe=ste", "model.n_head=5"], "model.n_head: found 5; allowed: a divisor of model.d_model=128"),
        (["compare", "recipe=ste,sr_ste", "recipe.decay.factor=1e-4"], "recipe.decay.place: found none with a decay factor above 0"),
        (["compare", "trainer.stop_after=5"], "trainer.stop_after: found 5; allowed: null"),
        (["compare", "recipe=ste,fst", "--cfg", "job"], "recipe: found ste,fst; allowed: one value with --cfg"),
        (["plan", "trainer.devices=7"], "trainer.batch_size: found 512; allowed: a multiple of trainer.devices=7"),
        (["plan", "device=H10"], "device: found H10; allowed: B200, H200, H100, H100 PCIe, A100, L40S, RTX 4090, RTX 3090; did you mean H100?"),
        (["plan", "utilization=0"], "utilization: found 0; allowed: at least 0.001 and at most 1"),
        (["plan", "device=L40S", "trainer.nodes=2"], "network_gbs: found null with trainer.nodes=2; allowed: GB/s of a L40S's share"),
        (["plan", "trainer.precision=fp32"], "trainer.precision: found fp32, for which no peak is known; allowed: bf16, or with trainer.peak_tflops"),
        (["plan", "rates=/nowhere.json"], "rates: found /nowhere.json, which cannot be read"),
        (["plan", "out=/proc/nowhere/plan.json"], "out: found /proc/nowhere/plan.json, which cannot be written"),
        (["compare", "out=/proc/nowhere"], "/proc/nowhere, which cannot be written"),
        (["evaluate"], "checkpoint: found nothing; allowed: a value"),
        (["evaluate", "checkpoint=/nowhere"], "checkpoint: found /nowhere, which holds no whole checkpoint"),
        (["sparsest", "target=1.1"], "target: found 1.1; allowed: at least 0.5 and at most 1"),
        (["sparsest", "training.lrs=[]"], "training.lrs: found none; allowed: one or more"),
        (["sparsest", "training.schedules=[step]"], "training.schedules: found step; allowed: cosine, steps, constant; did you mean steps?"),
        (["sparsest", "training.batch_size=30000"], "training.batch_size: found 30000; allowed: at most a quarter of points=50000"),
        (["sparsest", "search.structure=[3,3]"], "search.structure: found [3, 3]; allowed: three numbers of neurons"),
        (["sparsest", "pruning.methods=[gpm]"], "pruning.methods: found gpm; allowed: magnitude, snip, iter_snip, force, grasp, synflow, one_shot, gmp, imp, rigl, ste, sr_ste, transposable; did you mean gmp?"),
        (["sparsest", "pruning.patterns=['4:2']"], "pruning.patterns: found 4:2; allowed: N:M with 0 < N < M"),
        (["sparsest", "pruning.methods=[gmp]", "pruning.targets=[99]", "pruning.widths=[4]"], "pruning.methods: found gmp, which has nothing to do with targets=[99]"),
        (["sparsest", "out=/proc/nowhere"], "out: found /proc/nowhere, which cannot be written"),
        (["generate", "checkpoint=x", "temperature=-1"], "temperature: found -1; allowed: at least 0"),
        (["prune"], "checkpoint: found nothing; allowed: a value"),
        (["prune", "checkpoint=/nowhere"], "checkpoint: found /nowhere, which holds no whole checkpoint"),
        (["prune", "checkpoint=x", "method=wnda"], "method: found wnda; allowed: magnitude, wanda, sparsegpt, oats; did you mean wanda?"),
        (["prune", "checkpoint=x", "pattern=4:2"], "pattern: found 4:2; allowed: N:M with 0 < N < M, as 2:4, or the share to prune, as 0.5"),
        (["prune", "checkpoint=x", "rank_ratio=0.3"], "rank_ratio: found set with method=sparsegpt; allowed: this only with method=oats"),
        (["prune", "checkpoint=x", "method=oats", "rank_ratio=0.6"], "rank_ratio: found 0.6 with pattern=2:4, which together are no smaller than the layer; allowed: below 0.5"),
        (["export", "checkpoint=x"], "out: found nothing; allowed: a value"),
        (["export", "checkpoint=x", "out=y", "format=onnx"], "format: found onnx; allowed: dense, packed, adapters"),
        (["export", "checkpoint=x", "out=y", "adapters=both"], "adapters: found both; allowed: merged, apart"),
        (["export", "checkpoint=x", "out=y", "dtype=fp8"], "dtype: found fp8; allowed: fp32, bf16, fp16"),
        (["export", "checkpoint=/nowhere", "out=y"], "checkpoint: found /nowhere, which holds no whole checkpoint"),
        (["export", "checkpoint=/nowhere.gguf", "out=y"], "checkpoint: found /nowhere.gguf"),
        (["export", "checkpoint=x", "out=/proc"], "out: found /proc, which exists; allowed: a new folder"),
        (["export", "checkpoint=x", "out=/proc/a/b"], "out: found /proc/a/b, which cannot be written"),
        (["consolidate", "checkpoint=x"], "out: found nothing; allowed: a value"),
        (["consolidate", "checkpoint=x", "out=y.pt"], "out: found y.pt; allowed: a new file, as NAME.safetensors"),
        (["consolidate", "checkpoint=/nowhere", "out=y.safetensors"], "checkpoint: found /nowhere, which holds no whole checkpoint"),
        (["report", "runs_dir=/nowhere"], "/nowhere"),
        (["inspect"], "checkpoints: found none; allowed: run, checkpoint or Hugging Face folders"),
        (["inspect", "checkpoints=[/nowhere]"], "checkpoints: found /nowhere, which holds no whole checkpoint"),
        (["inspect", "checkpoints=[x]", "threshold=2"], "threshold: found 2; allowed: at least 0 and at most 1"),
        (["train", "trainer.accelerator=gpu"], "trainer.accelerator: found gpu, but PyTorch sees no GPU here"),
        (["train", "trainer.precision=fp16"], "trainer.precision: found fp16 on a CPU; allowed: fp32, bf16"),
        (["train", "resume=/nowhere"], "resume: found /nowhere, which holds no whole checkpoint"),
        (["train", "data.tokenizer=/nowhere.json"], "data.tokenizer: found /nowhere.json"),
    ],
    ids=lambda value: "_".join(value[1:]) if isinstance(value, list) else "",
)  # fmt: skip
def test_one_clear_sentence(capsys, tmp_path, monkeypatch, arguments, expected):
    import torch

    if torch.cuda.is_available() and ("GPU" in expected or "CPU" in expected):
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_tiny_corpora(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.txt").write_text("only a few words\n\nin two paragraphs")
    (tmp_path / "empty.txt").write_text("")
    assert "nowhere.txt" in error_of(capsys, "train", "data=text", "data.train=[nowhere.txt]", "data.seq_len=64")
    for name in ("tiny.txt", "empty.txt"):
        with pytest.raises(SystemExit):
            cli.main(["train", "data=text", f"data.train=[{name}]", "data.vocab_size=300", "data.seq_len=64"])
        text = capsys.readouterr().err
        assert "error: data" in text


def test_errors_and_help_come_in_about_a_second():
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sparse_pretrain.cli", "train", "model=gpt"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "error: model: found gpt" in result.stderr
    assert " torch" not in result.stderr  # the reason it is quick, which a slow machine cannot hide
    assert time.perf_counter() - start < 20


def test_load_rejects_what_is_not_in_the_schema():
    with pytest.raises(UserError, match="recipe.name: found nothing"):
        schema.load(
            config.TrainConfig,
            {
                "model": {"name": "a", "family": "gpt", "n_layer": 1, "n_head": 1, "d_model": 4},
                "data": {"name": "b", "task": "language_modeling", "source": "stdlib"},
                "recipe": {},
            },
        )
    with pytest.raises(UserError, match="model: found 3; allowed: a group of options"):
        schema.load(config.TrainConfig, {"model": 3})


def test_every_ranged_or_chosen_option_exists():
    known = {option for command in cli.COMMANDS.values() for option in schema.options(command.schema)}
    assert set(limits.RANGES) <= known
    assert set(limits.CHOICES) <= known
    assert all(any(option == r or option.startswith(f"{r}.") for option in known) for r in runs.RUNTIME_OPTIONS)
