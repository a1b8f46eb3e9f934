from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.serve.live import live
from tinymodal.compose.build import load


@pytest.fixture(scope="session")
def starter():
    """The model that ships: it sees, hears and speaks."""
    return load("starter")


@pytest.fixture(scope="session")
def server(starter):
    """A server with ordinary limits, for all tests that leave it as it was."""
    with live(starter) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    pytest.importorskip("openai")
    return server.client()
