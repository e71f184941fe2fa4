"""Heads for fine-tuning a trained BERT or GPT; they take the place of the one it was trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_pretrain.models.bert import Bert
from sparse_pretrain.models.gpt import GPT


class TextClassifier(nn.Module):
    """Token ids to logits of classes, or with one class to a number.

    BERT's features of the first token go through a pooler (dense, tanh) and a linear layer, as in the paper; GPT's of
    the last token, which has seen all others, through a linear layer without bias (Radford et al. 2018).

    Args:
        body: loses its own head.
        classes: how many; 1 = regression.
    """

    def __init__(self, body: Bert | GPT, classes: int) -> None:
        super().__init__()
        width, is_bert = body.cfg.d_model, isinstance(body, Bert)
        self.body = _without_head(body)
        self.pooler = nn.Linear(width, width) if is_bert else None
        self.classifier = nn.Linear(width, classes, bias=is_bert)
        _init(self.pooler, self.classifier)

    def forward(self, tokens: Tensor, mask: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Logits (batch, classes); arguments as `Bert.hidden`'s, padding on the right."""
        hidden = _hidden(self.body, tokens, mask, token_types)
        if self.pooler is None:
            last = mask.sum(1) - 1
            return self.classifier(hidden[torch.arange(len(tokens), device=tokens.device), last])
        pooled = self.pooler(hidden[:, 0]).tanh()
        return self.classifier(F.dropout(pooled, self.body.cfg.dropout, self.training))


class SpanPredictor(nn.Module):
    """Token ids to logits of where an answer starts and where it ends (Devlin et al. 2019, section 4.2).

    Args:
        body: loses its own head.
    """

    def __init__(self, body: Bert | GPT) -> None:
        super().__init__()
        self.body = _without_head(body)
        self.classifier = nn.Linear(body.cfg.d_model, 2)
        _init(self.classifier)

    def forward(self, tokens: Tensor, mask: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Logits (batch, 2, tokens), of the start and of the end, -inf at padding; arguments as `Bert.hidden`'s,
        padding on the right."""
        logits = self.classifier(_hidden(self.body, tokens, mask, token_types)).transpose(1, 2)
        return logits.masked_fill(~mask[:, None], -torch.inf)


def _hidden(body: Bert | GPT, tokens: Tensor, mask: Tensor, token_types: Tensor | None) -> Tensor:
    if isinstance(body, Bert):
        return body.hidden(tokens, mask, token_types)
    return body.hidden(tokens)  # causal: no token sees the padding, which comes after it


def _without_head(body: Bert | GPT) -> Bert | GPT:
    body.head = nn.Identity()  # else DistributedDataParallel would wait for the gradients of what is not used
    return body


def _init(*layers: nn.Linear | None) -> None:
    for layer in layers:
        if layer is not None:
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
