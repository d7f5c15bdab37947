"""Programs side by side: their shares, their errors and their end."""

import os
import signal
import time
from pathlib import Path

import pytest

from moe_jax import runtime
from moe_jax.errors import UserError
from moe_jax.programs import pool
from moe_jax.programs.pool import Job, Pool, Share
from tests.helpers import processes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
  """A machine of seven cores and no accelerator."""
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(7)))
  monkeypatch.setattr(runtime, 'runs_on_cpu', lambda: True)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
  """A machine with GPUs 0 and 5."""
  monkeypatch.setattr(runtime, 'runs_on_cpu', lambda: False)
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,5')


def cpus(jobs: int | None, most: int = 100) -> list[tuple[int, ...]]:
  return [share.cpus for share in pool.shares(jobs, most)]


def test_every_job_has_equally_many_cores(cores: None) -> None:
  assert cpus(3) == [(0, 1), (2, 3), (4, 5)]
  assert cpus(1) == [tuple(range(7))]
  assert cpus(9) == [*((n,) for n in range(7)), (0,), (1,)]


def test_as_many_jobs_as_there_is_room_for(cores: None) -> None:
  assert len(cpus(None)) == 7
  assert cpus(None, most=2) == [(0, 1, 2), (3, 4, 5)]


def test_a_gpu_for_each_job(gpus: None) -> None:
  devices = [share.env for share in pool.shares(None, 100)]
  assert devices == [{'CUDA_VISIBLE_DEVICES': n} for n in ('0', '5')]
  three = [share.env for share in pool.shares(3, 100)]
  assert [env['CUDA_VISIBLE_DEVICES'] for env in three] == ['0', '5', '0']
  memory = {env['XLA_PYTHON_CLIENT_MEM_FRACTION'] for env in three}
  assert memory == {'0.450'}


def test_too_many_or_too_few(
  gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  assert pool.shares(None, 5) == [Share()]
  with pytest.raises(UserError, match='--jobs = 2: these devices are for one'):
    pool.shares(2, 5)
  with pytest.raises(UserError, match='--jobs = 0 must be at least 1'):
    pool.shares(0, 5)


def test_a_job_ends_at_its_first_error(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(ROOT)
  good, bad = ('presets', 'rmoe'), ('presets', 'rmo')
  logs = [str(tmp_path / name) for name in 'ab']
  jobs = [Job('a', [good, good], logs[0]), Job('b', [good, bad, good], logs[1])]
  core = min(os.sched_getaffinity(0))
  with Pool([Share((core,)), Share((core,))], {}) as programs:
    told = list(programs.run(jobs))
  assert told[:2] == [(jobs[0], None), (jobs[1], None)]
  ended = {job.name: error for job, error in told[2:]}
  assert ended['a'] == ''
  assert ended['b'].startswith("error: preset file = 'rmo' is not known")
  # What stood in the log before is no error of this time.
  with Pool([Share()], {}) as programs:
    job = Job('c', [('presets', 'rmo', 'more')], logs[1])
    assert [error for _, error in programs.run([job])] == [
      None,
      "error: 'more' is one name too many",
    ]
  title = 'RMoE: Layerwise Recurrent Router'
  assert [Path(log).read_text().count(title) for log in logs] == [2, 1]


def test_leaving_ends_what_runs(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(ROOT)
  workdir = str(tmp_path / 'run')
  train = ['train', '--config=quickstart', f'--workdir={workdir}']
  job = Job('a', [train], str(tmp_path / 'log'))
  with (
    pytest.raises(RuntimeError, match='a fault'),
    Pool([Share()], {}) as programs,
  ):
    for _ in programs.run([job]):
      # A process that has just begun has no command line for a moment.
      deadline = time.monotonic() + 20
      while not processes.naming(workdir) and time.monotonic() < deadline:
        time.sleep(0.01)
      assert len(processes.naming(workdir)) == 1
      raise RuntimeError('a fault')
  assert not processes.naming(workdir)


def test_a_signal_ends_what_runs_and_what_waits(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(ROOT)
  job = Job('a', [('presets',)] * 9, str(tmp_path / 'log'))
  with Pool([Share()], {}) as programs:
    told = []
    for each in programs.run([job, job]):
      told.append(each)
      signal.raise_signal(signal.SIGTERM)
  assert told == [(job, None)]
  assert programs.signal == signal.SIGTERM
