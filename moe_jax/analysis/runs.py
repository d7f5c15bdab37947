"""What a run's directory says: metrics.jsonl as arrays, and what is beside it.

Runs whose configs differ in nothing but the seed are one variant.
"""

import dataclasses
import glob
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.config.derived import flatten
from moe_jax.config.saved import (
  CONFIG_FILE,
  RECORD_FILE,
  ROLLBACK,
  SKIPPED_STEP,
  from_json,
)
from moe_jax.errors import UserError

ANALYSIS_FORMAT = 1  # of analysis/STEP.json
COMPARISON_FORMAT = 1  # of compare.json

_SHARE = 15  # smooth curves are means over a 15th of the points


@dataclasses.dataclass(frozen=True)
class Run:
  """What metrics.jsonl says of one run; P points and W MoE layers.

  Attributes:
    name: The name of the run's directory.
    steps_P: The steps at which training was logged.
    loss_P: The loss there, nats per token.
    max_load_PW: The rows of the busiest expert over the balanced share; W is 0
      for a dense model.
    dropped_PW: The share of the assignments that found no room.
    entropy_PW: The entropy of the routers, nats per token.
    counts_PWSN: The assignments to every expert of every sub-layer; W is 0
      where they were not logged.
    flops_per_token: The operations of training on a token, from the logged
      TFLOP/s of one device; None where they were not logged.
    evaluations: The rows of every evaluation by its split, in order of steps.
  """

  name: str
  steps_P: np.ndarray
  loss_P: np.ndarray
  max_load_PW: np.ndarray
  dropped_PW: np.ndarray
  entropy_PW: np.ndarray
  counts_PWSN: np.ndarray
  flops_per_token: float | None
  evaluations: dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Everything that the directory of a run says.

  Attributes:
    path: The directory.
    run: What its metrics.jsonl says.
    config: Its config.json, by dotted keys; empty without one.
    starts: An entry of run.json for each time that the run was begun or gone
      on with; empty without one.
    analysis: The newest of `analysis/*.json`, as `moe_jax analyze` wrote it;
      None without one.
    evaluations: The rows of `evaluation/*.json`.
  """

  path: str
  run: Run
  config: dict[str, Any]
  starts: list[dict[str, Any]]
  analysis: dict[str, Any] | None
  evaluations: list[dict[str, Any]]

  @property
  def seed(self) -> Any:
    """The seed of the run; None where no config says it."""
    return self.config.get('seed')

  @property
  def tokens_per_step(self) -> int | None:
    """The tokens of a step; None where no config says them."""
    try:
      return self.config['train.batch_size'] * self.config['data.seq_len']
    except KeyError:
      return None

  @property
  def flops_per_token(self) -> float | None:
    """The operations of training on a token, as recorded or as logged."""
    recorded = self.recorded('flops_per_token')
    if recorded is not None:
      return float(recorded)
    logged = self.run.flops_per_token
    try:
      devices = int(self.recorded('devices').split()[0])
    except (AttributeError, ValueError, IndexError):
      devices = 1
    return None if logged is None else logged * devices

  def recorded(self, key: str) -> Any:
    """Returns what run.json says of the newest start; None if it does not."""
    return self.starts[-1].get(key) if self.starts else None


@dataclasses.dataclass(frozen=True)
class Variant:
  """Runs that differ in their seed alone.

  Attributes:
    name: The name of what they have in common.
    runs: The runs, in order of their seeds.
  """

  name: str
  runs: Sequence[Workdir]

  @property
  def analysed(self) -> Workdir | None:
    """The first run that has been analysed; None where none has."""
    return next((run for run in self.runs if run.analysis), None)


def read(workdir: str) -> Run:
  """Reads DIR/metrics.jsonl.

  Lines whose loss is not finite are left out.

  Raises:
    UserError: There is none, or it holds no step of training, or something
      else than metrics.
  """
  path = os.path.join(workdir, 'metrics.jsonl')
  train: list[dict[str, Any]] = []
  evaluations: dict[str, list[dict[str, Any]]] = {}
  for row in _rows(path):
    if row['split'] in (SKIPPED_STEP, ROLLBACK) or not _is_finite(row):
      continue
    # `eval.split` may be the split that training reads.
    if row['split'] == 'train' and 'perplexity' not in row:
      train.append(row)
    else:
      evaluations.setdefault(row['split'], []).append(row)
  if not train:
    raise UserError(f'{path} holds no step of training yet')

  def column(key: str) -> np.ndarray:
    return np.array([row.get(key, []) for row in train], float)

  counts = [row.get('expert_counts', []) for row in train]
  try:
    counts_PWSN = np.array(counts if all(counts) else [], float)
    return Run(
      os.path.basename(os.path.abspath(workdir)),
      column('step'),
      column('loss'),
      column('max_load').reshape(len(train), -1),
      column('dropped_share').reshape(len(train), -1),
      column('router_entropy').reshape(len(train), -1),
      counts_PWSN if counts_PWSN.ndim == 4 else np.zeros((len(train), 0, 0, 0)),
      _flops_per_token(train[-1]),
      evaluations,
    )
  except ValueError as error:
    raise UserError(f'{path} is not of one run: {error}') from error


def _is_finite(row: dict[str, Any]) -> bool:
  """Returns whether a loss can be drawn: a skipped step's is no number."""
  try:
    return math.isfinite(float(row.get('loss', 0.0)))
  except (TypeError, ValueError):
    return True  # as what it is, `read` tells


