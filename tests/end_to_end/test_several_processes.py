"""Two processes train, stop, resume and evaluate as one would."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.helpers import marks, pairs, runs
from tests.helpers.pairs import Pair

STEPS, HALF = 6, 3
# Data and experts over four devices: the first axis crosses the processes.
AXES = {'mesh.data': 2, 'mesh.expert': 2}


@pytest.fixture(scope='module')
def config(make_config: Callable[..., ConfigDict]) -> ConfigDict:
  return make_config(
    **{
      'model.num_layers': 1,
      'train.steps': STEPS,
      'train.log_every': 1,
      'train.check_replicas_every': HALF,
      'checkpoint.every': HALF,
      'eval.every': 0,
    }
  )


def flags(config: ConfigDict, workdir: Path, **mesh: int) -> list[str]:
  """The command line of a run on a mesh, `AXES` if none is given."""
  axes = {f'mesh.{axis}': n for axis, n in mesh.items()} or AXES
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(axes)
  return runs.arguments(changed, workdir)


@pytest.fixture(scope='module')
def alone(config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The directory of a run of one process, on eight devices."""
  workdir = tmp_path_factory.mktemp('alone')
  mesh = {'data': 2, 'fsdp': 2, 'expert': 2}
  assert runs.call('train.py', flags(config, workdir, **mesh)) == 0
  return workdir


def losses(workdir: Path) -> list[tuple[int, str, float]]:
  """Step, split and loss of every line of metrics.jsonl."""
  rows = runs.rows(workdir)
  return [(row['step'], row['split'], row['loss']) for row in rows]


def assert_same_losses(workdir: Path, expected: Path) -> None:
  found, wanted = losses(workdir), losses(expected)
  assert [row[:2] for row in found] == [row[:2] for row in wanted]
  np.testing.assert_allclose(
    [row[2] for row in found], [row[2] for row in wanted], rtol=1e-5
  )


