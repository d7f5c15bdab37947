"""What a comparison consists of, and what its runs' files say of it.

What DIR/compare.json holds follows from the files of the runs, so a comparison
that was killed loses nothing but the steps since the last checkpoints.
"""

import dataclasses
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from moe_jax import config as config_lib
from moe_jax import disk, files, strict_json
from moe_jax.analysis import compare, runs
from moe_jax.analysis.compare import Overrides, Point, Row
from moe_jax.config.keys import Value
from moe_jax.errors import UserError
from moe_jax.evaluation import checkpoints

FILE = 'compare.json'


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of a comparison.

  Attributes:
    row: The row.
    point: The values of the swept keys.
    seed: The seed.
    workdir: Its directory, relative to that of the comparison.
    values: The keys in which it differs from --config=ARGUMENT of the row.
  """

  row: Row
  point: Point
  seed: int
  workdir: str
  values: Overrides

  @property
  def name(self) -> str:
    """What it is called in messages."""
    return self.workdir.replace('/', ' ').replace('seed-', 'seed ')

  def value(self, key: str) -> Any:
    """Returns the value of a key of its config, which may be swept."""
    return self.values.get(key, config_lib.get(self.row.config, key))


@dataclasses.dataclass
class Comparison:
  """What is compared, where, and what failed.

  Attributes:
    workdir: The directory.
    argument: The --config.
    overrides: The keys that --config.KEY=VALUE names.
    rows: The rows.
    baseline: The name of the row that others are compared with.
    match: What was made equal.
    seeds: The seeds, in order.
    swept: The values of every swept key.
    split: The split that is compared.
    jobs: How many runs are trained side by side.
    failed: The error of every run that failed, by its workdir.
  """

  workdir: str
  argument: str
  overrides: Overrides
  rows: list[Row]
  baseline: str
  match: str
  seeds: list[int]
  swept: dict[str, list[Value]]
  split: str
  jobs: int = 1
  failed: dict[str, str] = dataclasses.field(default_factory=dict)

  def run_of(self, row: Row, point: Point, seed: int) -> Run:
    """Returns the run of a row with these swept values and this seed."""
    swept = dict(zip(self.swept, point, strict=True))
    at = ','.join(f'{key}={value}' for key, value in swept.items())
    parts = [folder(row.variant), folder(at), f'seed-{seed}']
    matched = row.matched or {}
    values = {**self.overrides, **matched, **swept, 'seed': seed}
    workdir = '/'.join(part for part in parts if part)
    return Run(row, point, seed, workdir, values)

  def result_of(self, run: Run, split: str) -> dict[str, Any] | None:
    """Returns what was found of a finished run on a split; None before."""
    disabled = run.value('eval.disable_top')
    path = checkpoints.result_path(
      os.path.join(self.workdir, run.workdir),
      split,
      run.value('train.steps'),
      f'-without-top-{disabled}' if disabled else '',
    )
    return read_json(path)

  def swept_results(self, row: Row) -> dict[Point, float]:
    """Returns bits per byte on `eval.split` of the points that are finished."""
    found = {}
    for point in compare.points(self.swept):
      run = self.run_of(row, point, self.seeds[0])
      result = self.result_of(run, row.config.eval.split)
      if result:
        found[point] = result['bits_per_byte']
    return found

  def best(self, row: Row) -> Point | None:
    """Returns the point of a row's best result; None while any is missing.

    A point that failed is not missing. Without a sweep it is the empty point.
    """
    if not self.swept:
      return ()
    found = self.swept_results(row)
    for point in compare.points(self.swept):
      run = self.run_of(row, point, self.seeds[0])
      if point not in found and run.workdir not in self.failed:
        return None
    # What is no number is the best of all for `min`, where it comes first.
    finite = {each: bits for each, bits in found.items() if math.isfinite(bits)}
    return min(finite or found, key=found.__getitem__, default=None)

  def sweeps(self) -> list[Run]:
    """Returns the runs that tell which swept values are best."""
    if not self.swept:
      return []
    return [
      self.run_of(row, point, self.seeds[0])
      for point in compare.points(self.swept)
      for row in self.rows
    ]

  def finals(self) -> list[Run]:
    """Returns the runs that are compared, as far as it is known which."""
    best = {row.variant: self.best(row) for row in self.rows}
    return [
      self.run_of(row, point, seed)
      for seed in self.seeds
      for row in self.rows
      if (point := best[row.variant]) is not None
    ]

  def splits(self, run: Run) -> list[str]:
    """Returns the splits that a run is evaluated on."""
    wanted = [self.split]
    if self.swept and run.seed == self.seeds[0]:
      wanted.append(run.row.config.eval.split)
    return list(dict.fromkeys(wanted))

  def missing(self, runs_: Sequence[Run]) -> list[Run]:
    """Returns those of the runs that are not finished."""
    return [
      run
      for run in runs_
      if any(self.result_of(run, split) is None for split in self.splits(run))
    ]

  def result(self) -> dict[str, Any]:
    """Returns what compare.json holds, from the files of the runs."""
    values = {row.variant: self._runs(row) for row in self.rows}
    scores = {
      variant: {run['seed']: run['bits_per_byte'] for run in found}
      for variant, found in values.items()
    }
    return {
      'format': runs.COMPARISON_FORMAT,
      'config': self.argument,
      'overrides': dict(self.overrides),
      'baseline': self.baseline,
      'match': self.match,
      'metric': 'bits_per_byte',
      'split': self.split,
      'seeds': self.seeds,
      'sweep': self._sweep(),
      'jobs': self.jobs,
      'rows': [
        {
          'variant': row.variant,
          'about': row.about,
          'changes': dict(row.changes),
          **row.sizes._asdict(),
          'matched': dict(row.matched) if row.matched else None,
          'swept': self._swept(row),
          'runs': values[row.variant],
          'failed': self._failures(row),
          **summarise(
            scores[row.variant],
            None if row.variant == self.baseline else scores[self.baseline],
          ),
        }
        for row in self.rows
      ],
    }

  def write(self) -> dict[str, Any]:
    """Writes compare.json and returns what it holds."""
    result = self.result()
    path = os.path.join(self.workdir, FILE)
    text = strict_json.dumps(result, indent=2) + '\n'
    disk.retried(path, lambda: files.replace(path, text))
    return result

  def _runs(self, row: Row) -> list[dict[str, Any]]:
    """Returns what compare.json says of the finished runs of a row."""
    point = self.best(row)
    if point is None:
      return []
    found = []
    for seed in self.seeds:
      run = self.run_of(row, point, seed)
      result = self.result_of(run, self.split)
      if result is None:
        continue
      workdir = os.path.join(self.workdir, run.workdir)
      steps = run.value('train.steps')
      tokens = run.value('train.batch_size') * run.value('data.seq_len')
      found.append(
        {
          'seed': seed,
          'workdir': run.workdir,
          'bits_per_byte': result['bits_per_byte'],
          'loss': result['loss'],
          'steps': steps,
          'tokens': steps * tokens,
          'seconds': runs.training_seconds(workdir, tokens),
        }
      )
    return found

  def _failures(self, row: Row) -> list[dict[str, Any]]:
    """Returns the seeds of a row that failed, with their errors."""
    planned = [
      self.run_of(row, point, seed)
      for point in compare.points(self.swept)
      for seed in self.seeds
    ]
    return [
      {
        'seed': run.seed,
        'workdir': run.workdir,
        'error': self.failed[run.workdir],
      }
      for run in planned
      if run.workdir in self.failed
    ]

  def _sweep(self) -> dict[str, Any] | None:
    """Returns the swept key and its values; of several keys, their grid."""
    if not self.swept:
      return None
    values = [_plain(point) for point in compare.points(self.swept)]
    return {'key': ','.join(self.swept), 'values': values}

  def _swept(self, row: Row) -> dict[str, Any] | None:
    """Returns what the sweep found of a row."""
    if not self.swept:
      return None
    best, found = self.best(row), self.swept_results(row)
    return {
      'value': None if best is None else _plain(best),
      'results': {compare.as_text(point): found[point] for point in found},
      'edge': [] if best is None else compare.at_edge(self.swept, best),
    }


def summarise(
  values: Mapping[int, float], baseline: Mapping[int, float] | None
) -> dict[str, Any]:
  """Returns the statistics of a row, as compare.json has them.

  Args:
    values: The result of every finished seed.
    baseline: Those of the baseline; None of the baseline itself.

  Returns:
    `mean`; the sample `deviation`; over the seeds that both have the mean of
    the paired differences, `difference`, its 95 % `interval` of Student's t
    and the two-sided `p_value`. What too few seeds leave undefined is None;
    so is the p-value of differences that are all alike.
  """
  found: dict[str, Any] = {
    'mean': statistics.fmean(values.values()) if values else None,
    'deviation': (
      statistics.stdev(values.values()) if len(values) > 1 else None
    ),
    'difference': None,
    'interval': None,
    'p_value': None,
  }
  others = baseline or {}
  paired = [values[seed] - others[seed] for seed in values if seed in others]
  if not paired:
    return found
  found['difference'] = mean = statistics.fmean(paired)
  if len(paired) < 2:
    return found
  error = statistics.stdev(paired) / math.sqrt(len(paired))
  half = float(stats.t.ppf(0.975, len(paired) - 1)) * error
  found['interval'] = [mean - half, mean + half]
  if error:
    tail = stats.t.sf(abs(mean) / error, len(paired) - 1)
    found['p_value'] = 2 * float(tail)
  return found


def read(workdir: str) -> dict[str, Any]:
  """Returns what DIR/compare.json holds; nothing if there is none.

  Raises:
    UserError: It cannot be read, or is not of this version.
  """
  path = os.path.join(workdir, FILE)
  found = read_json(path)
  if found is None:
    return {}
  if (
    not isinstance(found, dict) or found.get('format') != runs.COMPARISON_FORMAT
  ):
    raise UserError(
      f'{path} is not of a comparison that this version knows; move it away,'
      ' or choose another --workdir'
    )
  return found


def read_json(path: str) -> dict[str, Any] | None:
  """Returns the object that a file holds; None if there is no such file.

  Raises:
    UserError: It cannot be read.
  """
  try:
    return strict_json.decoded(files.read_json(path))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {error}') from error


def folder(text: str) -> str:
  """Returns a variant or assignments as the name of a folder."""
  # A value may be a path.
  return re.sub(r'[^\w.+=,-]', '_', text)


def _plain(point: Point) -> Value | list[Value]:
  """Returns the value of one swept key, or the list of several."""
  return point[0] if len(point) == 1 else list(point)
