"""Our models from and to folders of the transformers library: GPT-2, Llama, BERT, ViT, DeiT, BART, Marian.

Neither way needs transformers itself. Logits are the same as its own.
"""

from sparse_pretrain.models.huggingface.folder import is_hugging_face
from sparse_pretrain.models.huggingface.reading import Loaded, build, is_known, layers, load, options
from sparse_pretrain.models.huggingface.writing import Converted, convert, save

__all__ = [
    "Converted",
    "Loaded",
    "build",
    "convert",
    "is_hugging_face",
    "is_known",
    "layers",
    "load",
    "options",
    "save",
]
