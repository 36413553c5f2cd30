"""A server on a real socket for each test that asks for one."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from tests.client.answers import Serve
from tests.client.faulty_server import FaultyServer
from tests.client.raw_server import RawServer
from tests.client.rows import dense_logits, truncated

from logitcache.labels.soft_labels import SoftLabels


@pytest.fixture
def soft() -> SoftLabels:
    """100 rows of the top 4 of 10 classes."""
    return truncated(dense_logits(100, 10), 4, temperatures=(1.0, 2.0))


@pytest.fixture
def server(soft: SoftLabels) -> Iterator[FaultyServer]:
    with FaultyServer(soft) as running:
        yield running


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(*arguments: Any, **options: Any) -> RawServer:
            server = RawServer(*arguments, **options)
            stack.callback(server.stop)
            return server

        yield start
