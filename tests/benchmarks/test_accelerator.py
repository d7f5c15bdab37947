"""One command measures what an accelerator is asked for, and ends in time."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import accelerator
from benchmarks.accelerator import Step
from moe_jax.config import loading

DEVICE = {
  'device': 'Some GPU',
  'platform': 'gpu',
  'num_devices': 1,
  'versions': {'jax': '1.2'},
}


@pytest.mark.parametrize('step', accelerator.STEPS, ids=lambda step: step.name)
def test_every_step_is_a_measurement_of_a_config(step: Step) -> None:
  module, *rest = step.arguments
  assert importlib.import_module(f'benchmarks.{module}')
  for flag in rest:
    if flag.startswith('--config='):
      assert loading.load(flag.partition('=')[2])


def test_a_list_that_nobody_reads_to_its_end() -> None:
  """As before `head`: no traceback, of this measurement or another."""
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.accelerator', '--dry_run'],
    cwd=Path(accelerator.__file__).parents[1],
    stdout=write,
    stderr=subprocess.PIPE,
    text=True,
  )
  os.close(write)
  assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, '')


# What others start, and read to the end.
CHILDREN = 'generation_jax', 'generation_torch', 'peer_jax', 'peer_torch'


@pytest.mark.parametrize(
  'path',
  [
    path
    for path in sorted(Path(accelerator.__file__).parent.glob('*.py'))
    if '__main__' in path.read_text() and path.stem not in CHILDREN
  ],
  ids=lambda path: path.stem,
)
def test_every_measurement_ends_as_programs_do(path: Path) -> None:
  text = path.read_text()
  [call] = text.partition("if __name__ == '__main__':\n")[2].splitlines()
  if call == '  main()':
    assert '  command_line.main(' in text  # which is `exits.ended`
  else:
    assert call.startswith(('  cli.main(', '  exits.exit_with('))


@pytest.mark.slow
def test_a_step_that_fails_costs_the_others_nothing(
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capfd: pytest.CaptureFixture[str],
) -> None:
  (tmp_path / 'good.jsonl').write_text('of the last time\n')
  programs = {
    'bad': 'import sys; sys.exit("no memory")',
    'missing': '',
    'good': 'print("{}")',
    'slow': 'import time; time.sleep(60)',
    'late': '',
  }

  def command(step: Step) -> list[str]:
    if step.name == 'missing':
      return ['no-such-program']
    return [sys.executable, '-c', programs[step.name]]

  monkeypatch.setattr(Step, 'command', command)
  steps = [Step(name, ('module', '--flag')) for name in programs]
  accelerator.measure(steps, tmp_path, 3, DEVICE)
  assert (tmp_path / 'good.jsonl').read_text() == '{}\n'
  assert 'no memory' in (tmp_path / 'bad.log').read_text()
  table = (tmp_path / 'README.md').read_text().splitlines()
  assert table[0] == '# Some GPU'
  ends = [line.split('|')[-2].strip() for line in table[-5:]]
  assert ends == [
    'failed with 1: see bad.log',
    'not run: no-such-program is not installed',
    'done',
    'stopped: the time was over',
    'not run: the time was over',
  ]
  assert '`python -m benchmarks.module --json --flag`' in table[-1]
  assert len(capfd.readouterr().out.splitlines()) == len(steps)


@pytest.mark.slow
def test_a_cpu_is_measured_where_results_are_asked_for(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  with pytest.raises(SystemExit):
    accelerator.main(['--only=sanitizer'])
  assert 'there is no accelerator here' in capsys.readouterr().err
  accelerator.main(['--only=sanitizer', f'--results={tmp_path}'])
  assert 'compute-sanitizer is not installed' in capsys.readouterr().out
