"""Scores of lm-evaluation-harness: of a checkpoint, and while a model trains.

The package `lm_eval` is imported when a task is asked for.
"""

import contextlib
import dataclasses
import datetime
import glob
import importlib.util
import io
import os
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax import strict_json
from moe_jax.data import instructions
from moe_jax.errors import RetryableError, UserError, said
from moe_jax.evaluation import Result, without_top
from moe_jax.evaluation.checkpoints import evaluated, result_path, write
from moe_jax.parallel import multihost
from moe_jax.registry import EVALUATIONS
from moe_jax.training import run_tokenizer
from moe_jax.training.state import Setup

if TYPE_CHECKING:
  from moe_jax.evaluation.harness import CheckpointLM
  from moe_jax.evaluation.tasks import Tasks

# Resamples for the error of a metric that is no mean. lm-eval takes 100,000,
# in processes that it forks, which one that runs jax must not do.
_RESAMPLES = 1000


class TaskOptions(NamedTuple):
  """What is asked of the harness.

  Attributes:
    tasks: Names with commas between; see `tasks.load`.
    include_path: A folder with further tasks; '' for none.
    num_fewshot: The examples before each question; None for the task's own.
    limit: The most documents of a task, or a share of them below 1; None for
      all.
    log_samples: Whether every document and answer is written, too.
    apply_chat_template: Whether questions are put as instructions were in
      training.
  """

  tasks: str
  include_path: str = ''
  num_fewshot: int | None = None
  limit: float | None = None
  log_samples: bool = False
  apply_chat_template: bool = False


@EVALUATIONS.register('tasks')
class TaskScores:
  """Scores of `eval.tasks`, a result for each task, named as it is.

  The metrics are lm-eval's, with the name of the filter behind where there is
  one; with `eval.disable_top`, that as `disabled_top`. Where `max_batches` are
  given, a task has as many documents as these have rows.
  """

  def __init__(self, setup: Setup, split: str) -> None:
    """Reads the data of the tasks, which have splits of their own.

    Raises:
      UserError: There are none, or one is not there.
    """
    del split
    config = setup.config.eval
    check_installed('tasks in eval.evaluations')
    from moe_jax.evaluation import tasks
    from moe_jax.evaluation.harness import CheckpointLM

    self._options = TaskOptions(config.tasks)
    self._disabled = config.disable_top
    self._tasks = tasks.load(
      config.tasks, config.include_path, key='eval.tasks'
    )
    self._model = CheckpointLM(setup, None)

  def __call__(self, params: Any, max_batches: int = 0) -> list[Result]:
    """Returns the metrics of every task and group."""
    self._model.params = params
    limit = max_batches * self._model.batch_size or None
    options = self._options._replace(limit=limit)
    # Bars would cut into the progress of a run.
    with contextlib.redirect_stderr(io.StringIO()):
      found = run_tasks(self._model, self._tasks, options, errors=False)
    self._model.params = None  # which training has a use for
    scores = found['results'] | found.get('groups', {})
    disabled = {'disabled_top': self._disabled} if self._disabled else {}
    return [
      Result(name, disabled | _metrics(row), without_top(self._disabled))
      for name, row in scores.items()
    ]