def read_workdir(workdir: str) -> Workdir:
  """Reads everything that is there of a run.

  Raises:
    UserError: It holds no metrics.jsonl, or a file that cannot be read.
  """
  run = read(workdir)
  config = _read(os.path.join(workdir, CONFIG_FILE), from_json)
  record = _read(os.path.join(workdir, RECORD_FILE), files.parse_json)
  analyses = glob.glob(os.path.join(glob.escape(workdir), 'analysis', '*.json'))
  numbered = [path for path in analyses if _step(path) >= 0]
  newest = max(numbered, key=_step, default='')
  evaluations = os.path.join(glob.escape(workdir), 'evaluation', '*.json')
  return Workdir(
    workdir,
    run,
    flatten(config.to_dict()) if config else {},
    _starts(record),
    _read_analysis(newest) if newest else None,
    [_read(path, files.parse_json) for path in sorted(glob.glob(evaluations))],
  )


def variants(
  workdirs: Iterable[Workdir], names: Iterable[str | None]
) -> list[Variant]:
  """Puts the runs together that differ in their seed alone.

  Runs of the same seed are not put together: something else differs.

  Args:
    workdirs: Runs.
    names: For each the variant of a comparison that it is of, or None: then
      the config, apart from the seed, says which belong together.

  Returns:
    Variants in order of their first runs, each with a name of its own.
  """
  groups: dict[Any, list[Workdir]] = {}
  for workdir, name in zip(workdirs, names, strict=True):
    config = {k: v for k, v in workdir.config.items() if k != 'seed'}
    alone = workdir.path if not config else repr(sorted(config.items()))
    groups.setdefault(name or ('', alone), []).append(workdir)
  found: list[tuple[str, list[Workdir]]] = []
  for key, runs in groups.items():
    if isinstance(key, str):
      found.append((key, runs))
    elif len({run.seed for run in runs}) == len(runs):
      found.append((_common_name(runs), runs))
    else:
      found += [(run.run.name, [run]) for run in runs]
  taken = [name for name, _ in found]
  return [
    Variant(
      name if taken.count(name) == 1 else runs[0].path,
      sorted(runs, key=lambda run: str(run.seed).zfill(12)),
    )
    for name, runs in found
  ]


