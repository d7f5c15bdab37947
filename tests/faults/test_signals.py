"""Forty signals to real runs, wherever they are: nothing that was done is lost.

Each ends within its bound, and with `-s` the figures are printed.
"""

import os
import pty
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import pytest

from tests.helpers import marks, runs
from tests.helpers.forks import Forked, Server

pytestmark = pytest.mark.slow

# Seconds; several times what it takes alone.
BOUND = 30.0
CONFIG = '--config=tests/helpers/slow_config.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
  return f'--config.data.dir={tmp_path_factory.mktemp("prepared")}'


@pytest.fixture(autouse=True)
def told(
  request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> Iterator[None]:
  """Prints each figure, also where output is captured."""
  began = time.monotonic()
  yield
  with capsys.disabled():
    print(f'\n{request.node.name}: {time.monotonic() - began:.1f} s in all')


def steps(workdir: Path, split: str = 'train') -> list[int]:
  """The steps that have a line, as far as they are written whole."""
  if not (workdir / 'metrics.jsonl').exists():
    return []
  return [row['step'] for row in runs.rows(workdir, split)]


def newest(workdir: Path) -> int:
  """The step of the newest checkpoint, 0 without one."""
  folder = workdir / 'checkpoints'
  names = os.listdir(folder) if folder.exists() else []
  return max([int(name) for name in names if name.isdecimal()], default=0)


def has_step(run: Forked, step: int) -> Callable[[], bool]:
  return lambda: step in steps(run.workdir)


def says(run: Forked, text: str) -> Callable[[], bool]:
  return lambda: text in run.printed()


def assert_ended(run: Forked, number: int, before: int) -> None:
  """It ended as asked, in time, with all that it had done."""
  status, seconds = run.ends(BOUND + 60)
  print(f'  {signal.Signals(number).name}: {status} in {seconds:.1f} s')
  assert status == 128 + number, run.errors()
  assert seconds < BOUND
  assert 'Traceback' not in run.errors()
  assert newest(run.workdir) >= before
  if before:
    assert steps(run.workdir)[-1] == newest(run.workdir)


def assert_goes_on(server: Server, flags: list[str], run: Forked) -> None:
  """The same command goes on, and no line is missing or there twice."""
  last = newest(run.workdir) + 2
  more = server.start([*flags, f'--config.train.steps={last}'], run.workdir)
  assert more.ends()[0] == 0, more.errors()
  assert steps(run.workdir) == list(range(1, last + 1))
  evaluated = [*range(10, last + 1, 10)]
  if '--config.eval.every=0' not in flags:
    evaluated = sorted({*evaluated, last})
    assert steps(run.workdir, 'validation') == evaluated


IMPORTS = ('_multiarray_umath', 'libjax_common')


@pytest.mark.parametrize('library', IMPORTS)
@pytest.mark.parametrize('number', [SIGINT, SIGTERM, SIGHUP])
def test_imports(number: int, library: str, tmp_path: Path) -> None:
  process = runs.start('train.py', [CONFIG, f'--workdir={tmp_path}/run'])
  maps = Path(f'/proc/{process.pid}/maps')
  while library not in maps.read_text():
    assert process.poll() is None
    time.sleep(0.005)
  process.send_signal(number)
  began = time.monotonic()
  out, err = process.communicate(timeout=BOUND)
  assert (process.returncode, out, err) == (128 + number, '', '')
  assert time.monotonic() - began < BOUND
  assert not (tmp_path / 'run').exists()


TWICE = [[SIGINT], [SIGTERM], [SIGHUP], [SIGTERM, SIGTERM]]


@pytest.mark.parametrize('numbers', TWICE)
def test_data_preparation(
  numbers: list[int], server: Server, tmp_path: Path
) -> None:
  flags = [f'{CONFIG}:read=300', f'--config.data.dir={tmp_path}/data']
  run = server.start(flags, tmp_path / 'run')
  run.wait_for(lambda: [*(tmp_path / 'data').rglob('*incomplete*')])
  for number in numbers:
    run.signal(number)
    time.sleep(0.2)
  assert_ended(run, numbers[0], 0)
  assert not run.workdir.exists()


@pytest.mark.parametrize('numbers', TWICE)
def test_first_compile(
  numbers: list[int], server: Server, data: str, tmp_path: Path
) -> None:
  """Nothing is to be saved, so it does not wait for the compiler."""
  flags = [CONFIG, data, '--config.model.num_layers=4']
  run = server.start(flags, tmp_path / 'run')
  run.wait_for(says(run, 'compiling the training step'))
  for number in numbers:
    run.signal(number)
    time.sleep(0.02)
  assert_ended(run, numbers[0], 0)
  assert not newest(run.workdir)


STEPS = [
  [SIGTERM],
  [SIGHUP, SIGTERM],
  [SIGINT],
  [SIGHUP],
  [SIGTERM, SIGTERM],
  [SIGINT, SIGINT],
]


@pytest.mark.parametrize('numbers', marks.at_first(2, STEPS))
def test_steps(
  numbers: list[int], server: Server, data: str, tmp_path: Path
) -> None:
  """A second signal while the first one's save runs does not end it."""
  flags = [f'{CONFIG}:save=2', data, '--config.eval.every=0']
  flags.append('--config.checkpoint.every=100000')
  run = server.start(flags, tmp_path / 'run')
  run.wait_for(has_step(run, 7))
  before = steps(run.workdir)[-1]
  for number in numbers:
    run.signal(number)
    time.sleep(0.02)
  assert_ended(run, numbers[0], before)
  if len(numbers) > 1:
    assert 'too soon to count' in run.errors()
    assert_goes_on(server, flags, run)


@pytest.mark.parametrize(
  'numbers',
  marks.at_first(2, [[SIGTERM, SIGTERM], *TWICE[:3], [SIGINT, SIGTERM]]),
)
def test_evaluation(
  numbers: list[int], server: Server, data: str, tmp_path: Path
) -> None:
  """It is left after a batch, and made up for when the run goes on."""
  flags = [f'{CONFIG}:batch=9', data]
  run = server.start(flags, tmp_path / 'run')
  run.wait_for(says(run, 'evaluating'))
  for number in numbers:
    run.signal(number)
    time.sleep(0.2)
  assert_ended(run, numbers[0], 10)
  assert newest(run.workdir) == 10 and not steps(run.workdir, 'validation')
  if len(numbers) > 1:
    assert_goes_on(server, [CONFIG, data], run)


@pytest.mark.parametrize('numbers', marks.at_first(2, STEPS))
def test_saves(
  numbers: list[int], server: Server, data: str, tmp_path: Path
) -> None:
  flags = [f'{CONFIG}:save=2', data, '--config.eval.every=0']
  run = server.start(flags, tmp_path / 'run')
  run.wait_for(says(run, 'saving'))
  before = steps(run.workdir)[-1]
  for number in numbers:
    run.signal(number)
    time.sleep(0.3)
  assert_ended(run, numbers[0], before)


def test_a_late_third_signal_ends_a_save(
  server: Server, data: str, tmp_path: Path
) -> None:
  flags = [f'{CONFIG}:save=300', data, '--config.eval.every=0']
  run = server.start(flags, tmp_path / 'run')
  run.wait_for(says(run, 'saving'))
  for pause in (0.3, 6, 0):
    run.signal(SIGTERM)
    time.sleep(pause)
  status, seconds = run.ends()
  assert status == 128 + SIGTERM and seconds < BOUND
  assert_goes_on(server, [CONFIG, data, flags[2]], run)


WHERE = {
  'compile': ('', 'compiling the training step', 0),
  'step': ('', 'step      7/', 7),
  'evaluation': (':batch=9', 'evaluating', 10),
  'save': (':save=2', 'saving', 10),
}


@pytest.mark.parametrize('where', WHERE)
def test_a_terminal_is_closed(
  where: str, server: Server, data: str, tmp_path: Path
) -> None:
  names, text, before = WHERE[where]
  flags = [f'{CONFIG}{names}', data]
  master, slave = pty.openpty()
  run = server.start(
    flags, tmp_path / 'run', Path(os.ttyname(slave)), terminal=True
  )
  printed = b''

  def says_so() -> bool:
    nonlocal printed
    if select.select([master], [], [], 0)[0]:
      printed += os.read(master, 4096)
    return text.encode() in printed

  run.wait_for(says_so)
  os.close(slave)
  os.close(master)
  assert_ended(run, SIGHUP, before)
  if before:
    assert_goes_on(server, [CONFIG, data], run)


@pytest.mark.parametrize('number', [None, SIGTERM])
@pytest.mark.parametrize('gone', ['reader', 'disk'])
def test_nobody_reads(
  gone: str, number: int | None, server: Server, data: str, tmp_path: Path
) -> None:
  """Output that cannot be written ends nothing: `| head`, a full log disk."""
  flags = [CONFIG, data]
  if number is None:
    flags.append('--config.train.steps=25')
  out = Path('/dev/full')
  if gone == 'reader':
    out = tmp_path / 'pipe'
    os.mkfifo(out)
  run = server.start(flags, tmp_path / 'run', out)
  if gone == 'reader':
    with open(out) as file:
      for line in file:
        if line.startswith('step '):
          break
  if number is None:
    status, _ = run.ends()
    # As `head` leaves it, once the training is done.
    assert status == (128 + signal.SIGPIPE if gone == 'reader' else 0)
    assert newest(run.workdir) == 25 and steps(run.workdir)[-1] == 25
  else:
    run.wait_for(has_step(run, 7))
    before = steps(run.workdir)[-1]
    run.signal(number)
    assert_ended(run, number, before)
  assert run.errors().count('Traceback') == 0


def test_there_are_forty() -> None:
  """As many as the measure asks for."""
  counts = [6, len(TWICE), len(TWICE), len(STEPS), 5, len(STEPS), 1, 4, 4]
  assert sum(counts) == 40