def evaluate(
  config: ConfigDict,
  workdir: str,
  options: TaskOptions,
  step: int | None = None,
) -> dict[str, Any]:
  """Evaluates a checkpoint on tasks, on any mesh.

  Prints lm-eval's table, and writes its JSON to DIR/evaluation/tasks-STEP.json.
  With samples, these are in samples-TASK-STEP.jsonl, a line for each document.
  What is there already is kept under its date.

  Args:
    config: The config that the run was made with; keys of the mesh and of
      evaluation may differ.
    workdir: The directory of the run.
    options: What is asked of the harness.
    step: The step of the checkpoint; None for the newest.

  Returns:
    lm-eval's results.

  Raises:
    UserError: Anything is wrong with config, workdir, step or tasks, or the
      package is not there.
  """
  check_installed('--tasks')
  from moe_jax.evaluation import tasks
  from moe_jax.evaluation.harness import CheckpointLM

  template = _template(config) if options.apply_chat_template else None
  # A task that is not there is told before a model is made.
  found = multihost.first_process_first(
    lambda: tasks.load(options.tasks, options.include_path, options.num_fewshot)
  )
  multihost.first_process_first(lambda: _check_tokenizer(config, workdir))

  def make(setup: Setup) -> list[Callable[[Any], list[dict[str, Any]]]]:
    model = CheckpointLM(setup, None, template)

    def of(params: Any) -> list[dict[str, Any]]:
      model.params = params
      return [run_tasks(model, found, options, {'path': workdir})]

    return [of]

  [results], step = evaluated(config, workdir, step, make)
  results['config']['model_args']['step'] = step
  if multihost.is_main_process():
    _write(results, workdir, step, config.eval.disable_top)
  return results


def run_tasks(
  model: 'CheckpointLM',
  tasks: 'Tasks',
  options: TaskOptions,
  model_args: dict[str, Any] | None = None,
  errors: bool = True,
) -> dict[str, Any]:
  """Returns what lm-eval writes of tasks, with samples if they are asked for.

  Args:
    model: The model.
    tasks: The tasks, with their data.
    options: What is asked of the harness.
    model_args: What the record calls the model.
    errors: Whether standard errors are resampled that have no formula.

  Raises:
    UserError: What a task defines, as a filter or a metric, cannot be computed.
  """
  from lm_eval import evaluator
  from lm_eval.loggers import EvaluationTracker
  from lm_eval.loggers.utils import get_commit_from_path
  from lm_eval.utils import hash_string

  # Its own way of last resort: git says on stderr where there is no clone.
  evaluator.get_git_commit_hash = lambda: get_commit_from_path(os.getcwd())

  # What it reads there: nothing is forked, and every process, which is asked
  # for all there is, gets results.
  os.environ |= {'DISABLE_MULTIPROC': '1', 'LOCAL_RANK': '0'}
  writes = multihost.is_main_process()
  tracker = EvaluationTracker()
  with _task_errors():
    results = evaluator.simple_evaluate(
      model=model,
      model_args=model_args or {},
      tasks=tasks.found,
      task_manager=tasks.manager,
      num_fewshot=options.num_fewshot,
      limit=options.limit,
      log_samples=options.log_samples,
      apply_chat_template=options.apply_chat_template,
      # What ends an answer is a token, which no text has.
      fewshot_as_multiturn=False,
      bootstrap_iters=_RESAMPLES if errors and writes else 0,
      batch_size=model.batch_size,
      device=jax.devices()[0].device_kind,
      evaluation_tracker=tracker,
    )
  tracker.general_config_tracker.log_end_time()
  results['config']['model'] = 'moe_jax'
  results |= dataclasses.asdict(tracker.general_config_tracker)
  results |= {
    'task_hashes': {
      name: hash_string(''.join(map(_hash, samples)))
      for name, samples in results.get('samples', {}).items()
    },
    'model_source': 'moe_jax',
    'eot_token_id': model.eot_token_id,
    'max_length': model.max_length,
  }
  return results


@contextlib.contextmanager
def _task_errors() -> Iterator[None]:
  """Tells in one line what a task defines wrongly, and the model is not in.

  Raises:
    UserError: A filter, metric or function of a task fails.
  """
  from moe_jax.evaluation import harness

  try:
    yield
  except (UserError, RetryableError, MemoryError):
    raise
  except Exception as error:  # of any kind, from YAML or the task's code
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.filename == harness.__file__ for frame in frames):
      raise
    raise UserError(
      'lm_eval cannot compute what a task defines, as its texts, filters or'
      f' metrics: {type(error).__name__}: {said(error)[:300]}'
    ) from error


def check_installed(what: str) -> None:
  """Refuses what needs the package where it is not there.

  Raises:
    UserError: The message has the command that installs it.
  """
  if importlib.util.find_spec('lm_eval') is None:
    raise UserError(
      f"{what} needs the package lm_eval: pip install 'moe_jax[eval]'"
    )


