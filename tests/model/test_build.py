"""Which layers are scanned, and which come before."""

import pytest

from moe_jax.model.build import repetition


@pytest.mark.parametrize(
  ('pattern', 'every', 'expected'),
  [
    ('mmmm', 1, (0, 1)),
    ('dddd', 3, (0, 1)),
    ('mdmd', 2, (0, 2)),
    ('mdmdm', 2, (1, 2)),  # the first layer, then (dm)(dm)
    ('dmmm', 1, (1, 1)),
    ('ddmdmd', 2, (2, 2)),  # an offset of two
    ('dddmddm', 3, (1, 3)),
    ('m', 1, (0, 1)),
    ('dm', 3, (2, 3)),  # never repeats: no scan
  ],
)
def test_repetition(
  pattern: str, every: int, expected: tuple[int, int]
) -> None:
  kinds = tuple({'m': 'moe', 'd': 'dense'}[c] for c in pattern)
  assert repetition(kinds, every) == expected
