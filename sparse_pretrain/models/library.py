"""Models of transformers and torchvision, with the inputs and outputs of ours."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_pretrain.config_models import HFConfig, ModelConfig, TorchvisionConfig
from sparse_pretrain.errors import UserError

# objective -> auto class of transformers, and the mapping that says which model types it knows
_HEADS = {
    "causal_lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "conditional_lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked_lm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "image_classification": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "text_classification": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "question_answering": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
}
_CAUSAL = ("causal_lm", "conditional_lm")
# torchvision's options for what it warns about or returns beside the logits
_TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def build_hf(cfg: ModelConfig, objective: str, vocab_size: int = 0, num_classes: int = 0) -> nn.Module:
    """A model of transformers for an objective, in fp32 and in training mode.

    A folder with safetensors gives its weights, and new ones to what its checkpoint has not (the head of another
    task); a folder without weights, or a config.json, new ones, drawn from torch's global random numbers. On the `meta`
    device nothing is read but the config. Parameters are named as in transformers, after `model.`.

    Args:
        cfg: an HFConfig.
        objective: one of `sparse_pretrain.objective`; it decides the head.
        vocab_size: of the tokenizer; the model may have more rows.
        num_classes: of a classifier; 1 = regression.

    Returns:
        a module that is called as our own models of this objective are.

    Raises:
        UserError: transformers is not installed; `model.path` is not there, cannot be read, holds weights in other
            formats than safetensors, needs code of its own, has no such head, or too small a vocabulary.
    """
    assert isinstance(cfg, HFConfig)
    transformers = _import("transformers", "hf")
    path = Path(cfg.path).expanduser()
    config = _config(transformers, path, cfg.path)
    head, known = _HEADS[objective]
    names = getattr(transformers.models.auto.modeling_auto, known)
    if config.model_type not in names:
        raise UserError(
            "model.path",
            f"{cfg.path}, a {config.model_type} model, which has no head for {objective}",
            f"a model of a type that transformers' {head} knows",
        )
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if vocab_size and rows is not None and rows < vocab_size:
        raise UserError(
            "model.path", f"{cfg.path} with vocab_size={rows}", f"at least the {vocab_size} tokens of data.tokenizer"
        )
    if objective in _CAUSAL:
        config.is_decoder = True  # an encoder that has this head would see the tokens it is to predict
    if objective == "question_answering":
        num_classes = 2  # start and end, whatever the checkpoint was trained for
    if num_classes:
        config.num_labels = num_classes
    if objective == "text_classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = config.get_text_config().vocab_size - 1  # decoders look for it
    auto = getattr(transformers, head)
    new_weights = torch.get_default_device().type == "meta" or path.is_file() or not _has_weights(path, cfg.path)
    if new_weights:
        model = auto.from_config(config, trust_remote_code=False, dtype=torch.float32)
    else:
        model = _load(auto, path, config, cfg.path)
    wrapper = {"seq2seq": HFSeq2Seq, "image_classification": HFImages, "question_answering": HFSpans}
    return wrapper.get(objective, HFText)(model).train()


class _HF(nn.Module):
    """What all of them share."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.positions = _positions(model)

    def _check_length(self, tokens: Tensor) -> None:
        if self.positions is not None and tokens.shape[1] > self.positions:
            found = f"a model of {self.positions} positions"
            raise UserError("model.path", found, f"one of {tokens.shape[1]} at least, as long as the data's sequences")

    def _run(self, **inputs: Any) -> Any:
        if not next(iter(inputs.values())).is_meta:
            return self.model(**inputs)
        # Transformers looks into masks, which tensors on `meta` cannot answer; at fake ones it does not look.
        with FakeTensorMode(allow_non_fake_inputs=True):
            return self.model(**inputs)


