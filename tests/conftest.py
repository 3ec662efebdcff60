"""Every test runs in a home of its own, without a network but for this machine, and with `../shared` only where it is there.

`shared` is material beside the project (data sets, a real tower); a test that needs it skips with a reason where it is absent.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp  # noqa: F401  (before any numpy: the other way round llama.cpp has crashed in the same process)
import pytest

# Before any test module is imported: the hub's client and matplotlib read these once, at import. Set for subprocesses, too.
_HOME = tempfile.mkdtemp(prefix="edgemed-tests-")
os.environ.update(
    HF_HOME=f"{_HOME}/huggingface",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    MPLCONFIGDIR=f"{_HOME}/matplotlib",
    MPLBACKEND="Agg",
    PIP_NO_INDEX="1",
    TOKENIZERS_PARALLELISM="false",
)
for _name in (
    "HF_ENDPOINT",
    "HF_TOKEN",
    "EDGEMED_DEBUG",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
):
    os.environ.pop(_name, None)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


class NetworkBlocked(RuntimeError):
    """A test tried to reach beyond this machine."""


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # a path of an AF_UNIX socket
    host = str(address[0])
    return host in ("localhost", "::1", "0.0.0.0", "") or host.startswith("127.")


@pytest.fixture(autouse=True)
def isolation(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fresh EDGEMED_HOME, and sockets that reach this machine only."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("EDGEMED_HOME", str(home / "edgemed"))
    for name in ("connect", "connect_ex"):
        real = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, _real: Any = real) -> Any:
            if not _is_local(address):
                raise NetworkBlocked(f"a test tried to reach {address}")
            return _real(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)
    yield


@pytest.fixture
def shared() -> Path:
    """The material beside the project, or a skip."""
    if not SHARED.is_dir():
        pytest.skip("needs the material in ../shared, which is not part of the project")
    return SHARED
