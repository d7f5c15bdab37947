"""A comparison as tables: what would be trained, and what was found."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.analysis.compare import MATCHES, Overrides, Row, Sizes
from moe_jax.training import terminal


def table(result: Mapping[str, Any]) -> str:
  """Returns what compare.json says as a table, with notes below it."""
  head = [
    'variant',
    'parameters',
    'active',
    'FLOPs/token',
    'bits per byte',
    f'difference to {result["baseline"]}',
    'p',
    'seeds',
    'time',
  ]
  [baseline] = [
    row for row in result['rows'] if row['variant'] == result['baseline']
  ]
  lines = [head, *(_line(row, baseline) for row in result['rows'])]
  notes = [note for row in result['rows'] for note in _notes(row, result)]
  split = f'bits per byte of {result["split"]}: mean ± sample deviation over'
  about = (
    f'{split} seeds; difference: mean over the same seeds [95 % interval],'
    ' paired t test; time: training of a run, without compilation'
  )
  return '\n'.join([terminal.summary_table(lines), '', about, *notes])


def sizes_table(found: Sequence[Row], baseline: Row) -> str:
  """Returns what would be trained, with sizes, as a table."""
  head = ['variant', 'parameters', 'active', 'FLOPs/token', 'changes']
  lines = [
    [
      row.variant,
      *(
        _size(size, of_baseline)
        for size, of_baseline in zip(row.sizes, baseline.sizes, strict=True)
      ),
      _assignments({**row.changes, **(row.matched or {})}) or '-',
    ]
    for row in found
  ]
  return terminal.summary_table([head, *lines])


def _line(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
  """Returns the cells of a row of the table."""
  mean, deviation = row['mean'], row['deviation']
  score = '' if mean is None else f'{mean:.4f}'
  score += '' if deviation is None else f' ± {deviation:.4f}'
  difference = row['difference']
  against = '' if difference is None else f'{difference:+.4f}'
  if row['interval'] is not None:
    low, high = row['interval']
    against += f' [{low:+.4f}, {high:+.4f}]'
  p_value = row['p_value']
  seconds = [run['seconds'] for run in row['runs'] if run['seconds']]
  time = terminal.duration(statistics.fmean(seconds)) if seconds else ''
  marks = f' ({len(row["failed"])} failed)' if row['failed'] else ''
  return [
    row['variant'],
    *(_size(row[name], baseline[name]) for name in Sizes._fields),
    score,
    against,
    '' if p_value is None else f'{p_value:.2g}',
    f'{len(row["runs"])}{marks}',
    time,
  ]


def _size(size: int, baseline: int) -> str:
  """Returns `7.01M`, and `7.05M (+0.6%)` where it is not the baseline's."""
  text = f'{size / 1e6:.3f}M'
  if size == baseline:
    return text
  return f'{text} ({(size - baseline) / baseline:+.1%})'


def _notes(row: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
  """Returns what else there is to say of a row, a line each."""
  variant, notes = row['variant'], []
  if row['matched']:
    field = MATCHES[result['match']]
    [target] = [
      other[field]
      for other in result['rows']
      if other['variant'] == result['baseline']
    ]
    notes.append(
      f'{variant}: {_assignments(row["matched"])} to match {result["match"]},'
      f' which leaves {(row[field] - target) / target:+.2%}'
    )
  swept = row['swept']
  if swept and swept['value'] is not None:
    notes.append(
      f'{variant}: best {result["sweep"]["key"]} of'
      f' {", ".join(swept["results"])} is {swept["value"]}'
      + (f', at the edge of {", ".join(swept["edge"])}' * bool(swept['edge']))
    )
  notes += [
    f'{variant}, seed {failed["seed"]}, failed: {failed["error"]}'
    for failed in row['failed']
  ]
  return notes


def _assignments(values: Overrides) -> str:
  return ', '.join(f'{key} = {value}' for key, value in values.items())
