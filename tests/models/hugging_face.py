"""Small models of transformers with random weights, and folders of ours read by it."""

from pathlib import Path

import torch
from torch import nn

from sparse_pretrain.models import huggingface


def randomize(model: nn.Module) -> nn.Module:
    """Every weight becomes something, biases and norms too, but fixed positions; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in dict.fromkeys(model.state_dict(keep_vars=True).values()):
            frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            if tensor.is_floating_point() and not frozen:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model.eval()


def ours_of(folder: Path) -> nn.Module:
    """What our library makes of a folder."""
    loaded = huggingface.load(folder)
    assert loaded.missing == ()
    model = huggingface.build(loaded.cfg, loaded.num_classes)
    model.load_state_dict(loaded.state_dict)
    return model.eval()


def theirs_of(model: nn.Module, folder: Path, cls: type, labels=(), **ids: int) -> nn.Module:
    """What transformers makes of one of our models: all tensors are there, and no others."""
    folder.mkdir(exist_ok=True)
    huggingface.save(huggingface.convert(model, labels), folder, ids)
    theirs, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    assert type(theirs).__name__ == theirs.config.architectures[0]
    return theirs.eval()
