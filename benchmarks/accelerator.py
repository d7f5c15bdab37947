"""All that is worth measuring where an accelerator is at hand, by one command.

  python -m benchmarks.accelerator --minutes=9
  python -m benchmarks.accelerator --dry_run
  python -m benchmarks.accelerator --only=train_step,peers --results=DIR

Each measurement is a process of its own, the most telling first, until the time
is over; one that fails costs the others nothing. What they print is kept in
benchmarks/results/DEVICE: STEP.jsonl of what was measured, STEP.log of what was
said beside it, a README.md with every command, its seconds and how it ended.
The sanitizer's step needs NVIDIA's compute-sanitizer, peers the extra interop.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import command_line
from moe_jax.errors import UserError, choose

_RESULTS = Path(__file__).parent / 'results'
# Both large models, a batch of which fits a device of 80 GB.
_RMOE = ('--config=rmoe:pretrain_0.9b', '--config.train.batch_size=8')
_CARTESIAN = (
  '--config=cartesian_moe:large',
  '--config.train.batch_size=4',
  '--config.data.seq_len=2048',
)
_ONE_DEVICE = '--config.mesh.data=1'
_SANITIZER = ('compute-sanitizer', '--error-exitcode=1')
# A first group without rows, and rows that are no multiple of a tile.
_SMALL = ('--sizes=1000x256x256x8', '--kinds=half', '--rounds=1')


class Step(NamedTuple):
  """A measurement.

  Attributes:
    name: Its file is called so; several steps may share one.
    arguments: A module of `benchmarks`, and what it is given beside --json.
    under: The program that runs it, with arguments; none is Python itself.
  """

  name: str
  arguments: tuple[str, ...]
  under: tuple[str, ...] = ()

  def command(self) -> list[str]:
    """Returns what is run."""
    module, *rest = self.arguments
    python = [sys.executable, '-m', f'benchmarks.{module}', '--json', *rest]
    return [*self.under, *python]

  def __str__(self) -> str:
    module, *rest = self.arguments
    words = *self.under, 'python', '-m', f'benchmarks.{module}', '--json', *rest
    return ' '.join(words)


_STEPS_OF_RMOE = Step('train_step', ('train_step', *_RMOE, _ONE_DEVICE))
STEPS = (
  _STEPS_OF_RMOE,
  Step('train_step', ('train_step', *_CARTESIAN, _ONE_DEVICE)),
  Step('router_cost', ('router_cost', *_RMOE, _ONE_DEVICE)),
  Step('grouped_matmul', ('grouped_matmul', '--tune')),
  _STEPS_OF_RMOE,  # with what was tuned
  Step('train_step', ('train_step', '--config=quickstart')),
  Step('moe_layer', ('moe_layer',)),
  Step('peers', ('peers',)),
  Step('generation', ('generation',)),
  Step('sanitizer', ('grouped_matmul', *_SMALL), _SANITIZER),
)


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  made = command_line.bare(__doc__)
  made.add_argument('--minutes', type=float, default=30, help='%(default)s')
  made.add_argument('--only', help='names of steps, joined by commas')
  made.add_argument('--results', type=Path, help='another folder for them')
  made.add_argument('--dry_run', action='store_true', help='only list them')
  command_line.main(run, made, arguments)


def run(args: argparse.Namespace) -> None:
  """Runs the steps that are asked for, one after the other.

  Raises:
    UserError: --only names no step, or there is no accelerator.
  """
  names = dict.fromkeys(step.name for step in STEPS)
  if args.only:
    names = {choose('--only', name, names) for name in args.only.split(',')}
  steps = [step for step in STEPS if step.name in names]
  if args.dry_run:
    print('\n'.join(map(str, steps)))
    return
  device = _device()
  if device['platform'] == 'cpu' and not args.results:
    raise UserError(
      'there is no accelerator here; --results=DIR measures this CPU'
    )
  slug = re.sub(r'[^a-z0-9]+', '-', device['device'].lower()).strip('-')
  measure(steps, args.results or _RESULTS / slug, 60 * args.minutes, device)


def measure(
  steps: Sequence[Step], folder: Path, seconds: float, device: dict[str, Any]
) -> None:
  """Runs steps while there is time, and keeps what they print.

  Args:
    steps: In this order; files that they shared before are written anew.
    folder: Where to keep it.
    seconds: All together; a step that is running then is stopped.
    device: What `benchmarks.common.place` returned.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for name in {step.name for step in steps}:
    for suffix in ('jsonl', 'log'):
      (folder / f'{name}.{suffix}').unlink(missing_ok=True)
  end = time.monotonic() + seconds
  rows = []
  for step in steps:
    began = time.monotonic()
    how = _run(step, folder, end - began)
    took = time.monotonic() - began
    rows.append(f'| `{step.name}.jsonl` | `{step}` | {took:.0f} | {how} |')
    print(f'{step.name}: {how} after {took:.0f} s', flush=True)
    _write_readme(folder, rows, device)


def _run(step: Step, folder: Path, seconds: float) -> str:
  """Runs a step and returns how it ended."""
  command = step.command()
  if not shutil.which(command[0]):
    return f'not run: {command[0]} is not installed'
  if seconds <= 0:
    return 'not run: the time was over'
  with (
    (folder / f'{step.name}.jsonl').open('a') as out,
    (folder / f'{step.name}.log').open('a') as log,
  ):
    try:
      code = subprocess.run(
        command, stdout=out, stderr=log, timeout=seconds, check=False
      ).returncode
    except subprocess.TimeoutExpired:
      return 'stopped: the time was over'
  return f'failed with {code}: see {step.name}.log' if code else 'done'


def _write_readme(
  folder: Path, rows: Sequence[str], device: dict[str, Any]
) -> None:
  versions = ', '.join(f'{k} {v}' for k, v in device['versions'].items())
  lines = [
    f'# {device["device"]}',
    '',
    f'{device["num_devices"]} of them; {versions}.',
    'Measured by `python -m benchmarks.accelerator`.',
    '',
    '| file | command | seconds | how it ended |',
    '|---|---|---|---|',
    *rows,
  ]
  (folder / 'README.md').write_text('\n'.join(lines) + '\n', 'utf-8')


def _device() -> dict[str, Any]:
  """Returns what there is, asked by a process that then lets go of it."""
  code = 'from benchmarks import common; common.show(common.place(), True)'
  asked = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  if asked.returncode:
    reason = asked.stderr.strip().splitlines()[-1:]
    raise UserError(f'jax found no device: {" ".join(reason)}')

  return json.loads(asked.stdout.splitlines()[-1])


if __name__ == '__main__':
  main()
