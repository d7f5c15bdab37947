"""The training step: its loss, its gradient and what it updates."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training import optimizer
from moe_jax.training.step import make_eval_step, make_train_step
from tests.helpers import oracle, tiny
from tests.helpers.marks import fast_only
from tests.helpers.steps import (
  BALANCED,
  EVERY_AXIS,
  batch,
  init,
  setup,
  to_numpy,
  trainer,
)


@pytest.mark.slow
def test_losses_equal_the_oracle() -> None:
  config = tiny.config(**tiny.MODELS['cartesian rmoe'])
  made, train_step = trainer(config)
  params, data = init(made)['params'], batch(config)
  sums = make_eval_step(made)(params, data)
  nll, counts, probabilities = 0.0, np.zeros((4, 8)), np.zeros((4, 8))
  for row in range(config.train.batch_size):
    length = int(data['padding_mask'][row].sum())
    sequence = oracle.Sequence(config, to_numpy(params))
    logits = sequence.run(data['token_ids'][row, :length])
    chosen = np.take_along_axis(
      np.log(oracle.softmax(logits)), data['targets'][row, :length, None], 1
    )
    nll -= chosen.sum()
    for i, (p, experts) in enumerate(sequence.routed):
      counts[i] += np.bincount(np.concatenate(experts), minlength=8)
      probabilities[i] += p.sum(0)
  tokens = data['padding_mask'].sum()
  _, metrics = train_step(init(made), data)
  # N * sum_n f_n P_n, summed over the four sub-layers.
  balance = 8 * (counts / tokens * probabilities / tokens).sum()
  np.testing.assert_allclose(sums['nll'], nll, rtol=1e-6)
  assert int(sums['targets']) == tokens
  np.testing.assert_allclose(metrics['loss'], nll / tokens, rtol=1e-6)
  np.testing.assert_allclose(metrics['balance_loss'], balance, rtol=1e-5)


def test_first_update_is_adam_with_clipping_and_decay() -> None:
  """After one step Adam moves every entry by lr * sign(g), plus decay."""
  config = tiny.config(
    **{
      'router.recurrent': 'gru',
      'optimizer.warmup_steps': 0,
      'optimizer.weight_decay': 0.5,
      'optimizer.learning_rate': 1e-2,
      'optimizer.epsilon': 1e-30,
    }
  )
  made = setup(config)
  before = to_numpy(init(made)['params'])
  after, metrics = make_train_step(made)(init(made), batch(config))
  assert float(metrics['learning_rate']) == pytest.approx(1e-2)
  moved = jax.tree.map(lambda a, b: a - b, to_numpy(after['params']), before)
  head, scale = moved['head_DV'], moved['norm']['scale_D']
  # Undecayed: the norm's scale, the cell's weights and biases.
  np.testing.assert_allclose(np.abs(scale), 1e-2, rtol=1e-3)
  for name, change in moved['cell'].items():
    np.testing.assert_allclose(np.abs(change), 1e-2, rtol=1e-3, err_msg=name)
  # Decayed: sign(g) + 0.5 w, times the rate.
  pulled = head + 1e-2 * 0.5 * before['head_DV']
  np.testing.assert_allclose(np.abs(pulled), 1e-2, rtol=1e-2)


@pytest.mark.slow
def test_every_parameter_has_a_gradient() -> None:
  config = tiny.config(**tiny.MODELS['cartesian rmoe'])
  made, train_step = trainer(config)
  first, _ = train_step(init(made), batch(config))
  moments = optax.tree.get(first['opt_state'], 'mu')
  for path, leaf in jax.tree_util.tree_leaves_with_path(moments):
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


# `test_gradients` holds micro-batches to the oracle.
@pytest.mark.slow
def test_accumulation_changes_nothing_but_the_balance_loss() -> None:
  plain = {'router.recurrent': 'gru', 'loss.balance_weight': 0.0}
  data = batch(tiny.config())
  results = []
  for micro_batches in (1, 4):
    made = setup(
      tiny.config(**plain, **{'train.accumulation': micro_batches}), data=2
    )
    new, metrics = make_train_step(made)(init(made), data)
    results.append((new['params'], metrics['loss'], metrics['gradient_norm']))
    load = metrics['load']
    np.testing.assert_array_equal(load.tokens, data['padding_mask'].sum())
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    *results,
  )


def test_schedule() -> None:
  config = tiny.config(
    **{
      'train.steps': 100,
      'optimizer.warmup_steps': 10,
      'optimizer.learning_rate': 1.0,
      'optimizer.final_fraction': 0.1,
    }
  )
  rate = optimizer.schedule(config)
  assert float(rate(0)) == 0
  assert float(rate(5)) == pytest.approx(0.5)
  assert float(rate(10)) == pytest.approx(1.0)
  assert float(rate(55)) == pytest.approx(0.55)  # half way down the cosine
  assert float(rate(100)) == pytest.approx(0.1)
  assert float(rate(1000)) == pytest.approx(0.1)


def test_state_is_donated() -> None:
  config = tiny.config()
  made, train_step = trainer(config)
  old = init(made)
  train_step(old, batch(config))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old['params']))


@pytest.mark.slow
def test_bfloat16_keeps_float32_parameters_and_routers() -> None:
  config = tiny.config(**{'model.dtype': 'bfloat16'})
  made = setup(config)
  new, metrics = make_train_step(made)(init(made), batch(config))
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(new['params'])}
  assert dtypes == {np.dtype(np.float32)}
  assert metrics['load'].probability_N.dtype == np.float32
  full, train_step = trainer(tiny.config())
  _, exact = train_step(init(full), batch(config))
  np.testing.assert_allclose(metrics['loss'], exact['loss'], rtol=1e-2)


@pytest.mark.slow
def test_both_steps_are_compiled_for_their_mesh(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  config = tiny.config(model__num_layers=1)
  made = setup(config)
  initial = init(made)
  monkeypatch.setattr(
    mesh_lib, 'compiler_options', lambda mesh: {'no_such_option': '1'}
  )
  ids = batch(config)
  with pytest.raises(jax.errors.JaxRuntimeError, match='no_such_option'):
    make_eval_step(made)(initial['params'], ids)
  with pytest.raises(jax.errors.JaxRuntimeError, match='no_such_option'):
    make_train_step(made)(initial, ids)


# A gradient that is none though the loss is finite, and a loss that is none.
UNSOUND = {'gradient': {'model.init_std': 1e15}, 'loss': {}}


@pytest.mark.parametrize('what', fast_only(['gradient'], UNSOUND))
@pytest.mark.parametrize('count', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_nothing(
  what: str, count: int
) -> None:
  config = tiny.config(
    **tiny.MODELS['cartesian rmoe'] | UNSOUND[what],
    **{'train.accumulation': count, 'loss.bias_rate': 0.01},
  )
  made, train_step = trainer(config)
  state = init(made)
  if what == 'loss':
    # Infinite where one token reads it: of all rows, one micro-batch does.
    embed_VD = state['params']['embed_VD']
    state['params']['embed_VD'] = embed_VD.at[7, 0].set(np.inf)
  before = to_numpy(state)
  data = batch(config)
  data['token_ids'] = np.where(data['token_ids'] == 7, 8, data['token_ids'])
  if what == 'loss':
    data['token_ids'][0, 0] = 7
  after, metrics = train_step(state, data)
  assert np.isfinite(metrics['loss']) == (what == 'gradient')
  assert not np.isfinite(metrics['gradient_norm'])
  assert int(after.pop('step')) == before.pop('step') + 1
  assert_same_bits(after, before)
  # And goes on once numbers are finite again.
  if what == 'loss':
    embed_VD = after['params']['embed_VD'].at[7, 0].set(0.0)
    after['params']['embed_VD'] = embed_VD
    again, metrics = train_step(after | {'step': np.int32(1)}, batch(config))
    assert np.isfinite(metrics['gradient_norm'])
    assert np.any(optax.tree.get(again['opt_state'], 'mu')['head_DV'])


@pytest.mark.slow
def test_all_devices_leave_a_step_that_is_not_finite_alone() -> None:
  """Also those that hold nothing of what is not finite."""
  config = tiny.config(**BALANCED | {'train.accumulation': 2})
  made = setup(config, **EVERY_AXIS)
  train_step, state = make_train_step(made), init(made)
  for _ in range(2):
    state, _ = train_step(state, batch(config))
  embed_VD = state['params']['embed_VD'].at[7, 0].set(np.nan)
  sharding = made.abstract['params']['embed_VD'].sharding
  state['params']['embed_VD'] = jax.device_put(embed_VD, sharding)
  before = to_numpy(state)
  data = batch(config)
  data['token_ids'][0, 0] = 7
  after, metrics = train_step(state, data)
  assert np.isnan(metrics['loss'])
  assert int(after.pop('step')) == before.pop('step') + 1
  assert_same_bits(after, before)


def assert_same_bits(found: Any, expected: Any) -> None:
  def same(path: Any, a: Any, b: Any) -> None:
    where = jax.tree_util.keystr(path)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), where

  jax.tree_util.tree_map_with_path(same, found, expected)
