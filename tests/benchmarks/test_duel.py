"""Workers of a duel: their turns, their answers, and how they end."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import duel
from moe_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def worker(step: str, facts: dict[str, object]) -> list[str]:
  """The command of a worker whose step is that statement."""
  code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import duel
duel.serve(lambda: {step}, {facts!r})
"""
  return [sys.executable, '-c', code]


def test_workers_take_turns_and_are_measured(tmp_path: Path) -> None:
  log = tmp_path / 'log'
  write = "open({!r}, 'a').write({!r})"
  measured = duel.run(
    {
      'slow': worker(
        f'(time.sleep(0.05), {write.format(str(log), "s")})', {'is': 'slow'}
      ),
      'fast': worker(
        f"(print('not an answer'), {write.format(str(log), 'f')})", {'is': 2}
      ),
    },
    rounds=3,
    warmup=1,
    threads=1,
  )
  assert log.read_text() == 'sf' * 4
  assert measured['slow'].facts == {'is': 'slow'}
  assert measured['fast'].facts == {'is': 2}
  assert [len(m.seconds) for m in measured.values()] == [3, 3]
  assert min(measured['slow'].seconds) >= 0.05
  assert all(m.peak_bytes > 1 << 20 for m in measured.values())
  json.dumps(measured)


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux forgets peaks')
def test_what_was_needed_to_get_ready_is_not_of_the_steps() -> None:
  ready = 'bytearray(256 << 20)'  # freed at once
  command = worker('None', {})
  command[-1] = command[-1].replace('import sys, time', f'import sys; {ready}')
  measured = duel.run({'it': command}, rounds=1, warmup=0, threads=1)['it']
  assert measured.peak_bytes > 256 << 20
  assert 1 << 20 < measured.steps_peak_bytes < 128 << 20


@pytest.mark.parametrize('step', ['1 / 0', 'sys.exit(3)'])
def test_a_worker_that_fails_is_named(step: str) -> None:
  with pytest.raises(UserError, match='worker broken ended with status'):
    duel.run({'broken': worker(step, {})}, rounds=1, warmup=0, threads=1)


def test_a_worker_that_never_gets_ready_is_named() -> None:
  with pytest.raises(UserError, match='worker absent ended with status 7'):
    duel.run(
      {'absent': [sys.executable, '-c', 'raise SystemExit(7)']},
      rounds=1,
      warmup=0,
      threads=1,
    )
