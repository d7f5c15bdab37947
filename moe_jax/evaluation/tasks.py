"""Tasks of lm-evaluation-harness: those that are asked for, with their data.

Its own tasks are some 14,000 files, which take half a minute to parse. Here
their text is searched for the names, and only the folders that have them are
parsed. Needs the package `lm_eval`.
"""

import collections
import contextlib
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval.tasks
from huggingface_hub import constants as hub
from lm_eval.tasks import TaskManager

from moe_jax import files
from moe_jax.errors import UserError, nearest, said

_CLOZE = 'hellaswag lambada_openai piqa'.split()
# What the papers measure downstream. No released code says which variants of
# the tasks, and how many examples stand before a question: that is ours.
SUITES = {
  # RMoE, arXiv 2408.06793.
  'rmoe_paper': dict.fromkeys([*_CLOZE, 'arc_easy', 'sciq'], 0),
  # CartesianMoE, arXiv 2410.16077: cloze tasks, then questions to be answered.
  'cartesian_paper': dict.fromkeys(
    [*_CLOZE, 'storycloze_2016', 'winogrande'], 0
  )
  | dict.fromkeys('triviaqa webqs nq_open'.split(), 5),
}

_BUILTIN = Path(lm_eval.tasks.__file__).parent
# Seconds to wait for the Hub before it counts as out of reach.
_PATIENCE = 5
# What a file of YAML defines: a task, a group, or tags that its task has.
_NAME = re.compile(
  r'^(?:task|group|tag):[ \t]*([^\s\[#-][^\n#]*)', re.MULTILINE
)
_TAGS = re.compile(
  r'^tag:[ \t]*(?:\[([^\]]*)\]|((?:\n[ \t]*-[^\n]*)+))', re.MULTILINE
)


class Tasks(NamedTuple):
  """Tasks whose data are there.

  Attributes:
    found: Objects of `lm_eval`: tasks, and groups of them.
    manager: What knows where they come from.
  """

  found: list[Any]
  manager: TaskManager


def load(
  asked: str,
  include_path: str = '',
  num_fewshot: int | None = None,
  key: str = '--tasks',
) -> Tasks:
  """Finds tasks and reads their data.

  A data set that the Hub's cache has is taken as it is. Only for others is the
  Hub asked, if it answers.

  Args:
    asked: Names of tasks, groups, tags and `SUITES`, or paths of files of YAML,
      separated by commas.
    include_path: A folder with tasks, which go before those of the package of
      the same name; '' for none.
    num_fewshot: The examples before each question; None for those of the task,
      or of the suite.
    key: What asks for them, for messages.

  Raises:
    UserError: There is no such task; it cannot be read, its data neither, or it
      needs what is not here.
  """
  # It warns of defaults that a task takes, and shows a bar for each file.
  logging.getLogger('lm_eval').setLevel(logging.ERROR)
  datasets.disable_progress_bars()
  names = [_expanded(name.strip()) for name in asked.split(',') if name.strip()]
  if not names:
    raise UserError(
      f'{key} = {asked!r} names no task; write names with commas between'
    )
  if include_path and not os.path.isdir(include_path):
    flag = key.replace('tasks', 'include_path')
    raise UserError(f'{flag} = {include_path!r} is no folder')
  shots: dict[str, int | None] = {}
  for name in names:
    for task, number in SUITES.get(name, {name: None}).items():
      shots.setdefault(task, number)
  manager = _manager(list(shots), include_path)
  found = []
  for name, number in shots.items():
    top, tasks = _load(manager, name)
    for task in tasks:
      if number is not None and num_fewshot is None:
        task.set_config('num_fewshot', number)
      _check(task, num_fewshot)
    found += top
  try:
    manager.load(found)
  except ValueError as error:  # a task of two groups
    raise UserError(f'{key} = {asked!r}: {said(error)}') from error
  return Tasks(found, manager)


def _manager(names: list[str], include_path: str) -> TaskManager:
  """Returns what has parsed the tasks of these names, and few others."""
  own = [include_path] if include_path else []
  manager = TaskManager(include_path=own, include_defaults=False)
  missing = set(names) - {name for name in names if _is_file(name)}
  missing -= set(manager.all_tasks)
  if not missing:
    return manager
  builtin = _defined(_BUILTIN)
  in_folder = _defined(Path(include_path)) if include_path else {}
  for name in sorted(missing):
    if name in in_folder:
      raise _broken(name, min(in_folder[name]))
    if name not in builtin:
      known = [*SUITES, *manager.all_tasks, *builtin]
      where = f' nor in {include_path}' if include_path else ''
      raise UserError(
        f'there is no task {name!r} in lm_eval{where}{nearest(name, known)}'
      )
  folders: set[Path] = set()
  while missing:
    for name in missing:
      folders |= {_family(path) for path in builtin.get(name, ())}
    manager = TaskManager(
      include_path=[*sorted(folders), *own], include_defaults=False
    )
    missing = {
      name
      for name in _reached(manager, names) - set(manager.all_tasks)
      if {_family(path) for path in builtin.get(name, ())} - folders
    }
  return manager


