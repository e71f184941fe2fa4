"""Measured rates of 2:4 products: the `products` rows of a file that `sparse-pretrain bench` wrote."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse24.backends.base import KINDS

from sparse_pretrain.errors import UserError

FAR = 4.0  # times larger or smaller in one dimension: no rate for a shape any more
_ALLOWED = "a GPU_DATE.json of `sparse-pretrain bench part=[products]` on a GPU"
_CASE = re.compile(rf"(\d+)x(\d+)\)?, (\d+) tokens: ({'|'.join(KINDS)})$")
_DENSE = "dense"


@dataclass(frozen=True)
class Measured:
    """One product as it was measured, in ms: dense, and the fastest way for 2:4 operands, which may be a dense one.

    packing_ms: of the weight, once per optimizer step.
    """

    kind: str
    tokens: int
    out_features: int
    in_features: int
    dense_ms: float
    sparse_ms: float
    arm: str
    packing_ms: float

    @property
    def flop(self) -> float:
        return 2.0 * self.tokens * self.out_features * self.in_features

    def distance(self, tokens: int, out_features: int, in_features: int) -> list[float]:
        pairs = (self.tokens, tokens), (self.out_features, out_features), (self.in_features, in_features)
        return [abs(math.log(a / b)) for a, b in pairs]


def read_rates(path: str, device: str) -> list[Measured]:
    """The products of a file, measured on `device`.

    Raises:
        UserError: naming `rates`: it cannot be read, is of something else, or was measured on another device.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        rows, environment = list(values["rows"]), dict(values["environment"])
        rehearsal = values.get("rehearsal")
    except OSError as error:
        raise UserError("rates", f"{path}, which cannot be read ({error.strerror})", _ALLOWED) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("rates", f"{path}, which holds no benchmark results", _ALLOWED) from error
    if rehearsal:
        raise UserError("rates", f"{path}, a rehearsal, whose numbers mean nothing", _ALLOWED)
    where = str(environment.get("gpu") or environment.get("device") or "an unknown device")
    if device.lower() not in where.lower() or (device == "H100" and "PCIe" in where):
        raise UserError("rates", f"{path}, measured on {where}", f"results of device={device}")
    try:
        found = _products(rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError("rates", f"{path}, whose rows are not of this version", _ALLOWED) from error
    if not found:
        raise UserError("rates", f"{path}, which has no products that were right and timed", _ALLOWED)
    return found


def _products(rows: list[dict[str, Any]]) -> list[Measured]:
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        usable = row["part"] == "products" and row["status"] == "ok" and row["mode"] == "eager" and row["ms"]
        if usable and not row["extra"].get("check") and "default algorithm" not in row["arm"]:
            cases.setdefault(row["case"], {})[row["arm"]] = row
    found = []
    for case, arms in cases.items():
        shape = _CASE.search(case)
        if shape is None or _DENSE not in arms:
            continue
        best = min(arms.values(), key=lambda row: row["ms"])
        out_features, in_features, tokens = (int(shape[i]) for i in (1, 2, 3))
        packing = float(best["extra"].get("packing_ms") or 0.0)
        dense = float(arms[_DENSE]["ms"])
        found.append(
            Measured(shape[4], tokens, out_features, in_features, dense, float(best["ms"]), best["arm"], packing)
        )
    return found


def nearest(measured: list[Measured], kind: str, tokens: int, out_features: int, in_features: int) -> Measured:
    """The product of this kind whose shape is nearest.

    Raises:
        UserError: naming `rates`: there is none within `FAR` in each dimension.
    """
    near = [
        (sum(distance), index)
        for index, one in enumerate(measured)
        if one.kind == kind and max(distance := one.distance(tokens, out_features, in_features)) <= math.log(FAR)
    ]
    if not near:
        shapes = sorted({f"{m.out_features}x{m.in_features}, {m.tokens} tokens" for m in measured if m.kind == kind})
        raise UserError(
            "rates",
            f"no {kind} product near {out_features}x{in_features} with {tokens} tokens",
            f"measurements within a factor of {FAR:g} in each dimension; there are {'; '.join(shapes) or 'none'}",
        )
    return measured[min(near)[1]]
