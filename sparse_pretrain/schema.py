"""From a composed config to dataclasses: one clear sentence for whatever does not fit. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from sparse_pretrain.errors import UserError
from sparse_pretrain.limits import CHOICES, RANGES


class Family:
    """A dataclass whose fields depend on the value of one of them: `families` gives the dataclass of each value."""

    family_option: ClassVar[str]
    families: ClassVar[dict[str, type]]


C = TypeVar("C")


def load(schema: type[C], values: dict[str, Any]) -> C:
    """Build `schema` from a composed config, checking names, types, choices and ranges.

    Raises:
        UserError: naming the option, what was found and what is allowed.
    """
    return _build(schema, values, prefix="")


def _build(schema: type[C], values: dict[str, Any], prefix: str) -> C:
    schema = _member(schema, values, prefix)
    hints = get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{prefix}{key}", "no such option", sorted(f"{prefix}{name}" for name in fields))
    built: dict[str, Any] = {}
    for name, f in fields.items():
        option = f"{prefix}{name}"
        if name in values:
            built[name] = _convert(hints[name], values[name], option)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(option, "nothing", "a value; this option has no default")
    return schema(**built)


def _member(schema: type[C], values: dict[str, Any], prefix: str) -> type[C]:
    """The dataclass of a family that the values choose, or `schema` itself."""
    families = schema.__dict__.get("families")
    if families is None:
        return schema
    option = schema.family_option  # type: ignore[attr-defined]
    found = values.get(option, "nothing")
    if not isinstance(found, str) or found not in families:
        raise UserError(f"{prefix}{option}", found, list(families))
    return families[found]


def _convert(hint: Any, value: Any, option: str) -> Any:
    """`value` as the annotated type, or a UserError. An int is accepted where a float is asked for, nothing else."""
    if value == "???":
        raise UserError(option, "nothing", "a value; this option has no default")
    if get_origin(hint) in (Union, types.UnionType):
        inner, other = get_args(hint)  # a type, and None or a Literal
        if (value is None and other is type(None)) or value in get_args(other):
            return value
        if isinstance(value, str) and get_args(other):
            raise UserError(option, value, ["a number", *get_args(other)])
        return _convert(inner, value, option)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(
                option, repr(value), f"a group of options ({', '.join(f.name for f in dataclasses.fields(hint))})"
            )
        return _build(hint, value, prefix=f"{option}.")  # type: ignore[arg-type]
    if get_origin(hint) is list:
        (inner,) = get_args(hint)
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            raise UserError(option, repr(value), "a list, as [a,b]")
        return [_convert(inner, item, option) for item in value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # prompt=12 is a text that YAML takes for a number
    if type(value) is not hint:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise UserError(option, repr(value), words[hint])
    if hint is float and not math.isfinite(value):
        raise UserError(option, value, "a number that is finite")
    if option in CHOICES and value not in CHOICES[option]:
        raise UserError(option, value, CHOICES[option])
    if option in RANGES:
        low, high = RANGES[option]
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = " and ".join(
                text
                for text in (
                    f"at least {low}" if low is not None else "",
                    f"at most {high}" if high is not None else "",
                )
                if text
            )
            raise UserError(option, f"{value:g}" if hint is float else value, bounds)
    return value


def options(schema: Any, prefix: str = "") -> list[str]:
    """The names of all options of a schema, as `model.d_model`; of a family those of all its members."""
    names: dict[str, None] = {}
    for member in schema.__dict__.get("families", {"": schema}).values():
        hints = get_type_hints(member)
        for field in dataclasses.fields(member):
            name, hint = f"{prefix}{field.name}", hints[field.name]
            names |= dict.fromkeys(options(hint, f"{name}.") if dataclasses.is_dataclass(hint) else [name])
    return list(names)


def to_dict(cfg: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return dataclasses.asdict(cfg)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"d_model": 64}} -> {"model.d_model": 64}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
