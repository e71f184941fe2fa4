"""A Hugging Face config.json, and what of it our models can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_pretrain.config_models import TransformerConfig
from sparse_pretrain.errors import UserError

# theirs -> ours
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_python_tanh": "gelu",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
}
_NAMES = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu": "relu", "silu": "silu", "relu2": "relu2"}


@dataclass(frozen=True)
class ConfigFile:
    """config.json of a folder; `option`: as which the user named the folder."""

    values: dict[str, Any]
    folder: Path
    option: str

    def get(self, name: str, default: Any) -> Any:
        """The value of a key, or transformers' default for it.

        Raises:
            UserError: its type is not that of the default, or it is a whole number below 1.
        """
        value = self.values.get(name)
        if value is None:
            return default
        number = isinstance(default, float) and type(value) is int
        if not number and (type(value) is not type(default) or (type(value) is int and value < 1)):
            raise self.error(name, repr(value), f"a value like {default!r}")
        return value

    def only(self, name: str, *allowed: Any, default: Any) -> None:
        """Raises UserError if a key has another value than those that our models can hold."""
        value = self.values.get(name, default)
        if value not in allowed:
            raise self.error(name, value, " or ".join(str(choice) for choice in allowed))

    def activation(self, name: str, default: str, allowed: Sequence[str] = tuple(_NAMES)) -> str:
        """Our name of an activation function, which has to be one of `allowed`."""
        value = self.get(name, default)
        if ACTIVATIONS.get(value) not in allowed:
            raise self.error(name, value, [theirs for theirs, ours in ACTIVATIONS.items() if ours in allowed])
        return ACTIVATIONS[value]

    def error(self, name: str, found: object, allowed: str | Sequence[str]) -> UserError:
        return UserError(self.option, f"{self.folder} with {name}={found}", allowed)


def check_option(cfg: TransformerConfig, name: str, allowed: Sequence[object], architecture: str) -> None:
    """Raises UserError if an option of our model has a value that the architecture of theirs cannot hold."""
    value = getattr(cfg, name)
    if value not in allowed:
        choices = ", ".join("null" if choice is None else str(choice).lower() for choice in allowed)
        hint = f"{architecture} is the architecture of transformers for this model, and holds nothing else"
        raise UserError(f"model.{name}", str(value).lower(), choices, hint)


def activation_name(cfg: TransformerConfig, architecture: str) -> str:
    """Their name of our activation function.

    Raises:
        UserError: a gated one, which this architecture does not have.
    """
    check_option(cfg, "activation", list(_NAMES), architecture)
    return _NAMES[cfg.activation]
