"""Moments in the memory of the hosts: the same training, and checkpoints."""

import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.errors import UserError
from moe_jax.planning import compiled, plan, topologies
from moe_jax.training import offload, recovery, state
from moe_jax.training.step import make_train_step
from tests.helpers import runs, tiny
from tests.helpers.marks import fast_only
from tests.helpers.steps import batch, init, setup, to_numpy

SMALL = {
  'model.num_layers': 1,
  'optimizer.warmup_steps': 0,
  'loss.bias_rate': 0.01,
}


def kinds(tree: Any) -> set[tuple[str | None, bool]]:
  """Where arrays lie, and whether they are scalars."""
  return {
    (leaf.sharding.memory_kind, leaf.ndim == 0)
    for leaf in jax.tree.leaves(tree)
  }


OFFLOADED = {('pinned_host', False), ('device', True)}


OPTIMIZERS = ['adamw', 'lion', 'adafactor', 'muon']


@pytest.mark.parametrize('name', fast_only(['adamw'], OPTIMIZERS))
def test_the_update_is_that_of_all_parameters_at_once(name: str) -> None:
  """Of every optimizer, though each group has one of its own."""
  config = tiny.config(**SMALL, optimizer__offload=True, optimizer__name=name)
  made = setup(config)
  before = init(made)
  grads = jax.tree.map(
    lambda leaf: jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape),
    before['params'],
  )
  expected_params, expected_state = before['params'], before['opt_state']
  ours = {key: before[key] for key in ('params', 'opt_state')}
  shardings = jax.tree.map(lambda leaf: leaf.sharding, ours)

  @jax.jit
  def at_once(params: Any, opt_state: Any) -> Any:
    updates, opt_state = made.tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  in_groups = jax.jit(
    lambda ours, finite: offload.update(made.tx, finite, grads, ours),
    out_shardings=shardings,
  )
  on_devices = jax.tree.map(np.asarray, (expected_params, expected_state))
  for _ in range(2):
    on_devices = at_once(*on_devices)
    ours = in_groups(ours, True)
  # Moments do, not the coefficients of Muon's polynomial.
  assert ('pinned_host', False) in kinds(ours['opt_state'])
  close = (ours['params'], ours['opt_state']), on_devices
  for mine, theirs in zip(*map(jax.tree.leaves, close), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
  # Nothing changes, not even the count, where there is no update.
  after = in_groups(ours, False)
  jax.tree.map(np.testing.assert_array_equal, to_numpy(after), to_numpy(ours))


def test_groups_are_few_and_none_is_larger_than_a_parameter() -> None:
  sizes = [3, 4, 10, 9, 1, 2, 2]
  leaves = [np.zeros(size) for size in sizes]
  assert offload._groups(leaves) == [0, 0, 1, 2, 2, 3, 3]
  assert offload.largest_share(leaves) == 10 / 31


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_with_it_off(tmp_path: Path) -> None:
  """Saved, read onto another mesh, and read by a run without it."""
  config = tiny.config(**SMALL, optimizer__offload=True)
  off = tiny.config(**SMALL)
  made = setup(config)
  train_step = make_train_step(made)
  now, _ = train_step(init(made), batch(config))
  assert kinds(now['opt_state']) == OFFLOADED
  assert kinds(now['params']) <= {('device', False)}
  assert bool(jax.jit(recovery._all_finite)(now))
  with runs.claimed(config, tmp_path) as store:
    store.save(1, now, wait=True)
  next_state, _ = train_step(now, batch(config))
  with runs.opened(config, tmp_path) as store:
    again = store.restore(made.abstract).state
  assert kinds(again['opt_state']) == OFFLOADED
  resumed, _ = train_step(again, batch(config))
  jax.tree.map(
    np.testing.assert_array_equal, to_numpy(resumed), to_numpy(next_state)
  )
  split = setup(off, fsdp=2)
  with runs.opened(off, tmp_path) as store:
    elsewhere = store.restore(split.abstract).state
  assert kinds(elsewhere['opt_state']) == {
    ('device', False),
    ('device', True),
  }
  without, _ = make_train_step(split)(elsewhere, batch(off))
  for mine, theirs in zip(
    *map(jax.tree.leaves, (without['params'], next_state['params'])),
    strict=True,
  ):
    np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_devices_without_such_memory_are_one_error(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(
    state.offload.mesh_lib, 'has_host_memory', lambda device: False
  )
  with pytest.raises(UserError, match='optimizer.offload = True.*set False'):
    setup(tiny.config(optimizer__offload=True))


def test_gpus_are_refused() -> None:
  gpu = types.SimpleNamespace(platform='gpu', device_kind='NVIDIA H100')
  mesh: Any = types.SimpleNamespace(devices=np.array([gpu]))
  with pytest.raises(UserError, match='compiler for GPUs fails: set False'):
    offload.shardings({}, {}, {}, mesh)


@pytest.mark.slow
def test_the_plan_tells_both_memories_apart() -> None:
  """Two moments and a count: on the hosts but for what comes at a time."""
  usual = plan.make(tiny.config(), 1)
  offloaded = plan.make(tiny.config(optimizer__offload=True), 1)
  parameters = usual['parameters']['total']
  assert usual['host_memory_bytes_per_device'] == 0
  assert offloaded['host_memory_bytes_per_device'] == pytest.approx(
    8 * parameters, abs=100
  )
  before, after = (
    each['memory_parts_per_device'] for each in (usual, offloaded)
  )
  assert before['optimizer'] == offloaded['host_memory_bytes_per_device']
  # Activations are larger than what comes of the moments.
  assert after['optimizer'] == 0
  assert {**before, 'optimizer': 0} == after


@pytest.mark.slow
def test_a_tpu_holds_so_much_less() -> None:
  """Arguments lose both moments, and temporaries gain less than that."""
  sizes = {'model.num_layers': 1, 'model.dtype': 'auto', 'mesh.data': 1}
  target = topologies.target('v5e:1x1')
  told = [
    compiled.compile_and_report(
      tiny.config(**sizes, optimizer__offload=offloaded), target
    )
    for offloaded in (False, True)
  ]
  usual, moved = (each['memory_bytes'] for each in told)
  parameters = plan.make(tiny.config(**sizes), 1)['parameters']['total']
  assert usual['host'] == 0
  assert moved['host'] > 0.9 * 8 * parameters
  assert usual['arguments'] - moved['arguments'] > 0.9 * 8 * parameters
  assert moved['total'] - moved['code'] < usual['total'] - usual['code']
