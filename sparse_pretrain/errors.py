"""The one exception a user is meant to see: one clear sentence, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """Something the user asked for cannot be done.

    Args:
        option: the option, file or object at fault, as the user would type it (`model.n_head`).
        found: what was found there.
        allowed: what would have been accepted: a phrase, or the list of choices (then the one nearest to
            `found` is suggested).
        hint: what to do about it, where that is not obvious.
    """

    exit_code = 2

    def __init__(self, option: str, found: object, allowed: str | Sequence[str], hint: str = "") -> None:
        choices = [] if isinstance(allowed, str) else list(allowed)
        message = f"{option}: found {found}; allowed: {allowed if isinstance(allowed, str) else ', '.join(choices)}"
        nearest = difflib.get_close_matches(str(found), choices, n=1)
        if nearest:
            message += f"; did you mean {nearest[0]}?"
        if hint:
            message += f". {hint}"
        super().__init__(message)
