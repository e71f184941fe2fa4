"""Signals before the first step."""

import contextlib
import os
import signal

import pytest

from sparse_pretrain.interrupt import Interrupted, before_the_first_step, raise_if_received


def test_a_signal_whose_exception_was_swallowed_is_not_forgotten():
    with before_the_first_step():
        with contextlib.suppress(Exception):  # as an import that tries
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM before the first step"):
            raise_if_received()
    with before_the_first_step():
        raise_if_received()  # that was another run's
