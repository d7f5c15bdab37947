"""What the doctor finds in workdirs, sound and damaged."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.data import sources
from moe_jax.errors import UserError
from moe_jax.programs import doctor
from moe_jax.training import health, lock
from tests.helpers import runs


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
  """A run of 9 steps with checkpoints of steps 2, 4 and 6."""
  config = config_lib.get_config()
  config.train.steps, config.train.log_every = 9, 1
  folder = tmp_path / 'run'
  with runs.claimed(config, folder) as store:
    for step in (2, 4, 6):
      state = {'step': jnp.int32(step), 'params': {'w': jnp.full(9, step)}}
      store.save(step, state)
  log(folder, range(1, 7))
  return folder


def log(folder: Path, steps: Any) -> None:
  rows = [json.dumps({'step': step, 'split': 'train'}) for step in steps]
  (folder / 'metrics.jsonl').write_text('\n'.join(rows) + '\n')


def damage(folder: Path, *steps: int) -> None:
  for step in steps:
    (folder / f'checkpoints/{step}/data/metadata').write_text('[]')


def test_a_sound_run(workdir: Path) -> None:
  before = runs.snapshot(workdir)
  found = health.examine(str(workdir))
  assert runs.snapshot(workdir) == before
  saved = found['checkpoints']
  assert [each['step'] for each in saved] == [2, 4, 6]
  assert {each['health'] for each in saved} == {'sound'}
  assert [each['arrays'] for each in saved] == [2, 2, 2]
  assert found['next'] == 'goes on from step 6'
  assert found['metrics']['holes'] == [] and not found['lock']
  assert '6: 2 arrays, all as they were saved' in health.text(found)
  saved[2]['data'] = {'name': 'mine'}
  assert 'data position 6, mine\n' in health.text(found)


@pytest.mark.parametrize(
  ('fallback', 'told'),
  [
    ('on', 'sets 4, 6 aside and goes on from step 2'),
    ('auto', 'without a terminal, or with checkpoint.fallback=on, sets 4, 6 a'),
    ('off', 'ends with an error; with checkpoint.fallback=on it sets 4, 6 as'),
  ],
)
def test_damaged_checkpoints(workdir: Path, fallback: str, told: str) -> None:
  damage(workdir, 4, 6)
  path = workdir / 'config.json'
  config = json.loads(path.read_text())
  config['checkpoint']['fallback'] = fallback
  path.write_text(json.dumps(config))
  found = health.examine(str(workdir))
  assert [each['health'] for each in found['checkpoints']] == [
    'sound',
    'damaged',
    'damaged',
  ]
  assert found['next'].startswith(told)
  assert '6: is damaged: data/metadata is no JSON' in health.text(found)
  damage(workdir, 2)
  found = health.examine(str(workdir))
  assert found['next'] == 'ends with an error, for no checkpoint is sound'


def test_older_checkpoints_are_read(workdir: Path) -> None:
  (workdir / 'checkpoints/6/data/metadata').write_text('{}')
  newest = health.examine(str(workdir))['checkpoints'][-1]
  assert (newest['health'], newest['reason']) == ('unverified', '')


def test_what_metrics_lack(workdir: Path) -> None:
  log(workdir, [1, 2, 4, 5])
  found = health.examine(str(workdir))
  assert found['metrics']['holes'] == [[3, 3], [6, 6]]
  assert 'steps 3 to 3 lack; steps 6 to 6 lack' in health.text(found)
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step"')
  wrong = health.examine(str(workdir))['metrics']['wrong']
  assert 'metrics.jsonl:5 is not a JSON object with a step' in wrong
  log(workdir, range(1, 7))
  with (workdir / 'metrics.jsonl').open('r+') as file:
    file.write('garbled')
  found = health.examine(str(workdir))
  assert found['next'].startswith('is refused') and 'jsonl:1' in found['next']
  (workdir / 'metrics.jsonl').unlink()
  found = health.examine(str(workdir))['metrics']
  assert 'No such file' in found['wrong'] and found['holes'] == [[1, 6]]
  os.mkfifo(workdir / 'metrics.jsonl')
  assert 'Not a regular' in health.examine(str(workdir))['metrics']['wrong']


def test_what_else_lies_there(workdir: Path) -> None:
  (workdir / 'checkpoints/8.orbax-checkpoint-tmp').mkdir()
  (workdir / 'checkpoints-damaged/3').mkdir(parents=True)
  (workdir / 'crash.txt').write_text('Traceback ...\nOSError: gone\n')
  with lock.held(str(workdir)):
    found = health.examine(str(workdir))
  assert found['lock'].startswith(f'process {os.getpid()} on ')
  assert health.examine(str(workdir))['lock'] is None
  assert found['next'].startswith('ends at once')
  assert found['crash'] == 'OSError: gone'
  told = health.text(found)
  for part in (
    '8.orbax-checkpoint-tmp',
    'checkpoints-damaged/3',
    f'process {os.getpid()} on',
  ):
    assert part in told


def test_workdirs_that_are_none(tmp_path: Path, workdir: Path) -> None:
  with pytest.raises(UserError, match='is no folder'):
    health.examine(str(tmp_path / 'nowhere'))
  empty = tmp_path / 'empty'
  empty.mkdir()
  found = health.examine(str(empty))
  assert found['next'] == 'begins anew' and not os.listdir(empty)
  shutil.rmtree(workdir / 'checkpoints')
  (workdir / 'checkpoints').write_text('')
  found = health.examine(str(workdir))
  assert found['next'].endswith('checkpoints is no folder; move it away')
  for text in ('{', '[]', '{"train": 3}', '[' * 99999):
    (workdir / 'config.json').write_text(text)
    found = health.examine(str(workdir))
    assert 'is damaged' in found['config'] and 'is refused' in found['next']


def test_the_program(
  workdir: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  flags = ['moe_jax doctor', f'--workdir={workdir}']
  monkeypatch.setattr(sys, 'argv', flags)
  doctor.run()
  assert 'next start   goes on from step 6' in capsys.readouterr().out
  damage(workdir, 6)
  monkeypatch.setattr(sys, 'argv', [*flags, '--json'])
  with pytest.raises(SystemExit) as stop:
    doctor.run()
  out, err = capsys.readouterr()
  assert (stop.value.code, err) == (1, '')
  assert json.loads(out) == health.examine(str(workdir))


def test_data_are_told_by_their_hash(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
  """That of the ids as little-endian int32, for each split of the run."""
  texts = tmp_path / 'texts'
  texts.mkdir()
  for i in range(40):
    (texts / f'{i}.txt').write_text(f'text {i}\n' * 9)
  flags = [
    f'--workdir={tmp_path / "run"}',
    '--config=configs/base.py',
    '--config.data.name=text_folder',
    f'--config.data.path={texts}',
    f'--config.data.dir={tmp_path / "prepared"}',
    '--data',
    '--json',
  ]
  monkeypatch.chdir(runs.ROOT)
  monkeypatch.setattr(sys, 'argv', ['doctor', *flags])
  doctor.run()
  found = json.loads(capsys.readouterr().out)
  assert [each['split'] for each in found] == ['train', 'validation']
  config = config_lib.get_config()
  config.data.name, config.data.path = 'text_folder', str(texts)
  config.data.dir = str(tmp_path / 'prepared')
  documents = sources.open_documents(config.data, 'train')
  ids = [256]
  for i in range(len(documents)):
    ids += [*documents[i].encode(), 256]
  digest = hashlib.blake2b(np.array(ids, '<i4').tobytes(), digest_size=16)
  assert found[0]['blake2b'] == digest.hexdigest()
  assert found[0]['tokens'] == len(ids)
  monkeypatch.setattr(sys, 'argv', ['doctor', *flags[:-1]])
  doctor.run()
  assert f'blake2b {digest.hexdigest()}' in capsys.readouterr().out
