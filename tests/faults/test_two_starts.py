"""Two starts of one run at once, ten times: one trains, the other says so.

Five workdirs, each begun once and gone on with once.
"""

import os
import time
from pathlib import Path

import pytest

from tests.helpers import marks, runs
from tests.helpers.forks import Server

pytestmark = pytest.mark.slow

CONFIG = '--config=tests/helpers/slow_config.py:batch=0.3,wait=1'


@pytest.mark.parametrize('number', marks.at_first(1, range(5)))
def test_two_starts_at_once(
  number: int,
  server: Server,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  flags = [CONFIG, f'--config.data.dir={tmp_path}/data']
  prepared = server.start([*flags, '--config.train.steps=1'], tmp_path / 'one')
  assert prepared.ends()[0] == 0, prepared.errors()
  workdir, told = tmp_path / 'run', []
  for steps in (10, 20):
    command = [*flags, f'--config.train.steps={steps}']
    both = []
    for _ in range(2):
      both.append(server.start(command, workdir))
      time.sleep(0.2 * number)
    # Whoever came second has ended first.
    statuses = {run: run.ends(300)[0] for run in both}
    assert sorted(statuses.values()) == [0, os.EX_TEMPFAIL], [
      run.errors() for run in both
    ]
    first, second = sorted(both, key=lambda run: statuses[run])
    *_, error = second.errors().splitlines()
    said = f'error: workdir {workdir} is in use by process {first.pid} on '
    assert error.startswith(said)
    assert 'Traceback' not in first.errors() + second.errors()
    trained = [row['step'] for row in runs.rows(workdir, 'train')]
    assert trained == list(range(1, steps + 1))
    evaluated = [row['step'] for row in runs.rows(workdir, 'validation')]
    assert evaluated == list(range(10, steps + 1, 10))
    assert runs.checkpoints(workdir) == list(range(10, steps + 1, 10))
    told.append(f'to step {steps}: {sorted(statuses.values())}')
  with capsys.disabled():
    print('\n' + ', '.join(told))
