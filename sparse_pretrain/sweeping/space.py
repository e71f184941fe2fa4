"""What a sweep searches: options of `train`, each with the values it may have."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from sparse_pretrain.errors import UserError
from sparse_pretrain.runs import RUNTIME_OPTIONS

GROUP = "hparams_search"
KEYS = {
    "float": ["type", "low", "high", "log", "step"],
    "int": ["type", "low", "high", "log", "step"],
    "categorical": ["type", "choices"],
}
Distribution = FloatDistribution | IntDistribution | CategoricalDistribution


@dataclass(frozen=True)
class Parameter:
    """An option that is searched.

    Attributes:
        distribution: where its values come from; of a categorical one they are texts as on the command line, since
            Optuna keeps scalars alone.
        choices: the values of a categorical one as the space names them, else empty.
    """

    option: str
    distribution: Distribution
    choices: tuple[Any, ...] = ()

    def override(self, value: Any) -> str:
        """`option=value` in Hydra's grammar."""
        return f"{self.option}={value if self.choices else hydra_text(value)}"

    def ends(self) -> list[Any]:
        """Every choice, or the lowest and the highest value."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        return [self.distribution.low, self.distribution.high]

    def values(self) -> list[Any] | None:
        """All of them in order; None where there is no end to them."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        if distribution.step is None:
            return None
        low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
        count = int((Decimal(str(distribution.high)) - low) / step) + 1
        kind = int if isinstance(distribution, IntDistribution) else float
        return [kind(low + i * step) for i in range(count)]

    def snapped(self, value: Any) -> Any:
        """A value drawn from the distribution, as `values` has it: steps add up to 0.30000000000000004."""
        distribution = self.distribution
        if not isinstance(distribution, FloatDistribution) or distribution.step is None:
            return value
        values = self.values() or []
        return values[round((value - distribution.low) / distribution.step)]


def parse(values: dict[str, Any], sampler: str, shared: Iterable[str]) -> list[Parameter]:
    """The space as `conf/hparams_search` files say it: option -> {type, low, high, log, step} or {type, choices}.

    Args:
        sampler: which must be able to search it.
        shared: the options that every trial has from the command line.

    Raises:
        UserError: for the first thing that does not fit; whether the options exist and may have such values is seen
            where they are composed.
    """
    if not values:
        raise UserError(GROUP, "nothing to search", "a file of that group, as hparams_search=lr")
    space = [_parameter(option, entry) for option, entry in values.items()]
    for parameter in space:
        option = parameter.option
        for runtime in RUNTIME_OPTIONS:
            if option == runtime or option.startswith(f"{runtime}."):
                raise UserError(f"{GROUP}.{option}", "an option that changes no loss", "options that decide the result")
        if option in shared:
            raise UserError(option, "one value on the command line, and a search for it", "one of them")
        if sampler == "grid" and parameter.values() is None:
            raise UserError("sampler", f"grid, where {option} has neither step nor choices", ["tpe", "random"])
    return space


def _parameter(option: str, entry: Any) -> Parameter:
    name = f"{GROUP}.{option}"
    if not isinstance(entry, dict):
        raise UserError(name, repr(entry), "{type: float, low: …, high: …} or {type: categorical, choices: […]}")
    kind = entry.get("type", "nothing")
    if kind not in KEYS:
        raise UserError(f"{name}.type", kind, list(KEYS))
    unknown = [key for key in entry if key not in KEYS[kind]]
    if unknown:
        raise UserError(name, unknown[0], KEYS[kind])
    if kind == "categorical":
        return _categorical(option, entry.get("choices"))
    number = _whole if kind == "int" else _number
    low, high = (number(f"{name}.{key}", entry.get(key)) for key in ("low", "high"))
    if not low < high:
        raise UserError(f"{name}.low", f"{low:g} with high={high:g}", "a number below high")
    log = entry.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{name}.log", repr(log), "true or false")
    if log and low <= 0:
        raise UserError(f"{name}.low", f"{low:g} with log=true", "above 0")
    step = None if entry.get("step") is None else number(f"{name}.step", entry["step"])
    if step is not None:
        if log:
            raise UserError(f"{name}.step", f"{step:g} with log=true", "one of them")
        if step <= 0 or (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
            raise UserError(f"{name}.step", f"{step:g}", f"a divisor of high - low = {high - low:g}, above 0")
    if kind == "int":
        return Parameter(option, IntDistribution(int(low), int(high), log, 1 if step is None else int(step)))
    return Parameter(option, FloatDistribution(float(low), float(high), log, step))


def _categorical(option: str, choices: Any) -> Parameter:
    name = f"{GROUP}.{option}.choices"
    if not isinstance(choices, list):
        raise UserError(name, "nothing" if choices is None else repr(choices), "a list of values")
    if len(choices) < 2:
        raise UserError(name, choices or "none", "two or more; one alone goes on the command line")
    texts = []
    for choice in choices:
        try:
            texts.append(hydra_text(choice))
        except TypeError as error:
            raise UserError(name, repr(choice), "numbers, texts, true, false, null, or lists of them") from error
    repeated = [text for text in texts if texts.count(text) > 1]
    if repeated:
        raise UserError(name, f"{repeated[0]} twice", "different values")
    return Parameter(option, CategoricalDistribution(texts), tuple(choices))


def _number(option: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(option, "nothing" if value is None else repr(value), "a number")
    return value


def _whole(option: str, value: Any) -> int:
    if type(value) is not int:
        raise UserError(option, "nothing" if value is None else repr(value), "a whole number, with type=int")
    return value


def hydra_text(value: Any) -> str:
    """A value as it is written on the command line, in the grammar of Hydra's overrides.

    Raises:
        TypeError: for what has no such form.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(hydra_text, value))}]"
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    if re.fullmatch(r"[A-Za-z_/][\w./-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    # Backslashes are doubled in front of a quote alone.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), value) + "'"


def overrides(space: Sequence[Parameter], params: dict[str, Any]) -> list[str]:
    """What a trial adds to the command line."""
    return [parameter.override(params[parameter.option]) for parameter in space]


def size(space: Sequence[Parameter]) -> int | None:
    """The number of different settings; None where there is no end to them."""
    values = [parameter.values() for parameter in space]
    return None if None in values else math.prod(len(each) for each in values if each is not None)


def settings(space: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    """All of them, in the order of a grid, of a space that has an end."""
    values = [parameter.values() or [] for parameter in space]
    for combination in itertools.product(*values):
        yield {parameter.option: value for parameter, value in zip(space, combination, strict=True)}
