"""At the start of a run: which backend multiplies in which layer, the same on every rank and after every resume."""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from sparse24.dispatch import Plan, device_key

from sparse_pretrain import runs
from sparse_pretrain.paths import cache_dir
from sparse_pretrain.sparsity.products import apply_plans, choose_plans
from sparse_pretrain.tasks.task import Task

MEASUREMENTS = "sparse-products.json"  # in the cache folder


class ProductsCallback(lightning.Callback):
    """Measures on rank 0 before the first step, records the plans in run.json, prints the table.

    A resumed run keeps its recorded plans on the same GPU and versions: other kernels round differently, and it would
    no longer be the same run.
    """

    def __init__(self, run_dir: Path, dtype: torch.dtype) -> None:
        self.run_dir, self.dtype = run_dir, dtype

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if not pl_module.sparse_training.layers:
            return
        plans: dict[str, Plan] = {}
        if trainer.is_global_zero:
            plans = self._plans(pl_module)
        plans = trainer.strategy.broadcast(plans)
        apply_plans(pl_module.model, plans, self.dtype)

    def _plans(self, module: Task) -> dict[str, Plan]:
        cfg = module.cfg
        device = torch.device("cuda", torch.cuda.current_device()) if module.device.type == "cuda" else module.device
        facts = runs.read_json(self.run_dir / runs.RUN_FILE)
        here = device_key(device)
        recorded = facts.get("sparse_products")
        if recorded and recorded["measured_on"] == here and module.steps_done:
            return {name: Plan(*choices) for name, choices in recorded["plans"].items()}
        batch = cfg.trainer.batch_size // cfg.trainer.data_ranks
        micro_batch = min(cfg.trainer.micro_batch_size or batch, batch)
        plans, table = choose_plans(
            module.model,
            rows={name: micro_batch * rows for name, rows in module.rows.items()},
            dtype=self.dtype,
            device=device,
            micro_batches=-(-batch // micro_batch),
            backend=cfg.trainer.backend,
            cache=cache_dir() / MEASUREMENTS,
        )
        if device.type == "cuda":  # measuring is not training: neither its peak of memory nor what it leaves reserved
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        facts["sparse_products"] = {"measured_on": here, "plans": plans, "table": table}
        runs.write_json(self.run_dir / runs.RUN_FILE, facts)
        if table:
            print(f"  2:4 products, * = chosen:\n{table}")
        return plans