@pytest.fixture(scope='module')
def together(
  config: ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
  """The directory of a run of two processes, and what each has printed."""
  workdir = tmp_path_factory.mktemp('together')
  with Pair('train.py', flags(config, workdir)) as pair:
    assert pair.wait() == [0, 0], pair.report()
    return workdir, [pair.printed(i) for i in (0, 1)]


@pytest.mark.slow
def test_two_processes_train_like_one(
  alone: Path, together: tuple[Path, list[str]]
) -> None:
  workdir, printed = together
  assert f'step {STEPS}/{STEPS}' in printed[0] and not printed[1]
  assert 'expert 2 x context 1 x tensor 1), 2 processes\n' in printed[0]
  assert runs.checkpoints(workdir) == [HALF, STEPS]
  assert_same_losses(workdir, alone)


@pytest.mark.slow
def test_one_process_goes_on_from_the_checkpoint_of_two(
  config: ConfigDict,
  alone: Path,
  together: tuple[Path, list[str]],
  tmp_path: Path,
) -> None:
  workdir = tmp_path / 'halfway'
  shutil.copytree(together[0], workdir)
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  mesh = {'data': 2, 'fsdp': 2, 'expert': 2}
  assert runs.call('train.py', flags(config, workdir, **mesh)) == 0
  assert runs.checkpoints(workdir) == [HALF, STEPS]
  assert_same_losses(workdir, alone)


@pytest.mark.slow
def test_two_processes_fall_back_together(
  config: ConfigDict,
  alone: Path,
  together: tuple[Path, list[str]],
  tmp_path: Path,
) -> None:
  workdir = tmp_path / 'damaged'
  shutil.copytree(together[0], workdir)
  # The arrays of process 1 alone, which process 0 does not write.
  parts = workdir / f'checkpoints/{STEPS}/state/ocdbt.process_1/d'
  largest = max(parts.iterdir(), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  again = [*flags(config, workdir), '--config.checkpoint.fallback=on']
  with Pair('train.py', again) as pair:
    assert pair.wait() == [0, 0], pair.report()
    told = [pair.errors(i).count('is set aside as') for i in (0, 1)]
  assert told == [1, 0]
  assert runs.checkpoints(workdir) == [HALF, STEPS]
  assert (workdir / f'checkpoints-damaged/{STEPS}').is_dir()
  assert_same_losses(workdir, alone)


# On CPU a collective gives up after 30 seconds.
@pytest.mark.parametrize(
  'patience', ['0.5', pytest.param('35', marks=pytest.mark.slow)]
)
def test_what_processes_do_together(patience: str, tmp_path: Path) -> None:
  """The assertions are in the program that both run."""
  path = str(pairs.ROOT)
  program = 'tests/helpers/both_processes.py'
  pairs.finish(program, [str(tmp_path), patience], PYTHONPATH=path)


MODELS = {
  'parameters over processes': (
    {
      'moe.factors': 2,
      'router.recurrent': 'gru',
      'train.accumulation': 2,
      'train.batch_size': 16,
    },
    {'data': 1, 'fsdp': 4},
  ),
  'experts over processes': (
    {'moe.num_experts': 8, 'mesh.dcn.data': 1, 'mesh.dcn.expert': 2},
    {'data': 1, 'fsdp': 2, 'expert': 2},
  ),
  'memories over processes': (
    {
      'model.positions': 'span',
      'model.span': 8,
      'data.order': 'contiguous',
      'mesh.dcn.data': 1,
      'mesh.dcn.tensor': 2,
    },
    {'data': 2, 'tensor': 2},
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_every_axis_may_cross_processes(
  name: str, config: ConfigDict, tmp_path: Path
) -> None:
  """Also on from a checkpoint of one process, and with evaluation after it."""
  values, mesh = MODELS[name]
  changed = config.copy_and_resolve_references()
  evaluated = {'eval.every': HALF, 'eval.batches': 2}
  changed.update_from_flattened_dict(values | evaluated)
  one = changed.copy_and_resolve_references()
  for axis in ('data', 'expert', 'tensor'):
    one.mesh.dcn[axis] = 1
  alone, together = tmp_path / 'alone', tmp_path / 'together'
  assert runs.call('train.py', flags(one, alone, data=-1)) == 0
  shutil.copytree(alone, together)
  shutil.rmtree(together / 'checkpoints' / str(STEPS))
  pairs.finish('train.py', flags(changed, together, **mesh))
  assert_same_losses(together, alone)

  # Of the same checkpoint: what it evaluates to, in two processes and in one.
  found = {}
  for label in ('two', 'one'):
    if label == 'two':
      pairs.finish('eval.py', flags(changed, together, **mesh))
    else:
      assert runs.call('eval.py', flags(one, together, data=-1)) == 0
    (path,) = (together / 'evaluation').iterdir()
    found[label] = runs.read_json(path)
    path.unlink()
  assert found['two']['tokens'] == found['one']['tokens']
  assert found['two']['loss'] == pytest.approx(found['one']['loss'], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('target', 'number', 'statuses'),
  marks.at_first(
    2,
    (
      (1, signal.SIGINT, [143, 130]),
      (0, signal.SIGHUP, [129, 143]),
      (1, signal.SIGTERM, [143, 143]),
      (0, signal.SIGTERM, [143, 143]),
    ),
  ),
)
def test_a_signal_to_one_process_stops_both_after_the_same_step(
  target: int,
  number: signal.Signals,
  statuses: list[int],
  config: ConfigDict,
  tmp_path: Path,
) -> None:
  long = config.copy_and_resolve_references()
  long.update_from_flattened_dict(
    {'train.steps': 100_000, 'checkpoint.every': 100_000}
  )
  with Pair('train.py', flags(long, tmp_path)) as pair:
    pair.wait_for('step     20/')
    pair.processes[target].send_signal(number)
    assert pair.wait() == statuses, pair.report()
    (stopped,) = runs.checkpoints(tmp_path)
    assert f', stopped at step {stopped} of 100000\n' in pair.printed(0)
  assert 20 < stopped < 100_000
  assert runs.rows(tmp_path)[-1]['step'] == stopped

  # And on, from there: the very next step.
  long.train.steps = stopped + 2
  long.optimizer.decay_steps = 100_000
  with Pair('train.py', flags(long, tmp_path)) as pair:
    assert pair.wait() == [0, 0], pair.report()
  steps = [row['step'] for row in runs.rows(tmp_path)]
  assert steps == list(range(1, stopped + 3))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other(
  config: ConfigDict, tmp_path: Path
) -> None:
  long = config.copy_and_resolve_references()
  long.train.steps = 100_000
  for target in (0, 1):
    workdir = tmp_path / str(target)
    with Pair('train.py', flags(long, workdir)) as pair:
      pair.wait_for('step      5/')
      pair.processes[target].kill()
      statuses = pair.wait()
    assert statuses[target] == -signal.SIGKILL
    assert statuses[1 - target] == 75


@pytest.mark.slow
def test_what_one_process_lacks_both_are_told(
  config: ConfigDict, tmp_path: Path
) -> None:
  """Neither trains alone, and neither waits for the other."""
  here, there = tmp_path / 'here', tmp_path / 'there'
  broken = tmp_path / 'broken'
  broken.mkdir()
  (broken / 'metrics.jsonl').write_text('not\nJSON\n')  # process 0 reads it
  lacking = config.copy_and_resolve_references()
  lacking.data.path = str(tmp_path / 'nowhere')
  cases = [
    (
      [flags(config, here), flags(config, there)],
      ['process 1 of 2 has failed', f'workdir {there} is not the same on all'],
    ),
    (
      [flags(config, here), flags(lacking, here)],
      ['process 1 of 2 has failed', 'data.path'],
    ),
    (
      [flags(lacking, here), flags(config, here)],
      ['data.path', 'process 0 of 2 has failed'],
    ),
    (
      [flags(config, broken)] * 2,
      ['metrics.jsonl:1 is not', 'process 0 of 2 has failed'],
    ),
  ]
  for both, expected in cases:
    with Pair('train.py', *both) as pair:
      assert pair.wait() == [2, 2], pair.report()
      for i in (0, 1):
        (line,) = [
          line
          for line in pair.errors(i).splitlines()
          if line.startswith('error: ')
        ]
        assert expected[i] in line
        assert 'Traceback' not in pair.errors(i)
    assert not list(here.glob('checkpoints/*'))
