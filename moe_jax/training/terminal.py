"""Numbers as a user reads them in a terminal."""

import math
from collections.abc import Mapping, Sequence

_MUCH_WAITING = 0.05  # of the time


def progress_line(
  step: int,
  steps: int,
  loss: float,
  tokens_per_second: float,
  seconds_left: float,
  mfu: float | None = None,
  data_wait: float = 0.0,
  load: tuple[float, int] | None = None,
) -> str:
  """Returns `step 120/1000  12%  loss 3.4512  45.2k tokens/s  1m20s left`.

  Behind the loss of a model with experts stands `load 1.8x idle 0`. Before the
  time left stands `38.1% MFU`, where that is known, and `12% waiting for data`,
  where it is worth a look.

  Args:
    step: The number of steps done.
    steps: That of the whole run.
    loss: The loss, in nats.
    tokens_per_second: Of all devices.
    seconds_left: To the end of the run.
    mfu: The share of the devices' peak that is used, None where unknown.
    data_wait: The share of the time in which the run waited for data.
    load: The rows of the busiest expert of all over the balanced share, and how
      many experts no token chose; None without experts.
  """
  width = len(str(steps))
  routed = '' if load is None else f'  load {load[0]:.1f}x idle {load[1]}'
  used = '' if mfu is None else f'  {mfu:.1%} MFU'
  if data_wait >= _MUCH_WAITING:
    used += f'  {data_wait:.0%} waiting for data'
  return (
    f'step {step:{width}}/{steps}  {step / steps:4.0%}  loss {loss:.4f}{routed}'
    f'  {_short(tokens_per_second)} tokens/s{used}'
    f'  {duration(seconds_left)} left'
  )


def not_finite(name: str, loss: float, step: int) -> str:
  """Returns what to say of an evaluation whose loss is no finite number."""
  return (
    f'{name}: the loss is {loss}: the model of step {step} is of no use; an'
    ' earlier checkpoint may be'
  )


def duration(seconds: float) -> str:
  """Returns `1d02h`, `3h05m`, `1m20s` or `7s`; `?` if it cannot be told."""
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
  """Returns a plain-text table; the first row is its head.

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


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
  """Returns a table of metrics: a row for each result, a column for each name.

  Args:
    results: The metrics of every result, by its name.
  """
  names = list(dict.fromkeys(name for row in results.values() for name in row))
  head = ['split', *(name.replace('_', ' ') for name in names)]
  rows = [
    [split, *(number(row[name]) if name in row else '' for name in names)]
    for split, row in results.items()
  ]
  return summary_table([head, *rows])


def metrics_text(metrics: Mapping[str, float]) -> str:
  """Returns `loss 3.4512, bits per byte 2.1004, tokens 12,345`."""
  return ', '.join(
    f'{name.replace("_", " ")} {number(value)}'
    for name, value in metrics.items()
  )


def number(value: float) -> str:
  """Returns a count with its thousands apart, or four decimals."""
  return f'{value:,}' if isinstance(value, int) else f'{value:.4f}'


def _short(number: float) -> str:
  """Returns three digits or so: 950, 45.2k, 1.34M."""
  for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= unit:
      return f'{number / unit:.3g}{name}'
  return f'{number:.0f}'
