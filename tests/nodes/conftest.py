"""Nodes for tests: network namespaces where they are permitted; else a skip that says why not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gigamil.testing.nodes import Nodes, why_no_nodes


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Two hosts with a link each."""
    reason = why_no_nodes()
    if reason is not None:
        pytest.skip(reason)
    with Nodes(2, tmp_path / "nodes") as made:
        yield made
