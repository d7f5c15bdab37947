"""One command measures what an accelerator is asked for, and ends in time."""

import importlib
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
