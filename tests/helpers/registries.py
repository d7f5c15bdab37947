"""Registries that forget what a test registers."""

from typing import Any

import pytest

from moe_jax.registry import Registry


def forget(monkeypatch: pytest.MonkeyPatch, *registries: Registry) -> None:
  """Lets the registries forget what is registered until the test ends."""
  for registry in registries:
    for entries in ('_entries', '_files'):
      copied = dict(getattr(registry, entries))
      monkeypatch.setattr(registry, entries, copied)


def replace(
  monkeypatch: pytest.MonkeyPatch, registry: Registry, name: str, entry: Any
) -> None:
  """Puts an entry in the place of another, or beside all, until then."""
  forget(monkeypatch, registry)
  registry._entries[name] = entry
  registry._files[name] = __file__
