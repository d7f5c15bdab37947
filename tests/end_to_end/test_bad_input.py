"""What a user can get wrong: one line, exit status 2 and nothing touched."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from moe_jax.data import folders
from moe_jax.errors import UserError
from moe_jax.training import loop
from moe_jax.training.state import Setup
from tests.helpers import runs


@pytest.fixture(scope='module')
def config(make_config: Callable[..., ConfigDict]) -> ConfigDict:
  return make_config(
    **{
      'model.num_layers': 1,
      'train.steps': 2,
      'checkpoint.every': 1,
      'eval.every': 0,
    }
  )


@pytest.fixture(scope='module')
def trained(
  config: ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
  """A run that exists, with checkpoints of steps 1 and 2."""
  workdir = tmp_path_factory.mktemp('trained')
  loop.train(config, str(workdir))
  return workdir


@pytest.fixture
def refuse(
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capfd: pytest.CaptureFixture[str],
) -> Callable[..., str]:
  """Returns a function that runs a program and returns its only line.

  It makes sure of the exit status, that nothing below `tmp_path` was made or
  changed, and that no parameter was.
  """

  def init(self: Setup) -> None:
    pytest.fail('the model was initialised')

  monkeypatch.setattr(Setup, 'init', init)

  def run(program: str, flags: list[str]) -> str:
    before = runs.snapshot(tmp_path)
    capfd.readouterr()
    status = runs.call(program, flags)
    out, err = capfd.readouterr()
    assert runs.snapshot(tmp_path) == before
    return one_line(status, out, err)

  return run


def one_line(status: int, out: str, err: str) -> str:
  """The only line a refused command writes."""
  assert (status, out) == (2, ''), err
  (line,) = err.splitlines()
  assert line.startswith('error: ')
  return line


# What is wrong on an otherwise right command line, and what has to be said.
MISTAKES = {
  'misspelt key': (
    ['--config.moe.topk=1'],
    ["'moe.topk'", "did you mean 'moe.top_k'"],
  ),
  'misspelt section': (['--config.trian.steps=1'], ["'train.steps'"]),
  'unknown flag': (['--wrokdir=x'], ['--wrokdir', "'--workdir'"]),
  'not a number': (['--config.train.steps=many'], ['train.steps', 'many']),
  'out of range': (['--config.train.steps=0'], ['train.steps = 0', '1']),
  'an unknown choice': (
    ['--config.router.recurrent=gur'],
    ['router.recurrent', "'gur'", "'gru'"],
  ),
  'top_k above num_experts': (
    ['--config.moe.top_k=9'],
    ['moe.top_k = 9', 'moe.num_experts = 8'],
  ),
  'mesh does not divide the devices': (
    ['--config.mesh.fsdp=3'],
    ['mesh.fsdp', '= 3', '8'],
  ),
  'mesh is too small for the devices': (
    ['--config.mesh.data=2', '--config.mesh.expert=2'],
    ['mesh.data x mesh.fsdp x mesh.expert', '= 4', '8'],
  ),
  'mesh does not divide the experts': (
    ['--config.mesh.expert=8', '--config.moe.num_experts=12'],
    ['moe.num_experts = 12', 'mesh.expert = 8', '6, 12 would'],
  ),
  'slices along a mesh axis that has not so many devices': (
    ['--config.mesh.dcn.expert=2'],
    ['mesh.dcn.expert', '= 2', 'slices'],
  ),
  'a place without a coordinator': (
    ['--num_processes=2', '--process_id=1'],
    ['--num_processes = 2', '--coordinator=HOST:PORT'],
  ),
  'batch not divisible by the mesh': (
    ['--config.train.batch_size=12'],
    ['train.batch_size = 12', '= 8', '8 or 16'],
  ),
  'batch not divisible by the micro-batches': (
    ['--config.train.accumulation=3'],
    ['train.batch_size = 8', 'train.accumulation', '= 24'],
  ),
  'heads do not divide the width': (
    ['--config.model.num_heads=5', '--config.model.num_kv_heads=5'],
    ['model.hidden_size = 32', 'model.num_heads = 5', '30 or 35'],
  ),
  'vocabulary below the tokenizer': (
    ['--config.model.vocab_size=100'],
    ['model.vocab_size = 100', '257'],
  ),
  'unknown tokenizer': (
    ['--config.data.tokenizer=byte'],
    ["'byte'", "'bytes'"],
  ),
  'unknown data set': (
    ['--config.data.name=python_stdlb'],
    ["'python_stdlb'", 'python_stdlib'],
  ),
  'unknown split': (
    ['--config.data.train_split=tran'],
    ["'tran'", "'train'"],
  ),
  'empty split': (
    ['--config.data.train_split=test'],
    ["split 'test'", 'is empty', 'train: 5 documents'],
  ),
  'empty slice of a split': (
    ['--config.data.train_split=train[5:]'],
    ["'train[5:]'", 'is empty'],
  ),
  'no folder': (
    ['--config.data.path=/nowhere'],
    ["data.path = '/nowhere'", 'not a folder'],
  ),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_train_refuses(
  name: str, config: ConfigDict, tmp_path: Path, refuse: Callable[..., str]
) -> None:
  mistake, fragments = MISTAKES[name]
  flags = runs.arguments(config, tmp_path / 'new')
  line = refuse('train.py', flags + mistake)
  for fragment in fragments:
    assert fragment in line


@pytest.mark.parametrize('name', MISTAKES)
def test_resuming_refuses(
  name: str,
  config: ConfigDict,
  trained: Path,
  tmp_path: Path,
  refuse: Callable[..., str],
) -> None:
  # The same in the directory of a run: its files stay as they are.
  shutil.copytree(trained, tmp_path / 'run')
  flags = runs.arguments(config, tmp_path / 'run')
  refuse('train.py', flags + MISTAKES[name][0])


@pytest.mark.parametrize(
  'argument, fragments',
  [
    ('rmoe.py:nothing_like_it', ["'nothing_like_it'", 'presets: ']),
    ('rmoe.py:smoe,nothing_like_it', ["'nothing_like_it'", 'variants: ']),
    ('cartesian_moe.py:denze', ["'denze'", "'dense'"]),
    ('quickstart.py:cartesian,linaer', ["'linaer'", "'linear'"]),
    ('quikstart.py', ['quikstart.py', "'configs/quickstart.py'"]),
  ],
)
def test_unknown_presets_variants_and_files(
  argument: str,
  fragments: list[str],
  tmp_path: Path,
  refuse: Callable[..., str],
) -> None:
  flags = [f'--config=configs/{argument}', f'--workdir={tmp_path}/new']
  line = refuse('train.py', flags)
  for fragment in fragments:
    assert fragment in line


@pytest.mark.slow
def test_text_that_is_not_utf8(
  config: ConfigDict, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
  # In a process of its own: what the libraries say is on stderr too.
  folder = tmp_path_factory.mktemp('latin')
  names = (f'{i}.txt' for i in range(100))
  name = next(n for n in names if folders.split_of(n) == 'train')
  (folder / name).write_bytes('café'.encode('latin-1'))
  flags = runs.arguments(config, tmp_path / 'new')
  process = runs.start('train.py', [*flags, f'--config.data.path={folder}'])
  out, err = process.communicate()
  line = one_line(process.returncode, out, err)
  for fragment in (name, 'not UTF-8', 'byte 3', '0xe9'):
    assert fragment in line
  assert not (tmp_path / 'new').exists()


def test_a_workdir_of_another_model(
  config: ConfigDict,
  trained: Path,
  tmp_path: Path,
  refuse: Callable[..., str],
) -> None:
  shutil.copytree(trained, tmp_path / 'run')
  flags = runs.arguments(config, tmp_path / 'run')
  for program in ('train.py', 'eval.py'):
    line = refuse(program, [*flags, '--config.moe.num_experts=16'])
    for fragment in ('moe.num_experts was 8, now 16', str(tmp_path / 'run')):
      assert fragment in line
  line = refuse('train.py', [*flags, '--config.seed=1'])
  assert 'seed was 0, now 1' in line


def test_a_workdir_that_cannot_be_written(
  config: ConfigDict, tmp_path: Path, refuse: Callable[..., str]
) -> None:
  # Modes do not bind root. Nobody makes a folder below a file, or in /proc.
  (tmp_path / 'file').write_text('not a folder')
  for workdir in (tmp_path / 'file', tmp_path / 'file/run', Path('/proc/run')):
    line = refuse('train.py', runs.arguments(config, workdir))
    assert f'workdir {workdir} ' in line and 'Traceback' not in line


def test_a_config_of_a_run_that_is_damaged(
  config: ConfigDict, tmp_path: Path, refuse: Callable[..., str]
) -> None:
  (tmp_path / 'config.json').write_text('{"seed": 0, ')
  line = refuse('train.py', runs.arguments(config, tmp_path))
  assert str(tmp_path / 'config.json') in line


def test_a_config_of_a_run_that_is_a_pipe(
  config: ConfigDict, tmp_path: Path, refuse: Callable[..., str]
) -> None:
  """Nobody writes to it, so reading would never end."""
  os.mkfifo(tmp_path / 'config.json')
  line = refuse('train.py', runs.arguments(config, tmp_path))
  assert f'workdir {tmp_path} cannot be read: Not a regular file' in line


@pytest.mark.parametrize('name', ['s**t', 'q?'])
def test_a_run_whose_path_is_a_pattern_for_others(
  name: str,
  config: ConfigDict,
  trained: Path,
  tmp_path: Path,
  refuse: Callable[..., str],
) -> None:
  for folder in (name, 'qa'):
    shutil.copytree(trained, tmp_path / folder)
  line = refuse('eval.py', runs.arguments(config, tmp_path / name))
  assert f'workdir {tmp_path / name} is also a pattern' in line
  flag = f'--config.train.init_from={tmp_path / name}'
  line = refuse('train.py', [*runs.arguments(config, tmp_path / 'new'), flag])
  assert 'train.init_from: workdir' in line and 'also a pattern' in line


def test_evaluation_without_a_run(
  config: ConfigDict, tmp_path: Path, refuse: Callable[..., str]
) -> None:
  line = refuse('eval.py', runs.arguments(config, tmp_path / 'new'))
  assert str(tmp_path / 'new') in line and 'holds no run' in line


def test_a_run_on_other_data(
  config: ConfigDict,
  texts: Path,
  trained: Path,
  tmp_path: Path,
  capfd: pytest.CaptureFixture[str],
) -> None:
  workdir, folder = tmp_path / 'run', tmp_path / 'texts'
  shutil.copytree(trained, workdir)
  shutil.copytree(texts, folder)  # with other times, which do not count
  moved = ['--config.data.path=' + str(folder), '--config.train.steps=2']
  flags = runs.arguments(config, workdir) + moved
  assert runs.call('train.py', flags) == 0
  names = (f'more-{i}.txt' for i in range(50))
  name = next(name for name in names if folders.split_of(name) == 'train')
  (folder / name).write_text('one more')
  capfd.readouterr()
  line = one_line(runs.call('train.py', flags), *capfd.readouterr())
  for part in ('other data', 'documents 5 -> 6', '--config.data.changed=allow'):
    assert part in line
  assert runs.call('train.py', [*flags, '--config.data.changed=allow']) == 0


def test_evaluation_without_checkpoints(
  config: ConfigDict,
  trained: Path,
  tmp_path: Path,
  refuse: Callable[..., str],
) -> None:
  shutil.copy(trained / 'config.json', tmp_path)
  flags = runs.arguments(config, tmp_path)
  assert 'holds no checkpoint yet' in refuse('eval.py', flags)
  (tmp_path / 'checkpoints').mkdir()
  assert 'holds no checkpoint yet' in refuse('eval.py', flags)


@pytest.mark.slow
def test_evaluation_of_a_step_that_was_not_saved(
  config: ConfigDict, trained: Path
) -> None:
  before = runs.snapshot(trained)
  process = runs.start(
    'eval.py', [*runs.arguments(config, trained), '--step=7']
  )
  out, err = process.communicate()
  line = one_line(process.returncode, out, err)
  assert 'no checkpoint of step 7; there are 1, 2' in line
  assert runs.snapshot(trained) == before


@pytest.mark.parametrize(
  'flags, fragments',
  [
    (['--step=last'], ['--step', 'last']),
    (['--stpe=1'], ["'--step'"]),
    (['--split=tset'], ["'tset'"]),
    (['--split=test'], ["split 'test'", 'is empty']),
    (['--config.eval.batch_size=12'], ['eval.batch_size = 12', '8 or 16']),
    (['--config.mesh.fsdp=3'], ['mesh.fsdp', '= 3', '8']),
  ],
)
def test_eval_refuses(
  flags: list[str],
  fragments: list[str],
  config: ConfigDict,
  trained: Path,
  tmp_path: Path,
  refuse: Callable[..., str],
) -> None:
  shutil.copytree(trained, tmp_path / 'run')
  line = refuse('eval.py', runs.arguments(config, tmp_path / 'run') + flags)
  for fragment in fragments:
    assert fragment in line


@pytest.mark.parametrize('part', ['init', 'step'])
def test_a_memory_that_is_too_small(
  config: ConfigDict,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  part: str,
) -> None:
  def fail(*_: object) -> None:
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of\nmemory')

  if part == 'init':
    monkeypatch.setattr(Setup, 'init', fail)
  else:
    monkeypatch.setattr(loop, 'make_train_step', lambda setup: fail)
  with pytest.raises(UserError) as error:
    loop.train(config, str(tmp_path))
  for said in ('Out of memory', 'train.batch_size', 'model.remat', 'plan'):
    assert said in str(error.value)
