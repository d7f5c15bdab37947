"""The wheel alone, from an empty directory: trains, evaluates and plans."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = """
model.num_layers=2 model.hidden_size=16 model.num_heads=2 model.num_kv_heads=2
moe.num_experts=4 moe.expert_width=16 router.state_size=8 data.seq_len=16
train.batch_size=4 train.steps=2 eval.batches=1 eval.batch_size=4
data.name=text_folder data.train_split=train eval.split=train
""".split()


@pytest.fixture(scope='module')
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A fresh environment with the wheel; its `moe_jax` command.

  The packages that the library needs are those of this environment, which are
  on the path; this clone is not.
  """
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  source.mkdir()
  # A build leaves files in the source.
  for name in ('moe_jax', 'configs'):
    shutil.copytree(ROOT / name, source / name)
  for name in ('pyproject.toml', 'setup.py', 'requirements.txt'):
    shutil.copy(ROOT / name, source)
  for name in ('README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
  quiet = ['--no-deps', '--no-index']
  build = ['wheel', '--no-build-isolation', *quiet, '-w', folder, source]
  subprocess.run([*pip, *build], check=True)
  environment = folder / 'environment'
  venv = [sys.executable, '-m', 'venv', '--without-pip', environment]
  subprocess.run(venv, check=True)
  python = environment / 'bin' / 'python'
  wheels = list(folder.glob('*.whl'))
  install = ['--python', python, 'install', *quiet, *wheels]
  subprocess.run([*pip, *install], check=True)
  # A line of a .pth file adds a path, whose own .pth files are not read: the
  # editable install of this clone is left out.
  site = next(environment.glob('lib/python*/site-packages'))
  (site / 'others.pth').write_text(f'{sysconfig.get_path("purelib")}\n')
  return environment / 'bin' / 'moe_jax'


def run(command: Path, where: Path, *arguments: str) -> str:
  """Runs the command in a directory and returns what it prints."""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
  env.pop('PYTHONPATH', None)
  done = subprocess.run(
    [command, *arguments],
    cwd=where,
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
def test_programs_run_from_an_empty_directory(
  installed: Path, tmp_path: Path
) -> None:
  texts = tmp_path / 'texts'
  texts.mkdir()
  (texts / 'a.txt').write_text('All that is gold does not glitter. ' * 40)
  empty = tmp_path / 'empty'
  empty.mkdir()
  tiny = [f'--config.{each}' for each in [*TINY, f'data.path={texts}']]
  run(installed, empty, 'train', '--config=quickstart', '--workdir=x', *tiny)
  steps = sorted(os.listdir(empty / 'x' / 'checkpoints'))
  assert steps[-1] == '2'
  run(installed, empty, 'eval', '--workdir=x')
  assert list((empty / 'x' / 'evaluation').glob('*-2.json'))
  run(installed, empty, 'report', 'x')
  assert '<!doctype html>' in (empty / 'x' / 'report.html').read_text('utf-8')
  plan = json.loads(run(installed, empty, 'plan', '--workdir=x', '--json'))
  assert plan['parameters']['total'] > 0
  small = 'rmoe:enwik8_small,np'
  plan = json.loads(
    run(installed, empty, 'plan', f'--config={small}', '--json')
  )
  assert plan['parameters']['total'] == 15_607_933
  assert 'moe_jax PROGRAM' in run(installed, empty)
  assert 'enwik8_medium' in run(installed, empty, 'presets')
  assert 'CHECKPOINT' in run(installed, empty, 'convert', '--help')
  assert os.listdir(empty) == ['x']
