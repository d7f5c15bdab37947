"""Evaluates a checkpoint of a run, or those of several.

  moe_jax eval --workdir=runs/quickstart
  moe_jax eval runs/a runs/b --disable_top=0,1,2

The config is the run's own; --config.KEY=VALUE changes what may be changed. In
a clone, `python eval.py` is the same program.

  moe_jax eval --workdir=runs/quickstart --tasks=hellaswag,lambada_openai

asks lm-evaluation-harness instead: tasks, groups and tags of it, files of YAML,
or the suites rmoe_paper and cartesian_paper. Its table is printed, and its JSON
is left in DIR/evaluation/tasks-STEP.json.
"""

import math
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli, files
from moe_jax.config.evaluations import counts
from moe_jax.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
  """Defines what of a checkpoint to evaluate: a split of its data, or tasks."""
  define_checkpoint_flags(values)
  flags.DEFINE_string(
    'disable_top',
    None,
    "how many of each token's best experts to disable, such as 0,1,2: in all"
    ' MoE layers and sub-layers and in each of them, instead of the usual'
    ' evaluation',
    flag_values=values,
  )
  for name, about in (
    ('tasks', 'tasks of lm-evaluation-harness, with commas between'),
    ('include_path', 'a folder with tasks of yours, in files of YAML'),
  ):
    flags.DEFINE_string(name, None, about, flag_values=values)
  flags.DEFINE_integer(
    'num_fewshot',
    None,
    'the examples before each question; those of the task if left out',
    lower_bound=0,
    flag_values=values,
  )
  flags.DEFINE_float(
    'limit',
    None,
    'the most documents of a task, or below 1 a share of them, for a trial',
    flag_values=values,
  )
  for name, about in (
    ('log_samples', 'write every document and answer, too'),
    ('apply_chat_template', 'put questions as instructions were in training'),
  ):
    flags.DEFINE_boolean(name, False, about, flag_values=values)


def define_checkpoint_flags(values: flags.FlagValues) -> None:
  """Defines the flags of training, and which checkpoint and data to take."""
  cli.define_process_flags(values)
  flags.DEFINE_integer(
    'step',
    None,
    'the step of the checkpoint; the newest if left out',
    flag_values=values,
  )
  flags.DEFINE_string(
    'split',
    None,
    'the split of the data; eval.split if left out',
    flag_values=values,
  )


def run(
  configs: dict[str, ConfigDict],
  step: int | None,
  split: str | None,
  disable_top: str | None,
  tasks: str | None,
  include_path: str | None,
  num_fewshot: int | None,
  limit: float | None,
  log_samples: bool,
  apply_chat_template: bool,
  **place: Any,
) -> None:
  """Evaluates the checkpoint of `step` in every workdir, on `split` or tasks.

  Raises:
    UserError: Flags of both are given, or anything is wrong with one.
  """
  of_tasks: dict[str, Any] = {
    'include_path': files.expand(include_path or ''),
    'num_fewshot': num_fewshot,
    'limit': limit,
    'log_samples': log_samples,
    'apply_chat_template': apply_chat_template,
  }
  _check(tasks, split, disable_top, of_tasks)
  disabled = None
  if disable_top is not None:
    disabled = counts('--disable_top', disable_top, least=0)
  # jax must not be imported before the command line has set the allocator.
  from moe_jax.evaluation import checkpoints, task_scores
  from moe_jax.parallel import launch

  with launch.joined(**place):
    if disabled is not None:
      checkpoints.robustness(configs, disabled, step=step, split=split)
      return
    for workdir, config in configs.items():
      if tasks is None:
        checkpoints.evaluate(config, workdir, step=step, split=split)
        continue
      options = task_scores.TaskOptions(tasks, **of_tasks)
      task_scores.evaluate(config, workdir, options, step)


def _check(
  tasks: str | None,
  split: str | None,
  disable_top: str | None,
  of_tasks: dict[str, Any],
) -> None:
  """Refuses flags that nothing would heed, and a limit that is none."""
  if tasks is None:
    for name, value in of_tasks.items():
      if value not in (None, '', False):
        raise UserError(f'--{name} is for tasks: name some, as --tasks=NAME')
    return
  if split is not None:
    raise UserError(
      f'--split = {split!r} is of the data of the run, and --tasks have splits'
      ' of their own: leave one out'
    )
  if disable_top is not None:
    raise UserError(
      f'--disable_top = {disable_top!r} evaluates the data of the run; for'
      ' --tasks without the best experts set --config.eval.disable_top=1'
    )
  limit = of_tasks['limit']
  if limit is not None and not 0 < limit < math.inf:
    raise UserError(f'--limit = {limit} must be a number above 0')


def main() -> None:
  """Evaluates as the command line says, and exits."""
  cli.main_of_runs(run, define_flags, one=True)
