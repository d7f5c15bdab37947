"""The command line: what is accepted, and each mistake in one line."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli, runtime
from moe_jax import config as config_lib
from moe_jax.config import loading, saved
from moe_jax.errors import UserError, nearest

BASE = '--config=configs/base.py'
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(ROOT)


def define_step(values: flags.FlagValues) -> None:
  flags.DEFINE_integer('step', None, 'a step', flag_values=values)


def parse(*arguments: str) -> tuple[ConfigDict, dict[str, object]]:
  return cli.parse(['prog', *arguments], define_step)


def test_overrides_in_every_spelling() -> None:
  config, values = parse(
    '--config.train.steps=7',
    '--workdir',
    'runs/x',
    '--config.mesh.data',
    '-1',
    '--noconfig.moe.renormalize',
    BASE,
    '--config.optimizer.learning_rate=3e-4',
    '--step=5',
    '--config.data.path=a=b',
  )
  assert config.train.steps == 7
  assert config.mesh.data == -1
  assert config.moe.renormalize is False
  assert config.optimizer.learning_rate == 3e-4
  assert config.data.path == 'a=b'
  assert values == {'workdir': 'runs/x', 'step': 5}
  assert config.is_locked


def test_a_program_without_a_workdir() -> None:
  _, values = cli.parse(['prog', BASE], workdir=False)
  assert values == {}


BAD = {
  'no config': (['--workdir=x'], ['--config is missing', 'x holds no run']),
  'no workdir': ([BASE], ['--workdir is missing']),
  'no such file': (['--config=configs/bse.py', '--workdir=x'], ['base.py']),
  'misspelt section': ([BASE, '--config.trian.steps=1'], ["'train.steps'"]),
  'misspelt key': ([BASE, '--config.moe.topk=1'], ["'moe.top_k'"]),
  'misspelt key, apart': ([BASE, '--config.moe.topk', '1'], ["'moe.top_k'"]),
  'section left out': ([BASE, '--config.top_k=1'], ["'moe.top_k'"]),
  'nothing like it': ([BASE, '--config.optimizer.lr=1'], ['learning_rate']),
  'a section': ([BASE, '--config.moe.shared={}'], ['is a section']),
  'unknown flag': ([BASE, '--wrkdir=x'], ["'--workdir'"]),
  'not an integer': (
    [BASE, '--config.train.steps=1e3'],
    ["config.train.steps = '1e3' must be a whole number, at least 1"],
  ),
  'not a number': (
    [BASE, '--config.loss.z_weight=x'],
    ['config.loss.z_weight', 'a number, at least 0'],
  ),
  'not a boolean': (
    [BASE, '--config.moe.bias=2'],
    ["config.moe.bias = '2' must be True or False"],
  ),
  'flag of a wrong type': ([BASE, '--step=last'], ['--step', 'last']),
  'no value': ([BASE, '--config.moe.top_k'], ['config.moe.top_k']),
  'stray word': ([BASE, 'quickly'], ["'quickly'"]),
  'names it has not': ([BASE + ':big'], ['takes no names']),
}


@pytest.mark.parametrize('name', BAD)
def test_mistakes_on_the_command_line(name: str) -> None:
  arguments, fragments = BAD[name]
  workdir = [] if name == 'no workdir' else ['--workdir=x']
  with pytest.raises(UserError) as error:
    parse(*workdir, *arguments) if name != 'no config' else parse(*arguments)
  for fragment in fragments:
    assert fragment in str(error.value)
  assert '\n' not in str(error.value)


HEAD = (
  'from configs import base; from ml_collections import ConfigDict\n\n'
  'def get_config(names=""):\n  '
)
BAD_FILES = {
  'config = base.get_config(); config.moe.topk = 1': [':4: ', "'moe.top_k'"],
  'config = base.get_config(); config.trian.steps = 1': ["'train'"],
  'base.get_config().moe.evry': ["'moe.every'", "'eval.every'"],
  'config = base.get_config(); config.moe.top_k = "2"': [':4: TypeError'],
  'return ConfigDict()': ['is missing'],
  'return {}': ['returned a dict'],
  'return 1 / 0': [':4: ZeroDivisionError'],
  'return (': [':4: '],
  'config = base.get_config().unlock(); config.new = 1; return config': [
    "no config key 'new'"
  ],
  'return ConfigDict({**base.get_config(), "seed": "1"})': [
    "seed = '1' must be a whole number, between 0"
  ],
}


@pytest.mark.parametrize('body', BAD_FILES)
def test_mistakes_in_a_config_file(body: str, tmp_path: Path) -> None:
  path = tmp_path / 'mine.py'
  path.write_text(HEAD + body + '\n')
  with pytest.raises(UserError) as error:
    loading.load(f'{path}:small')
  for fragment in [str(path), *BAD_FILES[body]]:
    assert fragment in str(error.value)


def test_files_that_are_no_configs(tmp_path: Path) -> None:
  for name, text, fragment in (
    ('a.txt', '', 'not a Python file'),
    ('b.py', 'x = 1', 'has no function get_config'),
    ('c.py', 'def get_config(names): pass', 'needs a name'),
  ):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=fragment):
      loading.load(str(tmp_path / name))


def run_main(
  run: object, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> int:
  """The exit status of a program whose work is `run`."""
  monkeypatch.setattr(sys, 'argv', ['prog', BASE, '--workdir=x', *arguments])
  monkeypatch.setenv(runtime.SWITCH, '0')
  with pytest.raises(SystemExit) as stop:
    cli.main(run)
  return stop.value.code


def test_exit_status_of_what_run_raises(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  def refuse(config: ConfigDict, workdir: str) -> None:
    raise UserError(f'{workdir} is\nno good')

  def interrupt(config: ConfigDict, workdir: str) -> None:
    raise KeyboardInterrupt

  def succeed(config: ConfigDict, workdir: str) -> None:
    pass

  assert run_main(succeed, monkeypatch) == 0
  assert run_main(interrupt, monkeypatch) == 130
  assert capsys.readouterr() == ('', '')
  assert run_main(refuse, monkeypatch) == 2
  assert capsys.readouterr() == ('', 'error: x is no good\n')


PRINTS = """
import sys
from moe_jax import cli

