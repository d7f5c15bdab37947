"""Which parameters of a test the fast and the slow suite run."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast_only(fast: Iterable[Any], names: Iterable[Any]) -> list[Any]:
  """All `names` as parameters of a test; those not in `fast` are slow."""
  fast = set(fast)
  return [
    pytest.param(name, marks=[] if name in fast else [pytest.mark.slow])
    for name in names
  ]


def at_first(count: int, values: Iterable[Any]) -> list[Any]:
  """All `values` as parameters; those from number `count` on are thorough.

  A tuple is of a parameter each.
  """
  return [
    pytest.param(
      *(value if isinstance(value, tuple) else (value,)),
      marks=[] if i < count else [pytest.mark.thorough],
    )
    for i, value in enumerate(values)
  ]
