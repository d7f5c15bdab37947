"""Training with a memory and dropout: meshes, micro-batches, resuming."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training.state import Setup
from moe_jax.training.step import make_eval_step, make_train_step
from tests.helpers import tiny
from tests.helpers.steps import init, setup, trainer

SPAN = {
  'model.positions': 'span',
  'model.span': 6,
  'model.norm': 'layer',
  'model.norm_place': 'post',
  'model.activation': 'relu',
  'model.dropout': 0.2,
  'model.head_bias': True,
  'router.recurrent': 'gru',
  'moe.factors': 2,
  'data.order': 'contiguous',
}
# Nearly.
STILL = {'optimizer.learning_rate': 1e-9}


def batches(config: ConfigDict, steps: int) -> list[dict[str, np.ndarray]]:
  """Rows that go on; row 3 begins anew in step 2."""
  rng = np.random.default_rng(0)
  size, length = config.train.batch_size, config.data.seq_len
  ids = rng.integers(0, tiny.VOCAB, (size, steps * length + 1)).astype(np.int32)
  found = []
  for step in range(steps):
    part = ids[:, step * length : (step + 1) * length + 1]
    fresh = np.full(size, step == 0)
    fresh[3] |= step == 2
    found.append(
      {
        'token_ids': part[:, :-1],
        'targets': part[:, 1:],
        'padding_mask': np.ones((size, length), bool),
        'segment_start': fresh,
      }
    )
  return found


def losses(made: Setup, steps: int = 4) -> tuple[np.ndarray, dict[str, Any]]:
  train_step, state = make_train_step(made), init(made)
  found = []
  for data in batches(made.config, steps):
    placed = jax.device_put(data, mesh_lib.batch_sharding(made.mesh))
    state, metrics = train_step(state, placed)
    found.append(float(metrics['loss']))
  return np.array(found), state


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_the_memory() -> None:
  made, train_step = trainer(tiny.config(**SPAN))
  first, second = batches(made.config, 2)
  state, _ = train_step(init(made), first)
  state['params']['head_bias_V'] = (
    state['params']['head_bias_V'].at[0].set(jnp.nan)
  )
  before = np.asarray(state['memory'])
  assert before.any()
  state, metrics = train_step(state, second)
  assert np.isnan(metrics['loss'])
  assert np.asarray(state['memory']).tobytes() == before.tobytes()


@pytest.mark.parametrize(
  ('axes', 'parts'),
  [
    ({'data': 2, 'fsdp': 2, 'expert': 2}, 8),
    ({'data': 2, 'tensor': 4}, 2),
    ({'tensor': 8}, 1),
  ],
)
def test_a_memory_lies_where_its_rows_lie(
  axes: dict[str, int], parts: int
) -> None:
  shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | axes
  mesh = mesh_lib.make_mesh(shape, jax.devices())
  size = (3, 16, 6, 4)
  of_rows = mesh_lib.batch_sharding(mesh).devices_indices_map((size[1],))
  indices = mesh_lib.memory_sharding(mesh).devices_indices_map(size)
  whole = slice(None)
  for device, (rows,) in of_rows.items():
    assert indices[device] == (whole, rows, whole, whole)
  shards = {str(index) for index in indices.values()}
  assert len(shards) == parts


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_an_empty_memory_is_zeros_where_the_state_keeps_it(dtype: str) -> None:
  made = setup(
    tiny.config(**(SPAN | {'model.dtype': dtype})), data=2, fsdp=2, tensor=2
  )
  memory = made.start(4)
  assert (memory.shape, memory.dtype) == ((2, 4, 6, 32), jnp.dtype(dtype))
  assert not memory.any()
  assert {s.data.shape for s in memory.addressable_shards} == {(2, 1, 6, 32)}
  kept = made.abstract['memory']
  assert (kept.shape, kept.dtype) == ((2, 8, 6, 32), memory.dtype)
  assert kept.sharding.is_equivalent_to(memory.sharding, 4)


def test_a_model_without_a_span_has_no_memory() -> None:
  made = setup(tiny.config())
  assert made.start(4) == ()
  assert 'memory' not in made.abstract


@pytest.mark.slow
def test_eight_devices_train_like_one_with_dropout() -> None:
  config = tiny.config(**SPAN)
  alone, state = losses(setup(config))
  assert state['memory'].shape == (2, 8, 6, 32)
  made = setup(config, fsdp=2, expert=2, tensor=2)
  together, spread = losses(made)
  np.testing.assert_allclose(together, alone, rtol=2e-5)
  np.testing.assert_allclose(
    spread['memory'], state['memory'], rtol=1e-3, atol=1e-3
  )
  shard = spread['memory'].addressable_shards[0].data
  assert shard.shape == (2, 2, 6, 32)  # data 1 x fsdp 2 x expert 2 of 8 rows


@pytest.mark.slow
def test_capacity_with_room_drops_the_same_units() -> None:
  config = tiny.config(**SPAN)
  roomy = tiny.config(
    **SPAN, **{'moe.dispatch': 'capacity', 'moe.capacity_factor': 8.0}
  )
  np.testing.assert_allclose(
    losses(setup(roomy), 2)[0], losses(setup(config), 2)[0], rtol=1e-5
  )


@pytest.mark.slow
def test_micro_batches_keep_their_rows_memory() -> None:
  """Without dropout, whose masks are drawn anew for each micro-batch."""
  changes = SPAN | {'model.dropout': 0.0, 'loss.balance_weight': 0.0}
  one, state = losses(setup(tiny.config(**changes)))
  changes |= {'train.accumulation': 4}
  four, split = losses(setup(tiny.config(**changes), data=2))
  np.testing.assert_allclose(four, one, rtol=1e-4)
  np.testing.assert_allclose(
    split['memory'], state['memory'], rtol=1e-3, atol=1e-3
  )


@pytest.mark.slow
def test_it_lowers_for_accelerators() -> None:
  config = tiny.config(**SPAN, **{'model.dtype': 'bfloat16'})
  config.data.seq_len = 300  # blocks of queries
  made = setup(config, expert=2, data=2, tensor=2)
  data = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batches(config, 1)[0]
  )
  assert made.abstract['memory'].dtype == jax.numpy.bfloat16
  exported = jax.export.export(make_train_step(made), platforms=['tpu'])(
    made.abstract, data
  )
  assert exported.platforms == ('tpu',)


@pytest.mark.slow
def test_a_fresh_row_forgets() -> None:
  """Step 2 with a memory only in row 3, which is fresh, is one without."""
  config = tiny.config(**SPAN, **STILL)
  made, train_step = trainer(config)
  data = batches(config, 3)[2]
  results = []
  for value in (0.0, 7.0):
    state = init(made)
    state['memory'] = state['memory'].at[:, 3].set(value)
    state, metrics = train_step(state, data)
    results.append((metrics['loss'], state['memory']))
  jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.slow
def test_evaluation_draws_nothing_and_hands_on_its_memory() -> None:
  config = tiny.config(**SPAN)
  made = setup(config)
  params, eval_step = init(made)['params'], make_eval_step(made)
  first, second = batches(config, 2)
  sums = [eval_step(params, first) for _ in range(2)]
  assert float(sums[0]['nll']) == float(sums[1]['nll'])
  # The call donates the memory that it is given.
  other = eval_step(params, second, sums[0]['attention_state'])
  alone = eval_step(params, second)
  assert float(other['nll']) != float(alone['nll'])


@pytest.mark.slow
def test_every_step_has_masks_of_its_own() -> None:
  config = tiny.config(**SPAN, **STILL)
  made, train_step = trainer(config)
  data = batches(config, 1)[0]
  state = init(made)
  results = []
  for _ in range(2):
    state, metrics = train_step(state, data)
    results.append(float(metrics['loss']))
  assert results[0] != results[1]