def run(config, workdir):
  print('x' * {length})

cli.main(run)
"""


@pytest.mark.parametrize('length', [10, 100_000])
def test_output_that_nobody_reads_to_its_end(length: int) -> None:
  """As before `head`: that which fits the buffer, and that which does not."""
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run(
    [sys.executable, '-c', PRINTS.format(length=length), BASE, '--workdir=x'],
    cwd=ROOT,
    stdout=write,
    stderr=subprocess.PIPE,
    text=True,
  )
  os.close(write)
  assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, '')


def test_a_programming_error_keeps_its_traceback(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  def fail(config: ConfigDict, workdir: str) -> None:
    raise ValueError('a bug')

  monkeypatch.setattr(sys, 'argv', ['prog', BASE, '--workdir=x'])
  monkeypatch.setenv(runtime.SWITCH, '0')
  with pytest.raises(ValueError, match='a bug'):
    cli.main(fail)


def test_a_backend_that_is_not_there_is_one_line(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  def fail(config: ConfigDict, workdir: str) -> None:
    raise RuntimeError("Unable to initialize backend 'tpu':\n not found")

  monkeypatch.setattr(sys, 'argv', ['prog', BASE, '--workdir=x'])
  monkeypatch.setenv(runtime.SWITCH, '0')
  monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
  with pytest.raises(SystemExit) as stop:
    cli.main(fail)
  assert stop.value.code == 2
  said = "JAX_PLATFORMS is tpu: Unable to initialize backend 'tpu': not found"
  assert capsys.readouterr().err == f'error: {said}\n'


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit) as stop:
    parse('--help')
  assert stop.value.code == 0
  printed = capsys.readouterr().out
  for flag in ('--config', '--workdir', '--step'):
    assert flag in printed


def test_help_tells_the_keys_of_a_section(
  capsys: pytest.CaptureFixture[str],
) -> None:
  with pytest.raises(SystemExit) as stop:
    parse('--help=router')
  assert stop.value.code == 0
  printed = capsys.readouterr().out
  assert '--config.router.recurrent=none' in printed
  assert 'none, rnn, gru, lstm' in printed
  with pytest.raises(UserError, match="did you mean 'router'"):
    parse('--help=ruoter')


def test_a_misspelt_flag_is_named_before_what_is_missing() -> None:
  with pytest.raises(UserError, match="--wrkdir; did you mean '--workdir'"):
    cli.parse(['prog', '--wrkdir=x'], define_step)


def test_nothing_is_suggested_that_is_not_alike() -> None:
  assert nearest('json', ['snli', 'xnli']) == ''
  assert nearest('topk', ['top_k', 'every']) == "; did you mean 'top_k'?"


def test_the_config_of_a_run_is_taken_where_none_is_named(
  tmp_path: Path,
) -> None:
  config = config_lib.get_config()
  config.train.steps = 7
  (tmp_path / 'config.json').write_text(saved.to_json(config))
  for known in (True, False):
    read, values = cli.parse(
      ['prog', f'--workdir={tmp_path}', '--config.seed=3'], workdir=known
    )
    assert (read.train.steps, read.seed) == (7, 3)
    assert ('workdir' in values) == known
  with pytest.raises(UserError, match=r'--config is missing, and .* no run'):
    cli.parse(['prog', f'--workdir={tmp_path}/none'])


def test_the_home_directory_is_expanded(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('HOME', str(tmp_path))
  config, values = parse(
    BASE, '--workdir=~/run', '--config.train.init_from=~/other'
  )
  assert values['workdir'] == f'{tmp_path}/run'
  assert config.train.init_from == f'{tmp_path}/other'


def moe_jax(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
  """Runs `python -m moe_jax` with these arguments."""
  return subprocess.run(
    [sys.executable, '-X', 'importtime', '-m', 'moe_jax', *arguments],
    cwd=cwd,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  'arguments, status, message',
  [
    ([], 0, 'evaluates a checkpoint'),
    (['--help'], 0, 'moe_jax PROGRAM'),
    (['trian'], 2, "there is no program 'trian'; did you mean 'train'?"),
    (['presets'], 0, 'enwik8_medium'),
    (['presets', 'rmoe'], 0, 'Layerwise Recurrent Router'),
    (['presets', 'rmeo'], 2, "did you mean 'rmoe'?"),
    (['train', '--help=moe'], 0, '--config.moe.top_k=2'),
    (['plan', '--help'], 0, '--topology'),
    (['convert', '--help'], 0, 'moe_jax convert verify WORKDIR'),
    (['convert', 'upcycle', '--help'], 0, 'as a trained dense one'),
  ],
)
def test_the_command_answers_without_jax(
  arguments: list[str], status: int, message: str, tmp_path: Path
) -> None:
  done = moe_jax(*arguments, cwd=tmp_path)
  assert done.returncode == status, done.stderr
  assert message in done.stdout + done.stderr
  imported = {line.split()[-1] for line in done.stderr.splitlines()}
  assert 'jax' not in imported


def test_malloc_is_set_before_a_config_that_imports_jax(
  tmp_path: Path,
) -> None:
  (tmp_path / 'mine.py').write_text(
    'import jax\n\nfrom moe_jax.config import get_config as defaults\n\n'
    'def get_config(): return defaults()\n'
  )
  code = """
