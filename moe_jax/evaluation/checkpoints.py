"""Evaluates a checkpoint of a run, and leaves what was found beside it."""

import math
import os
import re

from ml_collections import ConfigDict

from moe_jax import disk, evaluation, files, strict_json
from moe_jax.config.evaluations import asked, of_split
from moe_jax.evaluation import Result
from moe_jax.parallel import multihost
from moe_jax.training import state, terminal
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.run_dir import RunDir
from moe_jax.training.watchdog import Watchdog


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
  setup = multihost.first_process_first(
    lambda: state.from_config(config, workdir)
  )
  run = RunDir.existing(workdir, config)
  with (
    Watchdog(config.train.watchdog, config.train.watchdog_exit),
    Checkpointer(run, setup.vocabulary) as checkpointer,
  ):
    evaluations = multihost.first_process_first(
      lambda: evaluation.make(setup, of_split(asked(config), split))
    )
    wanted = {'params': setup.abstract['params']}
    restored = checkpointer.restore(wanted, step)
    params, step = restored.state['params'], restored.step
    results = [
      result for each in evaluations for result in each.evaluate(params)
    ]
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

  def write() -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    files.replace(path, strict_json.dumps(row) + '\n')

  disk.retried(path, write)
  return path
