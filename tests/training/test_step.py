"""The training step: its loss, its gradient and what it updates."""

import jax
import numpy as np
import optax
import pytest

from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training import optimizer
from moe_jax.training.step import make_eval_step, make_train_step
from tests.helpers import oracle, tiny
from tests.helpers.steps import batch, init, setup, to_numpy, trainer


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
