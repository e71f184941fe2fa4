"""Run folders as a training run leaves them, with curves made up to look like one."""

import csv
import io
import math

import numpy as np
import pytest
import yaml

from sparse_pretrain import runs
from sparse_pretrain.config import TrainConfig, TrainerConfig
from sparse_pretrain.config_data import TextConfig
from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.config_recipe import RecipeConfig, ScheduleConfig
from sparse_pretrain.schema import to_dict

RECIPES = {
    "dense": RecipeConfig(name="dense"),
    "ste": RecipeConfig(name="ste", projection="magnitude"),
    "fst": RecipeConfig(
        name="fst",
        projection="transposable",
        weight_gradient="mvue",
        schedule=ScheduleConfig(dense_finetune=0.25, refresh_every=40),
    ),
}
RATES = {"dense": 10_000.0, "ste": 8_000.0, "fst": 5_000.0}  # tokens per second
LAYERS = [f"blocks.{i}.ffn.{part}" for i in range(4) for part in ("up", "down")]


def rows(cfg: TrainConfig, until: int, final_loss: float) -> list[dict]:
    draw, trainer, rate = np.random.default_rng(7), cfg.trainer, RATES.get(cfg.recipe.name, 7_000.0)
    finetune = trainer.steps - round(cfg.recipe.schedule.dense_finetune * trainer.steps)
    sparse = cfg.recipe.projection != "none"
    made = []
    for step in range(trainer.log_every, until + 1, trainer.log_every):
        progress = step / trainer.steps
        loss = 4.0 + 5.4 * math.exp(-14 * progress) + 0.9 * (1 - progress) ** 2
        gap = final_loss - 4.0
        loss += gap * (2 - progress) if step <= finetune else gap * (1 + 0.4 * math.exp(-(step - finetune) / 10))
        row = {
            "step": step,
            "tokens": step * trainer.batch_size * cfg.data.seq_len,
            "seconds": f"{step * trainer.batch_size * cfg.data.seq_len / rate:.9g}",
            "phase": "dense" if not sparse else "sparse" if step <= finetune else "dense fine-tune",
            "train/loss": f"{loss - 0.03 + 0.03 * draw.standard_normal():.9g}",
            "train/grad_norm": 1.0,
            "train/lr": 0.001,
            "train/tokens_per_second": rate,
            "train/mfu": 0.3,
            "train/memory_gb": 1.25,
            "train/dropped_steps": 0,
        }
        every = cfg.recipe.schedule.refresh_every
        if sparse and step > every:
            refreshed = min(step, finetune) // every * every / trainer.steps
            flips = 0.02 * min(1, refreshed * 8) * math.exp(-3 * refreshed) * (1 if every > 1 else 0.08)
            row["sparsity/flip_rate"] = f"{flips * (1 + 0.05 * draw.standard_normal() * (every == 1)):.9g}"
        if step % trainer.eval_every == 0 or step == trainer.steps:
            row["val/loss"] = (
                final_loss if step == trainer.steps else f"{loss + 0.01 * gap * draw.standard_normal():.9g}"
            )
        made.append(row)
    return made


def mask(step: int, steps: int, seed: int) -> np.ndarray:
    """A (32, 64) 2:4 mask of weights that drift less and less."""
    draw = np.random.default_rng(seed)
    start, drift = draw.standard_normal((2, 32, 64))
    groups = np.abs(start + drift * math.sqrt(step / steps)).reshape(32, 16, 4)
    return (groups.argsort(-1).argsort(-1) >= 2).reshape(32, 64).astype(np.uint8)


@pytest.fixture
def make_run(tmp_path):
    """make_run("fst", val_loss=4.0) -> a run folder; `until`: of a run that is not complete."""

    def make(recipe, val_loss=4.0, until=None, name=None, seed=1, device="CPU, 2 threads", layer_prefix=""):
        cfg = TrainConfig(
            model=GPTConfig(name="gpt_nano", n_layer=4, n_head=4, d_model=128),
            data=TextConfig(name="stdlib", source="stdlib", seq_len=256),
            recipe=RECIPES[recipe],
            trainer=TrainerConfig(steps=400, batch_size=8, log_every=10, eval_every=50),
            seed=seed,
        )
        folder = tmp_path / "runs" / (name or f"gpt_nano-{recipe}-{seed:08x}")
        folder.mkdir(parents=True)
        runs.write_text(folder / runs.CONFIG_FILE, yaml.safe_dump(to_dict(cfg), sort_keys=False))
        table = rows(cfg, until or cfg.trainer.steps, val_loss)
        text = io.StringIO()
        writer = csv.DictWriter(text, runs.METRICS_COLUMNS)
        writer.writeheader()
        writer.writerows(table)
        runs.write_text(folder / runs.METRICS_FILE, text.getvalue())
        sparse = recipe != "dense"
        linears = [
            ("blocks.0.attn.qkv", 384, 128, False, ""),
            ("blocks.0.attn.odd", 126, 126, False, "126 & 126 <4>"),
        ]
        linears += [(n, 512, 128, sparse, "") if n.endswith("up") else (n, 128, 512, sparse, "") for n in LAYERS]
        keys = ("name", "out_features", "in_features", "sparse", "skipped")
        runs.write_json(
            folder / runs.RUN_FILE,
            {
                "id": "590aa337",
                "command": f"sparse-pretrain train recipe={recipe}",
                "python": "3.11.7",
                "packages": {"torch": "2.13.0", "lightning": "2.6.6"},
                "device": device,
                "sparse_products": {
                    "measured_on": {},
                    "plans": {
                        n: ["dense" if device.startswith("CPU") else "gluon:x", "dense", "dense"] for n in LAYERS
                    },
                    "table": "" if device.startswith("CPU") else "512x128, 8192 tokens <bf16>",
                },
                "precision": "float32",
                "peak_tflops": 0.2036,
                "peak_source": "measured matrix product",
                "corpus": {
                    "name": "stdlib",
                    "digest": "f6ab6f3ceb31",
                    "vocab_size": 4096,
                    "train_tokens": 2649842,
                    "validation_tokens": 112920,
                },
                "model": {"parameters": 2_097_152, "flop_per_token": 6291456, "state_bytes": 33554432},
                "layers": [dict(zip(keys, (layer_prefix + row[0], *row[1:]), strict=True)) for row in linears],
            },
        )
        if sparse:
            (folder / "masks").mkdir()
            for step in [row["step"] for row in table if "val/loss" in row]:
                corners = {layer_prefix + LAYERS[i]: mask(step, 400, i) for i in (0, 4, 7)}
                np.savez(folder / "masks" / f"step-{step:08d}.npz", **corners)
        if until is None:
            summary = {"steps": 400, "tokens_per_second": RATES[recipe], "val_loss": val_loss}
            flips = {layer_prefix + layer: 0.003 + i / 1000 for i, layer in enumerate(LAYERS)} if sparse else {}
            runs.write_json(folder / runs.SUMMARY_FILE, {**summary, "layer_flip_rates": flips})
        return folder

    return make
