"""What conftest promises: a home of its own for each test, and no network beyond this machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from conftest import NetworkBlocked

from edgemed.core.paths import data_dir


def test_the_home_is_the_tests_own() -> None:
    assert data_dir() == Path(os.environ["HOME"]) / "edgemed" and not data_dir().exists()


@pytest.mark.parametrize("address", [("203.0.113.1", 80), ("10.0.0.1", 443)])
def test_no_other_machine_is_reached(address: tuple[str, int]) -> None:
    with socket.socket() as s, pytest.raises(NetworkBlocked):
        s.connect(address)


def test_this_machine_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
