"""Evaluates a checkpoint of a run, and leaves what was found beside it."""

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from moe_jax import disk, evaluation, files, strict_json
from moe_jax.config.conflicts import check_disabled
from moe_jax.config.evaluations import asked, of_split
from moe_jax.evaluation import Evaluation, Result
from moe_jax.evaluation.robustness import Robustness, table
from moe_jax.parallel import multihost
from moe_jax.training import state, terminal
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.run_dir import RunDir
from moe_jax.training.state import Setup
from moe_jax.training.watchdog import Watchdog

T = TypeVar('T')

_SECONDS = 5.0  # between two lines of progress


def evaluate(
  config: ConfigDict,
  workdir: str,
  step: int | None = None,
  split: str | None = None,
) -> dict[str, dict[str, float]]:
  """Evaluates a checkpoint on a whole split, on any mesh.

  Prints a table, and writes DIR/evaluation/SPLIT-STEP.json for every result;
  with `eval.disable_top` = r, SPLIT-STEP-without-top-r.json.

  Args:
    config: The config that the run was made with; keys of the mesh and of
      evaluation may differ.
    workdir: The directory of the run.
    step: The step of the checkpoint; None for the newest.
    split: The split of the data; None for `eval.split`, or what an entry of
      `eval.evaluations` says.

  Returns:
    The metrics of every result, by its name, with `step`.

  Raises:
    UserError: Anything is wrong with config, data, workdir or step.
  """

  def make(setup: Setup) -> list[Evaluation]:
    opened = evaluation.make(setup, of_split(asked(config), split))
    return [each.evaluate for each in opened]

  results, step = evaluated(config, workdir, step, make)
  rows: dict[str, dict[str, float]] = {
    result.name: {'step': step} | result.metrics for result in results
  }
  if multihost.is_main_process():
    print(terminal.results_table(rows))
    for name, row in rows.items():
      if 'loss' in row and not math.isfinite(row['loss']):
        print(terminal.not_finite(name, row['loss'], step))
    for result in results:
      if result.text:
        print(result.text)
      print(f'written to {_write(result, workdir, step)}')
  return rows


def robustness(
  configs: Mapping[str, ConfigDict],
  disable_top: Sequence[int],
  step: int | None = None,
  split: str | None = None,
) -> dict[str, list[Result]]:
  """Evaluates checkpoints without the best experts of every token.

  Prints one table, and writes what `evaluate` writes with `eval.disable_top`,
  with the metrics of every part of the model as `parts`.

  Args:
    configs: The config of every run by its directory, as in `evaluate`.
    disable_top: Every number of experts to disable; see `Robustness`.
    step: As in `evaluate`.
    split: As in `evaluate`.

  Returns:
    The results of every run, by its directory and the step.

  Raises:
    UserError: As `evaluate`, or a model has too few experts. The table of those
      before it is printed.
  """
  for workdir, config in configs.items():
    check_disabled(config, f'{workdir}: --disable_top', max(disable_top))
  found: dict[str, list[Result]] = {}
  try:
    for number, (workdir, config) in enumerate(configs.items(), start=1):
      of_split = split or config.eval.split
      _say(f'checkpoint {number} of {len(configs)}: {workdir}, {of_split}')

      def make(setup: Setup, of_split: str = of_split) -> list[Evaluation]:
        return [Robustness(setup, of_split, disable_top, True, _progress())]

      results, at = evaluated(config, workdir, step, make)
      found[f'{workdir} step {at}'] = results
      for result in results:
        if multihost.is_main_process():
          print(f'written to {_write(result, workdir, at)}')
  finally:  # what is found is not lost with a run that is broken
    if found:
      _say(
        'loss (nats per token) and perplexity with the best experts of every'
        ' token disabled\n' + terminal.summary_table(table(found, disable_top))
      )
  return found


def evaluated(
  config: ConfigDict,
  workdir: str,
  step: int | None,
  make: Callable[[Setup], Sequence[Callable[[Any], Iterable[T]]]],
) -> tuple[list[T], int]:
  """Evaluates a checkpoint of a run; all processes call this alike.

  Args:
    config: As in `evaluate`.
    workdir: As in `evaluate`.
    step: As in `evaluate`.
    make: Makes the evaluations of a setup; each is called with the parameters.

  Returns:
    What all evaluations return, and the step of the checkpoint.

  Raises:
    UserError: As `evaluate`.
  """
  setup = state.from_config_together(config, workdir)
  run = RunDir.existing(workdir, config)
  with (
    Watchdog(config.train.watchdog, config.train.watchdog_exit),
    Checkpointer(run, setup.vocabulary) as checkpointer,
  ):
    evaluations = multihost.first_process_first(lambda: make(setup))
    wanted = {'params': setup.abstract['params']}
    restored = checkpointer.restore(wanted, step)
    params = restored.state['params']
    results = [
      result for evaluate in evaluations for result in evaluate(params)
    ]
  return results, restored.step


def _progress() -> Callable[[int, int], None]:
  """Returns what tells every few seconds how many evaluations are done."""
  began = last = time.monotonic()

  def tell(done: int, total: int) -> None:
    nonlocal last
    now = time.monotonic()
    if not done:
      _say(f'{total} evaluations of the split')
    elif now - last >= _SECONDS:
      last = now
      left = terminal.duration((now - began) / done * (total - done))
      _say(f'{done} of {total} evaluations done, {left} left')

  return tell


def _say(text: str) -> None:
  """Prints on one of all processes."""
  if multihost.is_main_process():
    print(text, flush=True)


def result_path(workdir: str, split: str, step: int, variant: str = '') -> str:
  """Returns the file that the result of a checkpoint is written to.

  Args:
    workdir: The directory of the run.
    split: The split of the result.
    step: The step of the checkpoint.
    variant: That of the result, '' for the usual evaluation.
  """
  name = re.sub(r'[^\w.+-]', '_', split)
  return os.path.join(workdir, 'evaluation', f'{name}-{step}{variant}.json')


def _write(result: Result, workdir: str, step: int) -> str:
  """Writes a result as JSON and returns its path."""
  path = result_path(workdir, result.split, step, result.variant)
  row = {'split': result.split, 'step': step} | result.written
  if result.parts:
    row['parts'] = result.parts
  write(path, strict_json.dumps(row))
  return path


def write(path: str, text: str) -> None:
  """Writes what was found of a checkpoint, whole or not at all."""

  def try_to() -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    files.replace(path, f'{text}\n')

  disk.retried(path, try_to)