def _expanded(name: str) -> str:
  """Returns a name, or the path of a file of YAML with ~ expanded.

  Raises:
    UserError: There is no such file.
  """
  if not _is_file(name):
    return name
  path = files.expand(name)
  if not os.path.isfile(path):
    raise UserError(f'there is no file {path}, which is to define a task')
  return path


def _is_file(name: str) -> bool:
  return name.endswith(('.yaml', '.yml'))


def _defined(folder: Path) -> dict[str, set[Path]]:
  """Returns the names that files below a folder define, and these files."""
  found = collections.defaultdict(set)
  for path in folder.rglob('*.yaml'):
    text = path.read_text('utf-8', errors='replace')
    lists = [''.join(match.groups('')) for match in _TAGS.finditer(text)]
    for name in [*_NAME.findall(text), *re.split(r'[,\n]', '\n'.join(lists))]:
      found[name.strip(' \t-\'"')].add(path)
  found.pop('', None)
  return dict(found)


def _family(path: Path) -> Path:
  """Returns the folder of the package's tasks that a file is of."""
  return _BUILTIN / path.relative_to(_BUILTIN).parts[0]


def _reached(manager: TaskManager, names: Iterable[str]) -> set[str]:
  """Returns the names, and those that groups of them name."""
  reached, pending = set(), list(names)
  while pending:
    name = pending.pop()
    if name in reached:
      continue
    reached.add(name)
    entry = manager.task_index.get(name)
    listed = (entry.cfg or {}).get('task') if entry else None
    for each in listed if isinstance(listed, list) else []:
      child = each
      if isinstance(each, dict):
        child = each.get('task') or each.get('group')
      if isinstance(child, str):
        pending.append(child)
  return reached


def _broken(name: str, path: Path) -> UserError:
  """Returns why a file that seems to define a task is passed over."""
  try:
    TaskManager(include_defaults=False).load(str(path))
  except Exception as error:  # of YAML, or of code that it names
    return UserError(f'{path}: {said(error)[:300]}')
  return UserError(f'{path} does not define the task {name!r}')


def _load(manager: TaskManager, name: str) -> tuple[list[Any], list[Any]]:
  """Returns a task or group, and all tasks of it, with their data.

  Raises:
    UserError: They cannot be read.
  """
  try:
    try:
      with _offline():
        loaded = manager.load([name])
    except ConnectionError as error:
      why = _out_of_reach()
      what = said(error).removesuffix(' (OfflineModeIsEnabled)')
      if why:
        raise UserError(
          f'the task {name!r} needs the network: {what[:200]}, and'
          f' {why}; what was read once is in the cache, and tasks in'
          ' include_path may have files of yours'
        ) from error
      loaded = manager.load([name])
  except (UserError, MemoryError):
    raise
  except Exception as error:  # of a library that has many, or the task's code
    told = f'{type(error).__name__}: {said(error)[:300]}'
    if isinstance(error, StopIteration):  # of `datasets`, of a file
      told = 'its data are empty'
    raise UserError(f'the task {name!r} cannot be loaded: {told}') from error
  tasks = list(loaded['tasks'].values())
  # The first group is the one that was asked for, and has the others.
  return list(loaded.get('groups', {}).values())[:1] or tasks, tasks


@contextlib.contextmanager
def _offline() -> Iterator[None]:
  """Lets nobody ask the Hub, who else would try for long what cannot be."""
  before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
  hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
  try:
    yield
  finally:
    hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _out_of_reach() -> str:
  """Returns why the Hub cannot be asked; '' if it can."""
  if hub.HF_HUB_OFFLINE:
    return 'HF_HUB_OFFLINE is set'
  try:
    urllib.request.urlopen(hub.ENDPOINT, timeout=_PATIENCE).close()
  except urllib.error.HTTPError:  # an answer, too
    return ''
  except (OSError, ValueError) as error:
    return f'{hub.ENDPOINT} does not answer ({said(error)[:200]})'
  return ''


def _check(task: Any, num_fewshot: int | None) -> None:
  """Refuses a task that cannot be done here."""
  name = task.task_name
  if getattr(task, 'UNSAFE_CODE', False):
    raise UserError(
      f'the task {name!r} runs the programs that a model writes, which is not'
      ' done here'
    )
  if getattr(task, 'MULTIMODAL', False):
    raise UserError(
      f'the task {name!r} shows pictures or plays sounds, and the model reads'
      ' text'
    )
  own = task.get_config('num_fewshot')
  shots = own or 0
  if num_fewshot is not None and own != 0:  # a task may insist on none
    shots = num_fewshot
  pool = getattr(getattr(task, 'sampler', None), 'df', None)
  if pool is not None and len(pool) < shots:
    raise UserError(
      f'the task {name!r} has {len(pool)} examples to show before a question,'
      f' and {shots} are asked for: give a smaller --num_fewshot'
    )
