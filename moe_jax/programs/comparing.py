"""Carries a comparison out: plans its runs, trains them, tells of them."""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moe_jax.analysis import compare, compare_table, comparison
from moe_jax.analysis.comparison import Comparison, Run
from moe_jax.config import loading
from moe_jax.config.keys import Value
from moe_jax.data import mixtures
from moe_jax.errors import UserError, choose
from moe_jax.programs import pool
from moe_jax.training import lock, run_dir, terminal
from moe_jax.training.run_dir import RunDir


def run(workdir: str, jobs: int | None, dry_run: bool, **what: Any) -> None:
  """Compares in `workdir`; the arguments are the flags by their names.

  Args:
    workdir: The directory of the comparison.
    jobs: How many runs are trained side by side; None chooses.
    dry_run: Whether to tell what would be trained, and to stop.
    **what: What is compared: the arguments of `_plan`.

  Raises:
    UserError: Anything is wrong with them, before anything is trained.
    RetryableError: Another comparison works in the directory.
    SystemExit: 1 if a run failed; 128 + the number of the signal that stopped
      the comparison.
  """
  run_dir.refuse_url(workdir)
  if loading.holds_run(workdir):
    raise UserError(
      f'workdir {workdir} is that of a run; give a comparison a --workdir of'
      ' its own'
    )
  # Nothing is computed here, and the runs need the memory of their devices.
  jax.config.update('jax_platforms', 'cpu')
  with contextlib.nullcontext() if dry_run else lock.held(workdir):
    earlier = comparison.read(workdir)
    made = _plan(earlier, workdir, **what)
    _refuse_changes(made, earlier)
    most = len(made.rows) * len(made.seeds)
    shares = pool.shares(earlier.get('jobs') if jobs is None else jobs, most)
    made.jobs = len(shares)
    print(_announcement(made), flush=True)
    if dry_run:
      return
    _check_splits(made)
    made.write()
    stopped = _carry_out(made, shares)
    result = made.write()
  if stopped is not None:
    print('stopped; the same command goes on', flush=True)
    raise SystemExit(128 + stopped)
  print(f'\n{compare_table.table(result)}')
  print(f'written to {os.path.join(workdir, comparison.FILE)}')
  if any(row['runs'] for row in result['rows']):
    _report(workdir)
  if made.failed:
    raise SystemExit(1)


def _report(workdir: str) -> None:
  """Writes DIR/report.html, or tells why not: the comparison is done."""
  try:
    from moe_jax.analysis import report
  except UserError as error:
    print(f'without a report: {error}')
    return
  report.main([workdir])