import sys
from moe_jax import cli, runtime
runtime.configure_malloc = lambda: print('jax' in sys.modules)
def run(config):
  print('jax' in sys.modules)
cli.main(run, workdir=False)
"""
  done = subprocess.run(
    [sys.executable, '-c', code, '--config=mine.py'],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.stdout.split() == ['False', 'True']


def test_programs_exit_with_2_before_importing_jax() -> None:
  for program in ('train.py', 'eval.py'):
    done = subprocess.run(
      [sys.executable, '-X', 'importtime', program, '--config=nowhere.py'],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith('import time:')]
    assert done.returncode == 2
    assert said == ['error: --workdir is missing: the directory of the run']
    assert not any(line.split()[-1] == 'jax' for line in lines)


@pytest.mark.parametrize(
  'platforms, devices, tuned',
  [
    ('cpu', ['/dev/nvidia0'], True),  # the user decides
    ('cuda,cpu', [], False),
    ('tpu', [], False),
    ('', [], True),
    ('', ['/dev/accel0'], False),
  ],
)
def test_the_allocator_is_set_on_cpus_only(
  monkeypatch: pytest.MonkeyPatch,
  platforms: str,
  devices: list[str],
  tuned: bool,
) -> None:
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setattr(runtime.glob, 'glob', lambda pattern: devices)
  assert runtime.runs_on_cpu() == tuned


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
  """A machine with a GPU, and the user's cache on it."""
  for name in ('JAX_PLATFORMS', *GPU_VARIABLES):
    # Set first, so that what a test's subject sets is taken back too.
    monkeypatch.setenv(name, '')
    monkeypatch.delenv(name)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(runtime.glob, 'glob', lambda pattern: [pattern])
  return tmp_path / 'moe_jax' / 'compiled'


