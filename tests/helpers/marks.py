"""Which parameters of a test the fast suite runs."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast_only(fast: Iterable[str], names: Iterable[str]) -> list[Any]:
  """All `names` as parameters of a test; those not in `fast` are slow."""
  fast = set(fast)
  return [
    pytest.param(name, marks=[] if name in fast else [pytest.mark.slow])
    for name in names
  ]
