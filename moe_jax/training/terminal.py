"""Numbers as a user reads them in a terminal."""

import math
from collections.abc import Sequence


def progress_line(
  step: int,
  steps: int,
  loss: float,
  tokens_per_second: float,
  seconds_left: float,
  mfu: float | None = None,
) -> str:
  """`step 120/1000  12%  loss 3.4512  45.2k tokens/s  1m20s left`.

  Before the time left stands `38.1% MFU`, where that is known.
  """
  width = len(str(steps))
  used = '' if mfu is None else f'  {mfu:.1%} MFU'
  return (
    f'step {step:{width}}/{steps}  {step / steps:4.0%}  loss {loss:.4f}'
    f'  {_short(tokens_per_second)} tokens/s{used}'
    f'  {duration(seconds_left)} left'
  )


def duration(seconds: float) -> str:
  """`1d02h`, `3h05m`, `1m20s` or `7s`; `?` if it cannot be told."""
  if not math.isfinite(seconds):
    return '?'
  whole = round(seconds)
  for unit, name, part, part_name in (
    (86_400, 'd', 3600, 'h'),
    (3600, 'h', 60, 'm'),
    (60, 'm', 1, 's'),
  ):
    if whole >= unit:
      return f'{whole // unit}{name}{whole % unit // part:02}{part_name}'
  return f'{whole}s'


def summary_table(rows: Sequence[Sequence[str]]) -> str:
  """A plain-text table; the first row is its head.

  The first column is set to the left, the others, numbers mostly, to the
  right.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(
      [
        row[0].ljust(widths[0]),
        *(
          cell.rjust(width)
          for cell, width in zip(row[1:], widths[1:], strict=True)
        ),
      ]
    ).rstrip()
    for row in rows
  ]
  rule = '  '.join('-' * width for width in widths)
  return '\n'.join([lines[0], rule, *lines[1:]])


def _short(number: float) -> str:
  """Three digits or so: 950, 45.2k, 1.34M."""
  for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= unit:
      return f'{number / unit:.3g}{name}'
  return f'{number:.0f}'
