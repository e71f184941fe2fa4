"""A vision transformer: ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021) by configuration."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_pretrain.config_models import ViTConfig
from sparse_pretrain.models.blocks import Attention, Block, make_norm, run_blocks


class ViT(nn.Module):
    """Images to logits of classes.

    Args:
        cfg: the model's options.
        num_classes: how many classes there are.
    """

    def __init__(self, cfg: ViTConfig, num_classes: int) -> None:
        super().__init__()
        self.cfg = cfg
        d, patches = cfg.d_model, (cfg.image_size // cfg.patch_size) ** 2
        self.patch_embed = nn.Conv2d(cfg.channels, d, cfg.patch_size, stride=cfg.patch_size, bias=cfg.bias)
        # The class token, and the distillation token if there is one
        self.extra_tokens = nn.Parameter(torch.empty(1 + cfg.distillation_token, d))
        self.pos_embed = nn.Parameter(torch.empty(len(self.extra_tokens) + patches, d))
        self.blocks = nn.ModuleList(Block(cfg, Attention(cfg, causal=False)) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.head = nn.Linear(d, num_classes)
        self.distillation_head = nn.Linear(d, num_classes) if cfg.distillation_token else None
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width); with two heads the mean of both."""
        logits, distillation_logits = self.forward_heads(images)
        return logits if distillation_logits is None else (logits + distillation_logits) / 2

    def forward_heads(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the class token, which learn from the labels, and those of the distillation token, if there is
        one, which learn from a teacher."""
        x = self.hidden(images)
        return self.head(x[:, 0]), None if self.distillation_head is None else self.distillation_head(x[:, 1])

    def hidden(self, images: Tensor) -> Tensor:
        """(batch, tokens, d_model): the class token, the distillation token if there is one, the patches by rows."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.extra_tokens.expand(len(images), -1, -1), patches), dim=1) + self.pos_embed
        x = F.dropout(x, self.cfg.dropout, self.training)
        return self.norm(run_blocks(self.blocks, x, self.cfg.activation_checkpointing and self.training))