class HFText(_HF):
    """A language model or a classifier of texts."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        arguments = inspect.signature(model.forward).parameters
        config = model.config.get_text_config()
        self.has_token_types = "token_type_ids" in arguments and getattr(config, "type_vocab_size", 0) > 1
        self.pad: int | None = getattr(config, "pad_token_id", None)
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in arguments else {}

    def forward(self, tokens: Tensor, mask: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """Logits: (batch, n, vocab) of a language model, (batch, classes) of a classifier.

        tokens: (batch, n) int64; mask: boolean, True = a token, padding on the right; token_types: int64, both of that
        shape. A model without token types does without.
        """
        return self._call(tokens, mask, token_types).logits

    def _call(self, tokens: Tensor, mask: Tensor | None, token_types: Tensor | None) -> Any:
        self._check_length(tokens)
        inputs = dict(self.options)
        if mask is not None:
            inputs["attention_mask"] = mask.long()
            if self.pad is not None:  # some models count positions, or look for the last token, by it
                tokens = tokens.masked_fill(~mask, self.pad)
        if token_types is not None and self.has_token_types:
            inputs["token_type_ids"] = token_types
        return self._run(input_ids=tokens, **inputs)


class HFSpans(HFText):
    """Where an answer begins and ends."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """Logits (batch, 2, n), of the start and of the end, -inf at padding."""
        output = self._call(tokens, mask, token_types)
        logits = torch.stack((output.start_logits, output.end_logits), dim=1)
        return logits if mask is None else logits.masked_fill(~mask[:, None], -torch.inf)


class HFSeq2Seq(_HF):
    """An encoder-decoder."""

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """source: (batch, n), target: (batch, m) int64; source_mask: boolean, True = a token. Logits (batch, m, vocab)
        of the token after each of target's."""
        for tokens in (source, target):
            self._check_length(tokens)
        mask = None if source_mask is None else source_mask.long()
        return self._run(input_ids=source, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits


class HFImages(_HF):
    """A classifier of images."""

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, channels, height, width); logits (batch, classes)."""
        return self._run(pixel_values=images).logits


def build_torchvision(cfg: TorchvisionConfig, num_classes: int) -> nn.Module:
    """An image classifier of torchvision with new weights, drawn from torch's global random numbers:
    images (batch, 3, height, width) -> logits (batch, num_classes).

    Raises:
        UserError: torchvision is not installed or does not fit this torch; it has no such architecture; or
            model.channels is not 3.
    """
    models = _import("torchvision", "vision").models
    known = models.list_models(module=models)
    if cfg.architecture not in known:
        raise UserError("model.architecture", cfg.architecture, known)
    if cfg.channels != 3:
        raise UserError("model.channels", cfg.channels, "3, as all models of torchvision")
    options = dict(_TORCHVISION_OPTIONS.get(cfg.architecture, {}))
    if cfg.architecture.startswith("vit_"):
        options["image_size"] = cfg.image_size
    return models.get_model(cfg.architecture, weights=None, num_classes=num_classes, **options)


def _import(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        found, hint = f"a model of {package}, which is not installed", f"pip install sparse-pretrain[{extra}]"
    except (ImportError, RuntimeError) as error:  # "operator torchvision::nms does not exist"
        found = f"a model of {package}, which cannot be imported ({str(error).splitlines()[0]})"
        hint = f"Install the {package} that was built for torch {torch.__version__}"
    raise UserError("model.family", found, f"families that need no {package}", hint=hint)


def _config(transformers: Any, path: Path, given: str) -> Any:
    if not (path.is_file() or (path / "config.json").is_file()):
        raise UserError(
            "model.path",
            given,
            "a folder with a model of transformers, or its config.json",
            hint="Nothing is downloaded here: a model of the hub is there after `hf download NAME --local-dir FOLDER`",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            "model.path",
            f"{given}, whose config transformers {transformers.__version__} cannot use ({_first_line(error)})",
            "a config.json of a model that it has",
        ) from error
    return config


def _has_weights(folder: Path, given: str) -> bool:
    """Whether there are safetensors.

    Raises:
        UserError: there are weights, and only in other formats.
    """
    if any(folder.glob("*.safetensors")):
        return True
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack") for p in folder.glob(pattern))
    if others:
        raise UserError(
            "model.path", f"{given} with {', '.join(others[:4])}", "safetensors: other formats can run code when read"
        )
    return False


def _load(auto: Any, folder: Path, config: Any, given: str) -> Any:
    from safetensors import SafetensorError

    try:
        model, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the classes of another task; of all else see below
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            "model.path", f"{given}, whose weights cannot be read ({_first_line(error)})", "whole safetensors"
        ) from error
    body = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    lacking = {key for key in lacking if key.startswith(body) and "pooler" not in key}
    if lacking:
        shown = ", ".join(sorted(lacking)[:4]) + (", …" if len(lacking) > 4 else "")
        raise UserError("model.path", f"{given}, whose weights lack {shown}", "all weights of its config.json")
    return model


def _positions(model: Any) -> int | None:
    """The longest sequence that the model has positions for; None = any."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if positions and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - module.padding_idx - 1  # RoBERTa counts from behind the padding token
    return positions


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
