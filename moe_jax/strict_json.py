"""JSON as its standard has it: also of numbers that it cannot write."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
  """Returns `json.dumps(value, **options)`, which every reader understands.

  Floats are written so that reading gives back the same bits. JSON has no
  infinities and no NaN: they are the strings "Infinity", "-Infinity" and "NaN",
  which `float` (and JavaScript's `Number`) turn back.
  """
  return json.dumps(_encodable(value), allow_nan=False, **options)


def decoded(value: Any) -> Any:
  """Returns what was read of `dumps`, with infinities and NaN as floats."""
  if isinstance(value, dict):
    return {name: decoded(each) for name, each in value.items()}
  if isinstance(value, list):
    return [decoded(each) for each in value]
  if value in ('NaN', 'Infinity', '-Infinity'):
    return float(value)
  return value


def _encodable(value: Any) -> Any:
  """Returns the value with the floats that JSON lacks as strings."""
  if isinstance(value, dict):
    return {name: _encodable(each) for name, each in value.items()}
  if isinstance(value, list | tuple):
    return [_encodable(each) for each in value]
  if isinstance(value, float) and not math.isfinite(value):
    return (
      'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
    )
  return value
