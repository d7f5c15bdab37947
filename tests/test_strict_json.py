"""What is written is JSON for everybody, and comes back as it was."""

import json
import math
import re
from pathlib import Path

import pytest

from moe_jax import strict_json

MOE_JAX = Path(strict_json.__file__).parent


def refuse(constant: str) -> None:
  raise AssertionError(f'{constant} is not JSON')


def test_numbers_that_json_lacks_are_strings_at_any_depth() -> None:
  value = {'a': [1.0, math.nan, (math.inf, {'b': -math.inf})], 'c': 'x', 'd': 2}
  text = strict_json.dumps(value, indent=2)
  read = json.loads(text, parse_constant=refuse)
  assert read == {
    'a': [1.0, 'NaN', ['Infinity', {'b': '-Infinity'}]],
    'c': 'x',
    'd': 2,
  }
  back = strict_json.decoded(read)
  assert math.isnan(back['a'][1]) and back['a'][2] == [
    math.inf,
    {'b': -math.inf},
  ]
  assert json.loads(strict_json.dumps(0.1 + 0.2)) == 0.1 + 0.2


# What holds no floats, or is a part of a formula and no file of its own.
OTHERWISE = {
  'charts.py',
  'vocabulary.py',
  'base.py',
  '__init__.py',
  'peers.py',
  'lock.py',
  'saved_step.py',
}


@pytest.mark.parametrize(
  'path', sorted(MOE_JAX.rglob('*.py')), ids=lambda path: path.name
)
def test_everything_is_written_by_one_encoder(path: Path) -> None:
  if path.name not in OTHERWISE | {'strict_json.py'}:
    assert not re.search(r'(?<!strict_)json\.dumps?\(', path.read_text('utf-8'))
