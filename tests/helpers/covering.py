"""Pairwise covering sets: every two settings meet in some combination."""

import itertools
from collections.abc import Mapping, Sequence

# Name of a dimension -> name of its value: one combination.
Row = dict[str, str]
# Of two dimensions, one value each.
Pair = frozenset[tuple[str, str]]


def cover(
  dimensions: Mapping[str, Sequence[str]],
  clashes: Sequence[tuple[Mapping[str, Sequence[str]], ...]],
) -> list[Row]:
  """A small set of valid rows in which every possible pair of values occurs.

  Greedy and deterministic: a row begins with an uncovered pair; then each
  dimension takes the value that covers the most uncovered pairs.

  Args:
    dimensions: the values of each.
    clashes: two conditions each, `{dimension: values}`; a row may not meet
      both.
  """
  refused = {
    frozenset([(a, x), (b, y)])
    for left, right in clashes
    for a, b in itertools.product(left, right)
    for x, y in itertools.product(left[a], right[b])
  }
  missing = [
    pair for pair in pairs_of(dimensions) if complete(pair, dimensions, refused)
  ]
  rows = []
  while missing:
    row = grow(dict(sorted(missing[0])), dimensions, refused, missing)
    assert row, 'an incomplete pair is not missing'
    rows.append({name: row[name] for name in dimensions})
    missing = [pair for pair in missing if not pair <= row.items()]
  return rows


def most_varied(rows: Sequence[Row], count: int, by: str) -> list[Row]:
  """Rows that differ in dimension `by` and together have most of the values."""
  picked: list[Row] = []
  seen: set[tuple[str, str]] = set()
  for _ in range(count):
    others = [row for row in rows if (by, row[by]) not in seen]
    row = max(others, key=lambda row: len(row.items() - seen))
    picked.append(row)
    seen |= row.items()
  return picked


def pairs_of(dimensions: Mapping[str, Sequence[str]]) -> list[Pair]:
  return [
    frozenset([(a, x), (b, y)])
    for a, b in itertools.combinations(dimensions, 2)
    for x, y in itertools.product(dimensions[a], dimensions[b])
  ]


def complete(
  pair: Pair, dimensions: Mapping[str, Sequence[str]], refused: set[Pair]
) -> bool:
  """Whether some valid row has this pair."""
  return grow(dict(pair), dimensions, refused, []) is not None


def grow(
  row: Row,
  dimensions: Mapping[str, Sequence[str]],
  refused: set[Pair],
  missing: Sequence[Pair],
) -> Row | None:
  """The row made whole, best value first, going back where that fails."""
  if not valid(row, refused):
    return None
  free = [name for name in dimensions if name not in row]
  if not free:
    return row

  def gain(value: str) -> int:
    longer = (row | {free[0]: value}).items()
    return sum(pair <= longer for pair in missing if (free[0], value) in pair)

  for value in sorted(dimensions[free[0]], key=gain, reverse=True):
    found = grow(row | {free[0]: value}, dimensions, refused, missing)
    if found is not None:
      return found
  return None


def valid(row: Row, refused: set[Pair]) -> bool:
  pairs = itertools.combinations(row.items(), 2)
  return not any(frozenset(pair) in refused for pair in pairs)