def _plan(
  earlier: Mapping[str, Any],
  workdir: str,
  config: str | None,
  overrides: dict[str, Value],
  variants: str | None,
  seeds: str,
  baseline: str | None,
  match: str | None,
  split: str | None,
  sweep: Sequence[str],
) -> Comparison:
  """Returns the comparison of the flags and of what the directory has."""
  if config is None:
    if not earlier:
      raise UserError(
        '--config is missing: the config file whose variants are compared'
      )
    config, overrides = earlier['config'], earlier['overrides'] | overrides
  match = choose(
    '--match', match or earlier.get('match', 'none'), compare.MATCHES
  )
  swept = compare.sweep(sweep)
  for key in {'seed', *swept} & {*overrides}:
    flag = '--seeds' if key == 'seed' else '--sweep'
    raise UserError(f'--config.{key} contradicts {flag}; leave one of them out')
  kept = _kept(earlier, workdir)
  given = compare.names(config, variants or '') if variants or not kept else []
  named = list(dict.fromkeys([*given, *kept]))
  baseline = baseline or earlier.get('baseline') or named[0]
  if baseline not in named:
    named.insert(0, baseline)
  found = compare.rows(config, overrides, named)
  [base] = [row for row in found if row.variant == baseline]
  all_seeds = {seed for row in kept.values() for seed in row}
  all_seeds.update(_seeds(seeds))
  # A sweep was made with the first, which stays the first when one is added.
  first = earlier['seeds'][:1] if earlier.get('sweep') else []
  return Comparison(
    workdir,
    config,
    overrides,
    compare.match(found, base, match),
    baseline,
    match,
    [*first, *sorted(all_seeds.difference(first))],
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
    if os.path.isdir(os.path.join(workdir, comparison.folder(row['variant']))):
      found[row['variant']] = [run['seed'] for run in row['runs']]
  return found


def _refuse_changes(made: Comparison, earlier: Mapping[str, Any]) -> None:
  """Refuses what would make rows incomparable with those that there are.

  Raises:
    UserError: The message names the flag or the key.
  """
  if earlier:
    swept = (earlier['sweep'] or {}).get('key', '')
    for flag, before, now in (
      ('--match', earlier['match'], made.match),
      ('--sweep', swept, ','.join(made.swept)),
    ):
      if before != now:
        raise UserError(
          f'workdir {made.workdir} was begun with {flag} of {before or "none"},'
          f' now {now or "none"}, and rows would not be comparable; give the'
          ' old value or another --workdir'
        )
  for row in made.rows:
    for point in compare.points(made.swept):
      for seed in made.seeds:
        planned = made.run_of(row, point, seed)
        RunDir.new_or_resumed(
          os.path.join(made.workdir, planned.workdir),
          compare.changed(row.config, planned.values),
        )


def _check_splits(made: Comparison) -> None:
  """Opens what the runs will be evaluated on, which training need not read.

  Raises:
    UserError: A split is not there.
  """
  [base] = [row for row in made.rows if row.variant == made.baseline]
  point = compare.points(made.swept)[0]
  for split in made.splits(made.run_of(base, point, made.seeds[0])):
    mixtures.open_documents(base.config.data, split)


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


def _job(made: Comparison, planned: Run) -> pool.Job:
  """Returns the programs that train a run and evaluate it."""
  workdir = os.path.join(made.workdir, planned.workdir)
  os.makedirs(workdir, exist_ok=True)
  keys = [f'--config.{key}={value}' for key, value in planned.values.items()]
  train = ['train', f'--config={planned.row.argument}', *keys]
  # The evaluation that the table is about, whatever else training evaluates.
  evaluate = ['eval', '--config.eval.evaluations=perplexity']
  commands = [train]
  commands += [
    [*evaluate, f'--split={split}'] for split in made.splits(planned)
  ]
  return pool.Job(
    planned.workdir,
    [[*command, f'--workdir={workdir}'] for command in commands],
    os.path.join(workdir, 'log.txt'),
  )


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
    for job, error in self._programs.run([_job(made, run) for run in missing]):
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
    return f'{_counted(runs_left, "run")} left{left}'


def _announcement(made: Comparison) -> str:
  """Returns the rows with their sizes, and how much there is to do."""
  [base] = [row for row in made.rows if row.variant == made.baseline]
  sweeps, finals = made.sweeps(), made.finals()
  missing = made.missing([*sweeps, *finals])
  seeds = ', '.join(map(str, made.seeds))
  lines = [
    compare_table.sizes_table(made.rows, base),
    '',
    f'{_counted(len(made.rows), "variant")},'
    f' {_counted(len(made.seeds), "seed")} ({seeds}), compared with'
    f' {made.baseline} on {made.split}',
  ]
  if sweeps:
    grid = ', '.join(
      f'{key} of {", ".join(map(str, values))}'
      for key, values in made.swept.items()
    )
    lines.append(f'first with seed {made.seeds[0]}: the best {grid}')
  lines.append(
    f'{_counted(len(missing), "run")} to do now, {made.jobs} side by side;'
    f' their output is in {made.workdir}/VARIANT/seed-S/log.txt'
  )
  return '\n'.join(lines)


def _counted(number: int, noun: str) -> str:
  """Returns `1 run` or `2 runs`."""
  return f'{number} {noun}' if number == 1 else f'{number} {noun}s'
