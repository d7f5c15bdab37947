"""Carries a comparison out: runs side by side, and what was found of them.

What DIR/compare.json says follows from the files of the runs, so a comparison
that was killed loses nothing but the steps since the last checkpoints.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from moe_jax.analysis import compare, runs
from moe_jax.analysis.compare import Overrides, Point, Row
from moe_jax.config.keys import Value
from moe_jax.errors import UserError, choose
from moe_jax.evaluation import checkpoints
from moe_jax.programs import pool
from moe_jax.training import run_dir, terminal
from moe_jax.training.run_dir import RunDir

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
  failed: dict[str, str] = dataclasses.field(default_factory=dict)

  def run_of(self, row: Row, point: Point, seed: int) -> Run:
    """Returns the run of a row with these swept values and this seed."""
    swept = dict(zip(self.swept, point, strict=True))
    folder = ','.join(f'{key}={value}' for key, value in swept.items())
    parts = [row.variant, *([folder] if folder else []), f'seed-{seed}']
    matched = row.matched or {}
    values = {**self.overrides, **matched, **swept, 'seed': seed}
    return Run(row, point, seed, '/'.join(parts), values)

  def result_of(self, run: Run, split: str) -> dict[str, Any] | None:
    """Returns what was found of a finished run on a split; None before."""
    config = run.row.config
    disabled = config.eval.disable_top
    path = checkpoints.result_path(
      os.path.join(self.workdir, run.workdir),
      split,
      config.train.steps,
      f'-without-top-{disabled}' if disabled else '',
    )
    return _read_json(path)

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
    return min(found, key=found.__getitem__) if found else None

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

  def job(self, run: Run) -> pool.Job:
    """Returns the programs that train a run and evaluate it."""
    workdir = os.path.join(self.workdir, run.workdir)
    os.makedirs(workdir, exist_ok=True)
    keys = [f'--config.{key}={value}' for key, value in run.values.items()]
    train = [
      'train',
      f'--config={run.row.argument}',
      f'--workdir={workdir}',
      *keys,
    ]
    evaluate = ['eval', f'--workdir={workdir}']
    # The one that the table is about, whatever else training evaluates.
    evaluate.append('--config.eval.evaluations=perplexity')
    return pool.Job(
      run.workdir,
      [
        train,
        *([*evaluate, f'--split={split}'] for split in self.splits(run)),
      ],
      os.path.join(workdir, 'log.txt'),
    )

  def result(self) -> dict[str, Any]:
    """Returns what compare.json holds, from the files of the runs."""
    values = {row.variant: self._runs(row) for row in self.rows}
    scores = {
      variant: {run['seed']: run['bits_per_byte'] for run in found}
      for variant, found in values.items()
    }
    return {
      'format': 1,
      'config': self.argument,
      'overrides': dict(self.overrides),
      'baseline': self.baseline,
      'match': self.match,
      'metric': 'bits_per_byte',
      'split': self.split,
      'seeds': self.seeds,
      'sweep': self._sweep(),
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
          **compare.summarise(
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
    run_dir.replace(path, json.dumps(result, indent=2) + '\n')
    return result

  def _runs(self, row: Row) -> list[dict[str, Any]]:
    """Returns what compare.json says of the finished runs of a row."""
    point = self.best(row)
    if point is None:
      return []
    config = row.config
    tokens_per_step = config.train.batch_size * config.data.seq_len
    found = []
    for seed in self.seeds:
      run = self.run_of(row, point, seed)
      result = self.result_of(run, self.split)
      if result is None:
        continue
      workdir = os.path.join(self.workdir, run.workdir)
      found.append(
        {
          'seed': seed,
          'workdir': run.workdir,
          'bits_per_byte': result['bits_per_byte'],
          'loss': result['loss'],
          'steps': config.train.steps,
          'tokens': config.train.steps * tokens_per_step,
          'seconds': runs.training_seconds(workdir, tokens_per_step),
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


def run(
  workdir: str,
  config: str | None,
  overrides: dict[str, Value],
  variants: str | None,
  seeds: str,
  baseline: str | None,
  match: str,
  split: str | None,
  sweep: Sequence[str],
  jobs: int | None,
  dry_run: bool,
) -> None:
  """Compares in `workdir`; the arguments are the flags by their names.

  Raises:
    UserError: Anything is wrong with them, before anything is trained.
    SystemExit: 1 if a run failed; 128 + the number of the signal that stopped
      the comparison.
  """
  run_dir.refuse_url(workdir)
  # Nothing is computed here, and the runs need the memory of their devices.
  jax.config.update('jax_platforms', 'cpu')
  shares = pool.shares(jobs)
  with contextlib.nullcontext() if dry_run else _claimed(workdir):
    earlier = _read_json(os.path.join(workdir, FILE)) or {}
    made = _plan(
      earlier,
      workdir,
      config,
      overrides,
      variants,
      seeds,
      baseline,
      match,
      split,
      sweep,
    )
    _refuse_changes(made, earlier)
    print(_announcement(made, len(shares)), flush=True)
    if dry_run:
      return
    made.write()
    stopped = _carry_out(made, shares)
    result = made.write()
  if stopped is not None:
    print('stopped; the same command goes on', flush=True)
    raise SystemExit(128 + stopped)
  print(f'\n{compare.table(result)}')
  print(f'written to {os.path.join(workdir, FILE)}')
  if made.failed:
    raise SystemExit(1)


def _plan(
  earlier: Mapping[str, Any],
  workdir: str,
  config: str | None,
  overrides: dict[str, Value],
  variants: str | None,
  seeds: str,
  baseline: str | None,
  match: str,
  split: str | None,
  sweep: Sequence[str],
) -> Comparison:
  """Returns the comparison of the flags and of what the directory has."""
  if config is None:
    raise UserError(
      '--config is missing: the config file whose variants are compared'
    )
  choose('--match', match, compare.MATCHES)
  swept = compare.sweep(sweep)
  for key in {'seed', *swept} & {*overrides}:
    flag = '--seeds' if key == 'seed' else '--sweep'
    raise UserError(f'--config.{key} contradicts {flag}; leave one of them out')
  kept = _kept(earlier, workdir)
  named = list(kept)
  if variants or not named:
    named += compare.names(config, variants or '')
  baseline = baseline or earlier.get('baseline') or named[0]
  named = list(dict.fromkeys(named))
  if baseline not in named:
    named.insert(0, baseline)
  found = compare.rows(config, overrides, named)
  [base] = [row for row in found if row.variant == baseline]
  all_seeds = {seed for row in kept.values() for seed in row}
  return Comparison(
    workdir,
    config,
    overrides,
    compare.match(found, base, match),
    baseline,
    match,
    sorted(all_seeds | set(_seeds(seeds))),
    swept,
    split or base.config.eval.split,
  )


def _seeds(text: str) -> list[int]:
  """Returns the seeds that --seeds names.

  Raises:
    UserError: It is neither a number of seeds nor a list of them.
  """
  try:
    given = [int(seed) for seed in text.split(',') if seed.strip()]
  except ValueError:
    given = []
  if not given or min(given) < 0 or (',' not in text and given == [0]):
    raise UserError(
      f'--seeds={text} must be how many seeds, such as 3, or a list of them,'
      ' such as 3,7,11'
    )
  return given if ',' in text else list(range(given[0]))


def _kept(earlier: Mapping[str, Any], workdir: str) -> dict[str, list[int]]:
  """Returns the seeds of the rows that the directory has runs of, by variant.

  Who removes DIR/VARIANT removes the row.
  """
  found = {}
  for row in earlier.get('rows', []):
    if os.path.isdir(os.path.join(workdir, row['variant'])):
      found[row['variant']] = [run['seed'] for run in row['runs']]
  return found


def _refuse_changes(made: Comparison, earlier: Mapping[str, Any]) -> None:
  """Refuses what would make rows incomparable with those that there are.

  Raises:
    UserError: The message names the flag or the key.
  """
  if earlier and made.match != earlier['match']:
    raise UserError(
      f'workdir {made.workdir} has --match={earlier["match"]}, now'
      f' {made.match}: rows of other sizes; give the old value or another'
      ' --workdir'
    )
  for row in made.rows:
    for point in compare.points(made.swept):
      for seed in made.seeds:
        planned = made.run_of(row, point, seed)
        config = compare.changed(
          row.config,
          {**dict(zip(made.swept, point, strict=True)), 'seed': seed},
        )
        path = os.path.join(made.workdir, planned.workdir)
        RunDir.new_or_resumed(path, config)


def _carry_out(made: Comparison, shares: Sequence[pool.Share]) -> int | None:
  """Runs what is missing; returns the signal that stopped it, if one did."""
  cache = os.path.abspath(os.path.join(made.workdir, '.cache'))
  # Seeds of a variant are one program: later ones need not compile it.
  env = {
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
  }
  env = {name: text for name, text in env.items() if name not in os.environ}
  with pool.Pool(shares, env) as programs:
    progress = _Progress(made, programs)
    progress.through(made.missing(made.sweeps()))
    if programs.signal is None:
      progress.through(made.missing(made.finals()))
    return programs.signal


class _Progress:
  """Carries runs out and tells of each as it starts and ends."""

  def __init__(self, made: Comparison, programs: pool.Pool) -> None:
    self._made = made
    self._programs = programs
    self._began = time.monotonic()
    self._ended = 0

  def through(self, missing: Sequence[Run]) -> None:
    """Carries out these runs, and keeps compare.json up to date."""
    made = self._made
    of_job = {run.workdir: run for run in missing}
    ended = 0
    for job, error in self._programs.run([made.job(run) for run in missing]):
      name = of_job[job.name].name
      if error is None:
        print(f'{name}: started', flush=True)
        continue
      ended += 1
      self._ended += 1
      if error:
        made.failed[job.name] = error
      made.write()
      told = f'failed: {error}' if error else self._told(of_job[job.name])
      left = self._left(len(missing) - ended)
      print(f'{name}: {told}; {left}', flush=True)

  def _told(self, finished: Run) -> str:
    result = self._made.result_of(finished, self._made.splits(finished)[-1])
    assert result is not None  # or its evaluation would have failed
    return f'{result["bits_per_byte"]:.4f} bits per byte'

  def _left(self, runs_left: int) -> str:
    """Returns how many runs are left and about how long they take.

    Runs of a sweep are told of alone: which follow them is not known yet.
    """
    elapsed = time.monotonic() - self._began
    seconds = elapsed / self._ended * runs_left
    left = f', about {terminal.duration(seconds)}' if runs_left else ''
    return f'{runs_left} {"run" if runs_left == 1 else "runs"} left{left}'


def _announcement(made: Comparison, jobs: int) -> str:
  """Returns the rows with their sizes, and how much there is to do."""
  [base] = [row for row in made.rows if row.variant == made.baseline]
  sweeps, finals = made.sweeps(), made.finals()
  missing = made.missing([*sweeps, *finals])
  count = len(made.seeds)
  seeds = ', '.join(map(str, made.seeds))
  lines = [
    compare.sizes_table(made.rows, base),
    '',
    f'{len(made.rows)} variants, {count} {"seed" if count == 1 else "seeds"}'
    f' ({seeds}), compared with {made.baseline} on {made.split}',
  ]
  if sweeps:
    grid = ', '.join(
      f'{key} of {", ".join(map(str, values))}'
      for key, values in made.swept.items()
    )
    lines.append(f'first with seed {made.seeds[0]}: the best {grid}')
  lines.append(
    f'{len(missing)} runs to do now, {jobs} side by side; their output is in'
    f' {made.workdir}/VARIANT/seed-S/log.txt'
  )
  return '\n'.join(lines)


@contextlib.contextmanager
def _claimed(workdir: str) -> Iterator[None]:
  """Holds the directory, which no second comparison may work in meanwhile.

  Raises:
    UserError: Another one does, or the directory cannot be written.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
    file = open(  # noqa: SIM115 (closed below)
      os.path.join(workdir, '.lock'), 'a', encoding='utf-8'
    )
  except OSError as error:
    raise UserError(
      f'workdir {workdir} is not writable: {error.strerror};'
      ' choose another --workdir'
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(
        f'workdir {workdir} is in use by another moe_jax compare; wait for it,'
        ' stop it, or choose another --workdir'
      ) from error
    yield


def _read_json(path: str) -> dict[str, Any] | None:
  """Returns the object that a file holds; None if there is no such file.

  Raises:
    UserError: It cannot be read.
  """
  try:
    with open(path, encoding='utf-8') as file:
      return json.load(file)
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {error}') from error


def _plain(point: Point) -> Value | list[Value]:
  """Returns the value of one swept key, or the list of several."""
  return point[0] if len(point) == 1 else list(point)