GPU_VARIABLES = (
  'XLA_PYTHON_CLIENT_MEM_FRACTION',
  'XLA_CLIENT_MEM_FRACTION',
  'JAX_COMPILATION_CACHE_DIR',
  'JAX_ENABLE_COMPILATION_CACHE',
)


def of_gpus() -> list[str | None]:
  runtime.configure_gpu()
  return [os.environ.get(name) for name in GPU_VARIABLES]


def test_gpus_are_ours_alone_and_what_is_compiled_is_kept(
  with_gpu: Path,
) -> None:
  assert of_gpus() == ['0.92', None, str(with_gpu), None]
  assert stat.S_IMODE(with_gpu.stat().st_mode) == 0o700
  assert not list(with_gpu.iterdir())


def test_the_user_decides_over_gpus(
  with_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '0.5')
  monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'False')
  assert of_gpus() == [None, '0.5', None, 'False']  # both would be an error
  monkeypatch.delenv('XLA_CLIENT_MEM_FRACTION')
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.3')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'mine')
  assert of_gpus() == ['0.3', None, 'mine', 'False']
  assert not with_gpu.exists()


def test_nothing_of_gpus_is_set_on_cpus(
  with_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert of_gpus() == [None] * 4 and not with_gpu.exists()


@pytest.mark.parametrize('trouble', ['a file', 'a full disk'])
def test_without_room_nothing_compiled_is_kept(
  trouble: str,
  with_gpu: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  if trouble == 'a file':
    with_gpu.parent.touch()
  else:
    usage = shutil.disk_usage(with_gpu.parents[1])._replace(free=1 << 30)
    monkeypatch.setattr(runtime.shutil, 'disk_usage', lambda path: usage)
  assert of_gpus()[2] is None
  said = capsys.readouterr().err
  assert said.startswith('note: what is compiled is not kept (')
  assert 'JAX_ENABLE_COMPILATION_CACHE=0' in said and said.count('\n') == 1


def test_the_allocator_has_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv(runtime.SWITCH, '0')
  assert not runtime.configure_malloc()


def tuned(code: str) -> str:
  """What a process prints that sets the allocator, prints whether, and goes on.

  One of its own: the settings cannot be taken back.
  """
  return subprocess.run(
    [
      sys.executable,
      '-c',
      f'from moe_jax import runtime as a; print(a.configure_malloc()){code}',
    ],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', runtime.SWITCH: '1'},
    capture_output=True,
    text=True,
  ).stdout


@pytest.mark.skipif(
  not os.path.exists('/lib64/ld-linux-x86-64.so.2'), reason='needs glibc'
)
def test_glibc_accepts_the_settings() -> None:
  assert tuned('') == 'True\n'


@pytest.mark.skipif(
  not os.path.exists('/lib64/ld-linux-x86-64.so.2'), reason='needs glibc'
)
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
  said = tuned("""
def resident():
  return int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20
bytearray(256 << 20)
print(resident() > 256)
a.trim_malloc()
print(resident() < 64)""")
  assert said == 'True\n' * 3
