"""Teachers: frozen models that a run also learns from, and those it is compared with."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sparse_pretrain import runs
from sparse_pretrain.checkpoint import store
from sparse_pretrain.config_recipe import TeacherConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.sharding import data_parallel_rank, put, whole
from sparse_pretrain.tasks.build import build_model
from sparse_pretrain.tasks.distillation import Targets, divergences, furthest_behind, make_targets
from sparse_pretrain.tasks.sharding import shard
from sparse_pretrain.tasks.task import Task
from sparse_pretrain.tasks.teacher_logits import TeacherLogits
from sparse_pretrain.tasks.trained import load_trained

SELF = "self"  # among the teachers: the student as it was when it became sparse


class Teacher:
    """Whom a run learns from: the mean of its models' logits. Not a module: none of it is the student's.

    Args:
        cfg: the losses' options.
        models: frozen, token ids (batch, n) -> logits (batch, n, at least vocab_size), or images -> logits of classes.
        reference: a model of the same kind, for AdaSPEC.
        vocab_size: of the tokenizer; rows that pad an embedding are cut off. For images the number of classes.
        logits: where the models' outputs for training sequences are kept.
        numbers: step -> which sequences of the corpus this rank's batch holds, in order; needed with `logits`.
        blank: makes a model like the student, dense, and sharded where that is, whose weights are to be replaced;
            needed for `self`.
    """

    def __init__(
        self,
        cfg: TeacherConfig,
        models: list[nn.Module],
        reference: nn.Module | None,
        vocab_size: int,
        logits: TeacherLogits | None = None,
        numbers: Callable[[int], np.ndarray] | None = None,
        blank: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.cfg, self.models, self.reference, self.vocab_size = cfg, models, reference, vocab_size
        self._blank, self._kept, self._numbers = blank, logits, numbers
        self.copy: nn.Module | None = None  # of the student

    @property
    def is_there(self) -> bool:
        """False until the student becomes sparse, where `self` is the only teacher."""
        return bool(self.models) or self.copy is not None

    def appear(self, student: nn.Module) -> None:
        """The student is about to make its first sparse step: if `self` teaches, keep a copy of its dense weights."""
        if SELF in self.cfg.models and self.copy is None:
            self._set_copy(student, student.state_dict())

    def load_copy(self, student: nn.Module, weights: dict[str, Tensor] | None) -> None:
        """Restore the copy from a checkpoint (`weights`: its state dict; None = it had not appeared yet)."""
        if SELF in self.cfg.models and weights is not None:
            self._set_copy(student, weights)

    def _set_copy(self, student: nn.Module, weights: Mapping[str, Tensor]) -> None:
        assert self._blank is not None
        with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, for nothing
            copy = self._blank()
        self.copy = copy.to(next(student.parameters()).device).requires_grad_(False).eval()
        for name, tensor in copy.state_dict().items():
            put(tensor, whole(weights[name]))

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """The mean of the models' logits (Allen-Zhu and Li 2023: an ensemble averages outputs), fp32.

        inputs: tokens (batch, n) int64 give (batch, n, vocab_size); images (batch, …) give (batch, classes).
        """
        models = self.models if self.copy is None else [*self.models, self.copy]
        total = torch.zeros((), device=inputs.device)
        for model in models:
            total = total + model(inputs)[..., : self.vocab_size].float()
        return total / len(models)

    def loss(self, student: Tensor, sequences: Tensor, step: int, first_row: int) -> Tensor:
        """temperature² · KL(teacher ‖ student), the mean over tokens (with AdaSPEC over those selected): 0-dim fp32.

        Args:
            student: its logits for `sequences`, (batch, n, at least vocab_size).
            sequences: (batch, n + 1) int64: rows of this rank's batch of `step`, from `first_row` on.
        """
        cfg = self.cfg
        targets = self._targets(sequences, step, first_row)
        losses = divergences(targets, student.flatten(0, 1)[:, : self.vocab_size], cfg.temperature)
        if self.reference is not None:
            with torch.no_grad():
                logits = self.reference(sequences[:, :-1]).flatten(0, 1)[:, : self.vocab_size]
                reference = divergences(targets, logits, cfg.temperature)
            losses = losses[furthest_behind(losses, reference, cfg.token_share)]
        return losses.mean()

    def _targets(self, sequences: Tensor, step: int, first_row: int) -> Targets:
        if self._kept is None:
            return make_targets(self.logits(sequences[:, :-1]).flatten(0, 1), self.cfg.temperature, top_k=None)
        assert self._numbers is not None
        numbers = self._numbers(step)[first_row : first_row + len(sequences)].tolist()
        records = self._kept.read(numbers)
        missing = [row for row, record in enumerate(records) if record is None]
        if missing:
            logits = self.logits(sequences[missing, :-1]).flatten(0, 1)
            computed = make_targets(logits, self.cfg.temperature, self.cfg.top_k)
            for row, record in zip(missing, self._kept.add([numbers[row] for row in missing], computed), strict=True):
                records[row] = record
        return self._kept.targets([record for record in records if record is not None], sequences.device)


class TeacherCallback(lightning.Callback):
    """Gives a run's module its teacher before the first step.

    Args:
        run_dir: whose run.json says where the teachers are.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        cfg = pl_module.cfg.recipe.teacher
        if not cfg.models:
            return
        found = runs.read_json(self.run_dir / runs.RUN_FILE)["teachers"]

        def load(path: str, option: str) -> nn.Module:
            return load_teacher(Path(found[path]["folder"]), pl_module.device, f"recipe.teacher.{option}")

        def blank() -> nn.Module:
            model = build_model(pl_module.cfg, pl_module.sizes)
            if pl_module.device_mesh is not None:
                shard(model, pl_module.device_mesh)
                assert isinstance(model, FSDPModule)
                model.set_reshard_after_forward(True)  # all of it: there is no backward pass to end its use
            return model

        sampler = trainer.datamodule.sampler  # type: ignore[attr-defined]
        teacher = Teacher(
            cfg,
            [load(path, "models") for path in cfg.models if path != SELF],
            load(cfg.reference, "reference") if cfg.reference is not None else None,
            pl_module.sizes.vocab_size or pl_module.sizes.num_classes,
            TeacherLogits(Path(cfg.logits)) if cfg.logits is not None else None,
            lambda step: sampler.rank_indices(step, *data_parallel_rank(trainer)),
            blank,
        )
        teacher.load_copy(pl_module.model, pl_module.teacher_copy)
        pl_module.teacher_copy = None
        pl_module.teacher = teacher


