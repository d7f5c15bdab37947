"""What is in the directory of a run, and what its next start would do.

Nothing is written, no data are read and no device is used. Whatever is damaged
is told and passed over.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax import files
from moe_jax.config import saved as saved_config
from moe_jax.errors import UserError
from moe_jax.training import lock, metrics_writer, run_dir
from moe_jax.training.saved_step import (
  UNFINISHED,
  DamagedError,
  SavedStep,
  named_steps,
)

Tell = Callable[[str], None]

_LARGEST_HOLES = 20  # in JSON; a run that lacks more has lost the file


class _Plan(NamedTuple):
  """Keys of the config that decide what happens next."""

  steps: int
  log_every: int
  fallback: str


def examine(workdir: str, tell: Tell = lambda line: None) -> dict[str, Any]:
  """Returns what is found, as JSON can hold it.

  Every checkpoint is read whole, one array at a time, and held to its digests.

  Args:
    workdir: The directory of a run.
    tell: Called with a line before something that may take long.

  Returns:
    `config` ('' if it is whole, else what is wrong), `checkpoints` (a list:
    `step`, `health`, which is sound, unverified, damaged or unreadable,
    `reason`, and what else is known of each), `set_aside` and `unfinished`
    (paths), `metrics`, `lock` (who holds the directory, None if nobody does),
    `crash` (the last line of crash.txt, '' without) and `next`.

  Raises:
    UserError: There is no such directory.
  """
  if not os.path.isdir(workdir):
    raise UserError(f'workdir {workdir} is no folder; give that of a run')
  plan, wrong = _plan(workdir)
  above = os.path.abspath(workdir)
  folder = os.path.join(above, run_dir.CHECKPOINTS)
  saved = [_checkpoint(folder, step, tell) for step in named_steps(folder)]
  found: dict[str, Any] = {
    'workdir': workdir,
    'config': wrong,
    'checkpoints': saved,
    'set_aside': _paths(os.path.join(above, run_dir.DAMAGED), ''),
    'unfinished': _paths(folder, UNFINISHED),
    'metrics': _metrics(workdir, plan, _newest(saved)),
    'lock': lock.holder(workdir),
    'crash': _last_line(os.path.join(workdir, 'crash.txt')),
  }
  return found | {'next': _next(found, plan, folder)}


def text(found: dict[str, Any]) -> str:
  """Returns what `examine` found, for people."""
  lines = [f'workdir      {found["workdir"]}']
  lines.append(f'config       {found["config"] or "whole"}')
  lines += [
    f'checkpoint   {each["step"]}: {_described(each)}'
    for each in found['checkpoints']
  ]
  if not found['checkpoints']:
    lines.append('checkpoints  none')
  lines += [f'set aside    {path}' for path in found['set_aside']]
  lines += [f'unfinished   {path}' for path in found['unfinished']]
  lines.append(f'metrics      {_described_metrics(found["metrics"])}')
  if found['lock']:
    lines.append(f'in use by    {found["lock"]}')
  if found['crash']:
    lines.append(f'last crash   {found["crash"]}')
  return '\n'.join([*lines, f'next start   {found["next"]}'])


def _plan(workdir: str) -> tuple[_Plan | None, str]:
  """Returns what the config of the run plans, and what is wrong with it."""
  path = run_dir.config_path(workdir)
  try:
    config = saved_config.from_json(Path(path).read_text(encoding='utf-8'))
    return _Plan(
      int(config.train.steps),
      int(config.train.log_every),
      str(config.checkpoint.fallback),
    ), ''
  except FileNotFoundError:
    return None, f'{path} is missing'
  except (OSError, ValueError, AttributeError, TypeError, RecursionError) as e:
    return None, f'{path} is damaged: {" ".join(str(e).split())[:200]}'


def _checkpoint(folder: str, step: int, tell: Tell) -> dict[str, Any]:
  """Returns the health of a checkpoint, and what it says of itself."""
  tell(f'reading checkpoint {step} ...')
  saved = SavedStep(folder, step)
  found: dict[str, Any] = {'step': step, 'path': saved.path, 'reason': ''}
  try:
    item = saved.data
    found['position'] = item.get('position', step)
    found['skipped'] = item.get('skipped', [])
    found['data'] = item.get('data')
    found['health'] = 'sound' if saved.verify_all() else 'unverified'
    found['arrays'] = len(saved.leaves)
  except DamagedError as error:
    found |= {'health': 'damaged', 'reason': str(error)}
  except UserError as error:
    found |= {'health': 'unreadable', 'reason': str(error)}
  return found


def _described(each: dict[str, Any]) -> str:
  if each['reason']:
    return each['reason'].partition(f'{each["path"]} ')[2]
  digests = {
    'sound': 'all as they were saved',
    'unverified': 'readable; it is older than digests',
  }
  data = each['data'] or {}
  of = f', {data["name"]}' if 'name' in data else ''
  # Which checkpoints of older versions do not say.
  of += f', {data["documents"]} documents' if 'documents' in data else ''
  left_out = sum(count for _, count in each['skipped'])
  skipped = f', {left_out} batches left out' if left_out else ''
  return (
    f'{each["arrays"]} arrays, {digests[each["health"]]}; data position'
    f' {each["position"]}{skipped}{of}'
  )


def _newest(saved: list[dict[str, Any]]) -> int | None:
  """Returns the newest step that can be gone on from."""
  sound = [each['step'] for each in saved if not each['reason']]
  return max(sound, default=None)


def _paths(folder: str, ending: str) -> list[str]:
  try:
    names = sorted(os.listdir(folder))
  except OSError:
    return []
  return [os.path.join(folder, name) for name in names if name.endswith(ending)]


def _metrics(
  workdir: str, plan: _Plan | None, newest: int | None
) -> dict[str, Any]:
  """Returns which steps metrics.jsonl has, and which it lacks."""
  path = os.path.join(workdir, 'metrics.jsonl')
  found: dict[str, Any] = {'holes': [], 'wrong': '', 'garbled': False}
  steps: set[int] = set()
  lines: list[bytes] = []
  try:
    files.check_regular(path)
    lines = Path(path).read_bytes().splitlines()
  except OSError as error:
    found['wrong'] = f'{path}: {error.strerror}'
  for number, line in enumerate(lines, 1):
    try:
      row = files.parse_json(line.decode())
      if row.get('split') == 'train':
        steps.add(int(row['step']))
    except (ValueError, TypeError, KeyError):
      found['wrong'] = f'{path}:{number} is not a JSON object with a step'
      found['garbled'] |= number < len(lines)  # the last may be cut short
  found |= {'rows': len(lines), 'last_step': max(steps, default=0)}
  if plan is not None:
    end = max(found['last_step'], newest or 0)
    if every := plan.log_every:
      holes = metrics_writer.holes(sorted(steps), every, end)
      found['holes'] = [list(hole) for hole in holes[:_LARGEST_HOLES]]
  return found


def _described_metrics(metrics: dict[str, Any]) -> str:
  told = [f'{metrics["rows"]} lines, to step {metrics["last_step"]}']
  told += [metrics['wrong']] if metrics['wrong'] else []
  told += [f'steps {first} to {last} lack' for first, last in metrics['holes']]
  return '; '.join(told)


def _last_line(path: str) -> str:
  try:
    lines = Path(path).read_text(errors='replace').strip().splitlines()
  except OSError:
    return ''
  return lines[-1] if lines else ''


def _next(found: dict[str, Any], plan: _Plan | None, folder: str) -> str:
  """Returns what the command of the run would do now."""
  saved = found['checkpoints']
  if found['lock']:
    return 'ends at once, for the directory is in use'
  if found['config'] and os.path.lexists(run_dir.config_path(found['workdir'])):
    return 'is refused, for the config that the run was made with is damaged'
  try:
    run_dir.check_kinds(found['workdir'])
  except UserError as error:
    return f'is refused: {error}'
  if found['metrics']['garbled']:
    return f'is refused, for {found["metrics"]["wrong"]}'
  if not saved:
    return 'begins anew'
  newest = _newest(saved)
  if saved[-1]['health'] == 'unreadable':
    return f'ends with an error: {saved[-1]["reason"]}'
  if newest is None:
    return 'ends with an error, for no checkpoint is sound'
  done = plan is not None and newest >= plan.steps
  goes_on = (
    f'has nothing to do, for {newest} steps are done'
    if done
    else f'goes on from step {newest}'
  )
  after = [str(each['step']) for each in saved if each['step'] > newest]
  if not after:
    return goes_on
  fallback = 'auto' if plan is None else plan.fallback
  when = {
    'on': 'sets',
    'auto': 'without a terminal, or with checkpoint.fallback=on, sets',
    'off': 'ends with an error; with checkpoint.fallback=on it sets',
  }.get(fallback, 'sets')
  return f'{when} {", ".join(after)} aside and {goes_on}'
