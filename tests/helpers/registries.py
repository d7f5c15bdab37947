"""Entries of registries that live as long as a test."""

from typing import Any

import pytest

from moe_jax.registry import Registry


def register(
  monkeypatch: pytest.MonkeyPatch, registry: Registry, name: str, entry: Any
) -> None:
  """Registers an entry, in the place of another of that name if there is one.

  Args:
    monkeypatch: Takes it back when the test ends.
    registry: The registry.
    name: The name of the entry.
    entry: What it means.
  """
  monkeypatch.setitem(registry._entries, name, entry)
  monkeypatch.setitem(registry._files, name, __file__)