@dataclass(frozen=True)
class TeacherFolder:
    """A model on disk that may teach.

    Attributes:
        folder: of a checkpoint of ours, or a Hugging Face folder.
        sha256: of its weights.
        tokenizer_path: None = it reads no text.
        max_seq_len: None = no limit known.
    """

    folder: Path
    sha256: str
    tokenizer_path: Path | None
    max_seq_len: int | None
    hugging_face: bool = False

    def has_tokenizer(self, tokenizer: bytes) -> bool:
        """Whether a tokenizer.json gives each token the id that this model knows it by: for ours, whether it is the
        same file; for Hugging Face's, which may be written in another way, whether the vocabulary is the same."""
        if self.tokenizer_path is None:
            return False
        own = self.tokenizer_path.read_bytes()
        return tokenizer == own or (self.hugging_face and _vocabulary(tokenizer) == _vocabulary(own))


def find_teacher(path: str, option: str) -> TeacherFolder:
    """The model that a user's path means: a run folder (its newest checkpoint), a checkpoint or a Hugging Face folder.

    Raises:
        UserError: naming `option`: there is none, it is damaged, or it needs packages that are not installed.
    """
    folder = Path(path).expanduser().resolve()
    if is_hugging_face(folder):
        return _find_hugging_face(folder, option)
    checkpoint = store.resolve(folder, option)
    run_dir = checkpoint.parent.parent
    return TeacherFolder(
        checkpoint,
        runs.read_json(checkpoint / store.MANIFEST_FILE)["sha256"],
        run_dir / runs.TOKENIZER_FILE if (run_dir / runs.TOKENIZER_FILE).is_file() else None,
        getattr(runs.read_config(run_dir).model, "max_seq_len", None),
    )


def is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _find_hugging_face(folder: Path, option: str) -> TeacherFolder:
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("safetensors") is None:
        raise UserError(
            option,
            f"{folder}, a Hugging Face folder, but transformers is not installed",
            "a run or checkpoint folder",
            hint="pip install 'sparse-pretrain[hf]' installs it",
        )
    weights = sorted(folder.glob("*.safetensors"))
    for name, there in (("*.safetensors", bool(weights)), ("tokenizer.json", (folder / "tokenizer.json").is_file())):
        if not there:
            raise UserError(option, f"{folder} without {name}", "a Hugging Face folder with safetensors and tokenizer")
    digest = hashlib.sha256()
    for file_path in (folder / "config.json", *weights):
        with open(file_path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    config = runs.read_json(folder / "config.json")
    rows, ids = config.get("vocab_size"), _vocabulary((folder / "tokenizer.json").read_bytes()).values()
    if rows is not None and rows <= max(ids):
        raise UserError(
            option, f"{folder}, whose tokenizer has ids up to {max(ids)} and its model {rows} rows", "a row for each id"
        )
    return TeacherFolder(
        folder,
        digest.hexdigest(),
        folder / "tokenizer.json",
        config.get("n_positions") or config.get("max_position_embeddings"),
        hugging_face=True,
    )


def load_teacher(folder: Path, device: torch.device, option: str) -> nn.Module:
    """The model of a `TeacherFolder`, frozen: token ids (batch, n) -> logits (batch, n, vocab).

    Ours computes in the phase, dense or sparse, that its checkpoint was in. A Hugging Face model is read from
    safetensors only, without code from its folder, in fp32.

    Raises:
        UserError: naming `option`: it cannot be loaded.
    """
    model: nn.Module
    if is_hugging_face(folder):
        from transformers import AutoModelForCausalLM

        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise UserError(
                option, f"{folder} ({str(error).splitlines()[0]})", "a causal language model that transformers has"
            ) from error
        model = _Logits(loaded).to(device)
    else:
        model = load_trained(str(folder), device, option).model
    return model.requires_grad_(False).eval()


class _Logits(nn.Module):
    """A Hugging Face model with our models' output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


def _vocabulary(tokenizer: bytes) -> dict[str, int]:
    return dict(Tokenizer.from_buffer(tokenizer).get_vocab(with_added_tokens=True))