def _template(config: ConfigDict) -> instructions.Format:
  """Returns how instructions were put in training.

  Raises:
    UserError: There were none.
  """
  name = config.data.format
  if name not in instructions.FORMATS:
    known = ' or '.join(instructions.FORMATS)
    raise UserError(
      f'--apply_chat_template: data.format = {name!r}, so the model was trained'
      f' without a template (which {known} have); leave the flag out'
    )
  return instructions.FORMATS[name]


def _check_tokenizer(config: ConfigDict, workdir: str) -> None:
  """Refuses a checkpoint whose tokenizer is not there.

  Raises:
    UserError: The one that is there has other ids.
  """
  tokenizer = run_tokenizer.build(config, workdir)
  size = config.model.vocab_size or tokenizer.vocab_size
  # A vocabulary that is padded to a round number never gets twice as large.
  if not tokenizer.vocab_size <= size <= 2 * tokenizer.vocab_size:
    raise UserError(
      f'the checkpoint in {workdir} has no tokenizer of its own:'
      f' data.tokenizer = {config.data.tokenizer!r} has'
      f' {tokenizer.vocab_size} ids and the model {size};'
      ' `moe_jax convert import --tokenizer=PATH` names one'
    )


def _metrics(row: dict[str, Any]) -> dict[str, float]:
  """Returns the numbers of a task but their errors, and no filter 'none'."""
  found = {}
  for name, value in row.items():
    metric, _, filtered = name.partition(',')
    wanted = filtered and not metric.endswith('_stderr')
    if wanted and isinstance(value, int | float):
      behind = '' if filtered == 'none' else f'_{filtered}'
      found[f'{metric}{behind}'] = float(value)
  return found


def _hash(sample: dict[str, Any]) -> str:
  return ''.join(sample[f'{part}_hash'] for part in ('doc', 'prompt', 'target'))


def _write(
  results: dict[str, Any], workdir: str, step: int, disabled: int
) -> None:
  """Prints tables of results, and writes them and their samples."""
  from lm_eval.utils import make_table

  rest = {name: part for name, part in results.items() if name != 'samples'}
  print(f'{workdir}, step {step}')
  for column in ('results', 'groups'):
    if rest.get(column):
      print(make_table(rest, column))
  variant = without_top(disabled)
  path = result_path(workdir, 'tasks', step, variant)
  _set_aside(path, f'samples-*-{step}{variant}.jsonl')
  write(path, _json(rest, indent=2))
  for name, samples in results.get('samples', {}).items():
    of_task = result_path(workdir, f'samples-{name}', step, variant)
    lines = [_json(_sample(each)) for each in samples]
    write(f'{of_task}l', '\n'.join(lines))
  print(f'written to {path}')


def _set_aside(results: str, samples: str) -> None:
  """Renames results that are there, and their samples, after their date.

  Args:
    results: The path of the results.
    samples: A pattern of the names of the samples beside them.
  """
  if not os.path.exists(results):
    return
  made = datetime.datetime.fromtimestamp(os.path.getmtime(results))
  folder = glob.escape(os.path.dirname(results))
  for path in (results, *glob.glob(os.path.join(folder, samples))):
    name, ending = os.path.splitext(path)
    os.replace(path, f'{name}_{made:%Y-%m-%dT%H-%M-%S}{ending}')


def _json(value: Any, **options: Any) -> str:
  from lm_eval.utils import handle_non_serializable

  return strict_json.dumps(value, default=handle_non_serializable, **options)


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
  """Returns a sample in the form that lm-eval writes."""
  from lm_eval.utils import sanitize_list

  arguments = {
    f'gen_args_{i}': {f'arg_{j}': each for j, each in enumerate(one)}
    for i, one in enumerate(sample['arguments'])
  }
  return sample | {
    'arguments': arguments,
    'resps': sanitize_list(sample['resps']),
    'filtered_resps': sanitize_list(sample['filtered_resps']),
    'target': str(sample['target']),
  }
