"""Classes of images, and classes or scores of texts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_data import ImagesConfig, SentencesConfig
from sparse_pretrain.config_models import BertConfig, GPTConfig, TorchvisionConfig, ViTConfig
from sparse_pretrain.models.bert import Bert
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.models.heads import TextClassifier
from sparse_pretrain.models.library import build_hf, build_torchvision
from sparse_pretrain.models.vit import ViT
from sparse_pretrain.objective import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION
from sparse_pretrain.seeds import hash_seed
from sparse_pretrain.tasks.distillation import divergences, make_targets
from sparse_pretrain.tasks.task import Batch, Sizes, Task, batch_size, embedding_rows
from sparse_pretrain.tasks.token_targets import sum_and_count


class ImageClassification(Task):
    """Batches: images (examples, channels, height, width) fp32, labels (examples,) int64; after mixup or cutmix labels
    are shares of classes, (examples, classes) fp32."""

    teaches = True

    @staticmethod
    def build(cfg: TrainConfig, sizes: Sizes) -> nn.Module:
        if isinstance(cfg.model, ViTConfig):
            return ViT(cfg.model, sizes.num_classes)
        if isinstance(cfg.model, TorchvisionConfig):
            return build_torchvision(cfg.model, sizes.num_classes)
        return build_hf(cfg.model, IMAGE_CLASSIFICATION, num_classes=sizes.num_classes)

    @staticmethod
    def example(cfg: TrainConfig) -> tuple[Tensor, ...]:
        assert isinstance(cfg.data, ImagesConfig)
        return (torch.zeros(1, cfg.data.channels, cfg.data.image_size, cfg.data.image_size),)

    def augment(self, batch: Batch, step: int) -> Batch:
        """Mix each image with another one of this rank's batch (mixup: Zhang et al. 2018; cutmix: Yun et al. 2019), by
        either at even odds where both are asked for, with one share for all, as timm does."""
        assert isinstance(batch, dict)
        assert isinstance(self.cfg.data, ImagesConfig)
        alphas = {"mixup": self.cfg.data.mixup, "cutmix": self.cfg.data.cutmix}
        ways = [way for way, alpha in alphas.items() if alpha > 0]
        if not ways:
            return batch
        draw = np.random.default_rng(hash_seed(self.cfg.seed, step))
        way = ways[draw.integers(len(ways))]
        share = draw.beta(alphas[way], alphas[way])
        images, others = batch["images"], batch["images"].flip(0)
        if way == "cutmix":
            height, width = images.shape[2:]
            box = np.sqrt(1 - share)
            y, x = draw.integers(height), draw.integers(width)
            rows = slice(*np.clip((y - int(height * box) // 2, y + int(height * box) // 2), 0, height))
            columns = slice(*np.clip((x - int(width * box) // 2, x + int(width * box) // 2), 0, width))
            images = images.clone()
            images[:, :, rows, columns] = others[:, :, rows, columns]
            share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        else:
            images = torch.lerp(others, images, share)
        labels = F.one_hot(batch["labels"], self.sizes.num_classes).float()
        return {"images": images, "labels": torch.lerp(labels.flip(0), labels, share)}

    def targets(self, batch: Batch) -> int:
        return batch_size(batch)

    def losses(self, batch: Batch, step: int, first_row: int) -> tuple[Tensor, Tensor]:
        """With a distillation token its output learns the teacher's most likely class (Touvron et al. 2021), else the
        classifier's the teacher's distribution."""
        assert isinstance(batch, dict)
        assert isinstance(self.cfg.data, ImagesConfig)
        taught = self.teacher is not None and self.teacher.is_there
        if isinstance(self.model, ViT):
            logits, distilled = self.model.forward_heads(batch["images"])
        else:
            logits, distilled = self.model(batch["images"]), None
        if distilled is not None and not taught:  # without a teacher both tokens learn the classes
            logits, distilled = (logits + distilled) / 2, None
        loss = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.cfg.data.label_smoothing)
        if not taught:
            return loss, torch.zeros_like(loss)
        assert self.teacher is not None
        teacher = self.teacher.logits(batch["images"])
        if distilled is not None:
            return loss, F.cross_entropy(distilled.float(), teacher.argmax(-1))
        temperature = self.cfg.recipe.teacher.temperature
        return loss, divergences(make_targets(teacher, temperature, top_k=None), logits, temperature).mean()

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["images"])

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(batch, dict)
        return class_scores(self.logits(batch), batch["labels"])


class TextClassification(Task):
    """Batches: tokens, mask, token_types (examples, n), labels (examples,): int64 classes or fp32 scores."""

    @staticmethod
    def build(cfg: TrainConfig, sizes: Sizes) -> nn.Module:
        if isinstance(cfg.model, BertConfig | GPTConfig):
            return TextClassifier(text_body(cfg.model, sizes), sizes.num_classes)
        return build_hf(cfg.model, TEXT_CLASSIFICATION, sizes.vocab_size, sizes.num_classes)

    @staticmethod
    def example(cfg: TrainConfig) -> tuple[Tensor, ...]:
        assert isinstance(cfg.data, SentencesConfig)
        tokens = torch.zeros(1, cfg.data.seq_len, dtype=torch.int64)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def targets(self, batch: Batch) -> int:
        return batch_size(batch)

    def losses(self, batch: Batch, step: int, first_row: int) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, dict)
        logits = self.logits(batch).float()
        if self.sizes.num_classes == 1:
            loss = F.mse_loss(logits[:, 0], batch["labels"])
        else:
            loss = F.cross_entropy(logits, batch["labels"])
        return loss, torch.zeros_like(loss)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["tokens"], batch["mask"], batch["token_types"])

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(batch, dict)
        logits = self.logits(batch)
        if self.sizes.num_classes == 1:
            error = F.mse_loss(logits[:, 0].float(), batch["labels"], reduction="sum")
            return {"loss": sum_and_count(error, len(logits))}
        return class_scores(logits, batch["labels"])


def text_body(cfg: BertConfig | GPTConfig, sizes: Sizes) -> Bert | GPT:
    """A pre-training model, for a head of another task to stand on."""
    rows = embedding_rows(cfg.vocab_size, sizes.vocab_size)
    return Bert(cfg, rows) if isinstance(cfg, BertConfig) else GPT(cfg, rows)


def class_scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Sums and counts, (2,) fp64, of the cross-entropy and of right classes; logits (n, classes), labels (n,)."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    right = (logits.argmax(-1) == labels).sum()
    return {"loss": sum_and_count(total, len(labels)), "accuracy": sum_and_count(right, len(labels))}
