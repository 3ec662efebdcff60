"""A context without stacks: the driver's calls in their order, and a machine without a driver."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest

from runtimes.libcuda import shrink_context


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


class Driver:
    """CUDA's driver as far as it is used; `fails` is the call that reports an error."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.called: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.called.append((name, args))
            return 999 if name == self.fails else 0

        return call


def test_the_stack_of_the_primary_context_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert shrink_context(3)
    names = [name for name, _ in driver.called]
    assert names == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuCtxSetLimit"]
    assert driver.called[1][1][1] == 3
    limit, size = driver.called[-1][1]
    assert (limit, size.value) == (0, 0)


def test_small_workspaces_unless_others_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    shrink_context(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    shrink_context(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_what_fails_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(fails="cuDeviceGet")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert not shrink_context(0)
    assert driver.called[-1][0] == "cuDeviceGet"


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not shrink_context(0)
