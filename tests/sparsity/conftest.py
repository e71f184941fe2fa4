import pytest
from sparse24 import backends, dispatch

from tests.sparse24.reference_backend import Reference


@pytest.fixture
def reference(monkeypatch):
    """A backend that anything can be computed with."""
    known = {**backends.BACKENDS, "reference": Reference()}
    monkeypatch.setattr(backends, "BACKENDS", known)
    monkeypatch.setattr(dispatch, "BACKENDS", known)
