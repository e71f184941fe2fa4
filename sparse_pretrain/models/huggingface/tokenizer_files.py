"""The files beside a model that say how it reads and what it writes: of its tokenizer, of its images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparse_pretrain.models.huggingface.folder import TOKENIZER, TOKENIZER_CONFIG, write_json

IMAGE_PROCESSOR = "preprocessor_config.json"
# What else a folder of transformers may have beside config.json and weights
OTHERS = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.spm",
    "chat_template.jinja",
    "generation_config.json",
    IMAGE_PROCESSOR,
)


def write_tokenizer(folder: Path, content: bytes, special: Mapping[str, str], max_length: int, types: bool) -> None:
    """Files with which AutoTokenizer reads a tokenizer.json as it is.

    Args:
        content: of tokenizer.json.
        special: `eos_token` and so on -> the token.
        max_length: tokens that the model reads.
        types: whether the model is told which text of a pair a token is of.
    """
    (folder / TOKENIZER).write_bytes(content)
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / TOKENIZER_CONFIG, config | dict(special))


def write_image_processor(folder: Path, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Images as our data have them: the shorter side scaled to `size`, the middle cut out, each channel normalised."""
    config = {
        "image_processor_type": "CLIPImageProcessor",  # which does just that
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": len(mean) == 3,
    }
    write_json(folder / IMAGE_PROCESSOR, config)


def copy_others(source: Path, folder: Path) -> None:
    """All of them that `source` has."""
    for pattern in OTHERS:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