def smooth(values_P: np.ndarray) -> np.ndarray:
  """Returns centred means over a 15th of the points, over fewer at the ends."""
  width = 2 * (len(values_P) // _SHARE // 2) + 1
  kernel = np.ones(width)
  sums = np.convolve(values_P, kernel)
  counts = np.convolve(np.ones_like(values_P), kernel)
  begin = width // 2
  return (sums / counts)[begin : begin + len(values_P)]


def over_seeds(
  curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns steps, means and deviations of curves at the steps all have.

  Args:
    curves: Steps and values [P] of each seed, steps rising.

  Returns:
    Arrays [P]; the sample standard deviation is 0 of one curve.
  """
  steps_P = curves[0][0]
  for other_P, _ in curves[1:]:
    steps_P = np.intersect1d(steps_P, other_P)
  values = np.array([y[np.isin(x, steps_P)] for x, y in curves])
  deviation_P = (
    values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps_P))
  )
  return steps_P, values.mean(0), deviation_P


def _common_name(runs: Sequence[Workdir]) -> str:
  """Returns the name of the first run, of several without its seed."""
  name = runs[0].run.name
  if len(runs) == 1:
    return name
  return re.sub(r'[-_.]*(seed|s)?[-_.]*\d+$', '', name) or name


def _flops_per_token(row: dict[str, Any]) -> float | None:
  """Returns the operations on a token from the TFLOP/s of one device."""
  try:
    return 1e12 * row['tflops_per_second'] / row['tokens_per_second']
  except (KeyError, TypeError, ZeroDivisionError):
    return None


def _step(path: str) -> int:
  """Returns the step that a file is named by; -1 if it is not."""
  name = os.path.splitext(os.path.basename(path))[0]
  return int(name) if name.isdecimal() else -1


def _starts(record: Any) -> list[dict[str, Any]]:
  """Returns what run.json says of the starts; nothing where it is not ours."""
  starts = record.get('starts') if isinstance(record, dict) else None
  if not isinstance(starts, list):
    return []
  return [start for start in starts if isinstance(start, dict)]


def _read(path: str, parse: Any) -> Any:
  """Returns what `parse` makes of a file; None where there is none."""
  try:
    return parse(files.read_text(path))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {error}') from error


def _read_analysis(path: str) -> Any:
  """Returns what an analysis file holds.

  Raises:
    UserError: It cannot be read, or is not of this version.
  """
  found = _read(path, files.parse_json)
  if not isinstance(found, dict) or found.get('format') != ANALYSIS_FORMAT:
    raise UserError(
      f'{path} is not of an analysis that this version knows; run moe_jax'
      ' analyze again, or remove it'
    )
  return found


def _rows(path: str) -> list[dict[str, Any]]:
  """Returns the objects of a metrics.jsonl, without a last line cut short."""
  try:
    lines = files.read_text(path).splitlines()
  except UnicodeDecodeError as error:
    raise UserError(f'{path} cannot be read: {error}') from error
  except OSError as error:
    raise UserError(
      f'{path} cannot be read: {error.strerror};'
      ' give the --workdir of a training run'
    ) from error
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = files.parse_json(line)
      rows.append({'step': row['step'], 'split': row['split']} | row)
    except (ValueError, TypeError, KeyError) as error:
      if number == len(lines):
        break
      raise UserError(
        f'{path}:{number} is not a JSON object with a step and a split'
      ) from error
  return rows


def training_seconds(workdir: str, tokens_per_step: int) -> float | None:
  """Returns how long the steps of a run took, from their logged speeds.

  Interruptions, evaluations and, but for a logged first step, compilation are
  not in it. It is None where no step was logged.

  Args:
    workdir: The directory of the run.
    tokens_per_step: The tokens of a step.

  Raises:
    UserError: DIR/metrics.jsonl cannot be read.
  """
  seconds, before = 0.0, 0
  for row in _rows(os.path.join(workdir, 'metrics.jsonl')):
    if row['split'] == 'train':
      tokens = (row['step'] - before) * tokens_per_step
      seconds, before = seconds + tokens / row['tokens_per_second'], row['step']
  return seconds or None
