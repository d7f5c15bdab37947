"""When a run goes back, and that a checkpoint holds all that it depends on."""

import json
import math
import types
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training.recovery import Policy, Recovery
from moe_jax.training.saved_step import Restored
from tests.helpers import tiny


def policy(saved: dict | None = None, **keys: float) -> Policy:
  overrides = {f'recovery.{name}': value for name, value in keys.items()}
  return Policy(tiny.config(**overrides), saved)


@pytest.mark.parametrize(
  ('loss', 'norm'), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan)]
)
def test_so_many_bad_steps_in_a_row_go_back(loss: float, norm: float) -> None:
  watch = policy(bad_steps=3)
  assert [watch.judge(loss, norm) for _ in range(2)] == [None, None]
  assert watch.judge(2.0, 1.0) is None  # breaks the row
  assert watch.bad_steps == 0 and watch.skipped_steps == 2
  assert [watch.judge(loss, norm) for _ in range(2)] == [None, None]
  reason = watch.judge(loss, norm)
  assert reason is not None and '3 times in a row' in reason
  assert str(loss if norm == 1.0 else norm) in reason


def test_a_spike_is_measured_in_robust_deviations() -> None:
  watch = policy(spike=10, window=5)
  # Median 3, absolute deviations 0, 0.1, 0.1, 0.2, 97: their median is 0.1.
  for loss in (3.0, 3.1, 2.9, 3.2, 100.0):
    assert watch.judge(loss, 1.0) is None  # the window is not full yet
  # The outlier neither hides a spike nor makes one of what is none.
  assert watch.judge(3.0 + 9.9 * 0.14826, 1.0) is None
  # Now 3.1, 2.9, 3.2, 100, 4.47: median 3.2, deviations 0.1, 0.3, 0, 96.8, 1.27
  # and their median 0.3.
  reason = watch.judge(3.2 + 10.1 * 1.4826 * 0.3, 1.0)
  assert reason is not None and '10.1 robust deviations' in reason
  assert watch.judge(-50.0, 1.0) is None  # lower is no spike


def test_spikes_are_off_by_default() -> None:
  watch = policy()
  assert [watch.judge(loss, 1.0) for loss in [1.0] * 200 + [1e30]] == [
    None
  ] * 201
  assert watch.saved() == {}


def test_going_on_from_what_was_saved_decides_alike() -> None:
  keys = {'spike': 6, 'window': 8, 'bad_steps': 4}
  rng = np.random.default_rng(0)
  losses = rng.normal(3.0, 0.3, 300)
  losses[rng.random(300) < 0.3] = math.nan
  losses[::50] = 9.0
  straight = policy(**keys)
  told = [straight.judge(float(loss), 1.0) for loss in losses]
  assert sum(reason is not None for reason in told) > 5
  for cut in (3, 40, 151):
    first = policy(**keys)
    for loss in losses[:cut]:
      first.judge(float(loss), 1.0)
    # Through JSON, as a checkpoint has it.
    second = policy(json.loads(json.dumps(first.saved())), **keys)
    assert [second.judge(float(loss), 1.0) for loss in losses[cut:]] == told[
      cut:
    ]
    assert second.skipped_steps == straight.skipped_steps


def test_an_older_checkpoint_has_read_as_many_batches_as_steps() -> None:
  assert Restored(7, {}, {}).position == 7
  assert Restored(7, {}, {'position': None}).position == 7
  skipped = {'position': 107, 'skipped': [[3, 100]]}
  assert Restored(7, {}, skipped).position == 107


@pytest.mark.parametrize('rollbacks', [0, 3])
def test_what_a_run_began_from_is_kept(rollbacks: int) -> None:
  config = tiny.config(**{'recovery.rollbacks': rollbacks})
  mesh = mesh_lib.from_config(config, jax.devices())
  setup = types.SimpleNamespace(config=config, mesh=mesh)

  def sets_aside(data: dict[str, Any], steps: list[int]) -> bool:
    recovery = Recovery(setup, '', None, data)  # type: ignore[arg-type]
    return recovery.sets_aside(steps)

  # The newest may hold what makes it fail; those before it have been followed.
  assert sets_aside({'step': 3000}, [1000, 2000, 3000])
  assert not sets_aside({'step': 3000}, [1000, 2000])
  # Of the only one, a run that was begun from it would lose all.
  assert not sets_aside({'step': 0}, [0])
  assert sets_aside({}, [5]) == (rollbacks == 0)
