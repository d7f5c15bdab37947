"""The loss of a training step and its gradient against the float64 oracle.

Language-model loss, balance loss in every scope and z-loss together, over
micro-batches and padding, as the optimizer receives them.
"""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from moe_jax.training.metrics import routing_metrics
from moe_jax.training.router_gradients import make_router_norms
from moe_jax.training.step import make_train_step
from tests.helpers import choosing, gradients, oracle, tiny
from tests.helpers.marks import fast_only
from tests.helpers.steps import init, setup, trainer

SIZES = {
  'model.hidden_size': 8,
  'model.num_heads': 2,
  'model.num_kv_heads': 2,
  'moe.num_experts': 4,
  'moe.expert_width': 12,
  'router.state_size': 5,
  'data.seq_len': 6,
  'train.batch_size': 4,
  'optimizer.clip_norm': 0.0,
  'loss.balance_weight': 0.5,
  'loss.z_weight': 0.1,
}
CASES = {
  'micro-batch': {},
  'sequence': {'loss.balance_scope': 'sequence'},
  'sequence, two micro-batches': {
    'loss.balance_scope': 'sequence',
    'train.accumulation': 2,
  },
  'sequence, four micro-batches': {
    'loss.balance_scope': 'sequence',
    'train.accumulation': 4,
  },
  'micro-batch, four of them': {'train.accumulation': 4},
  'micro-batch, two of them, gru': {
    'train.accumulation': 2,
    'router.recurrent': 'gru',
  },
  'global batch, two micro-batches, sigmoid': {
    'loss.balance_scope': 'global_batch',
    'train.accumulation': 2,
    'router.weights': 'sigmoid',
  },
}
LENGTHS = [6, 3, 6, 0]  # of each sequence; the rest is padding


def batch() -> dict[str, np.ndarray]:
  ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (4, 7), np.int32)
  mask = np.arange(6) < np.array(LENGTHS)[:, None]
  return {'token_ids': ids[:, :-1], 'targets': ids[:, 1:], 'padding_mask': mask}


def losses(config: ConfigDict, params: Any, before: Any) -> dict[str, float]:
  """Means over the global batch, and over micro-batches, as of `config`."""
  data, count = batch(), config.train.accumulation
  sequences, nll = [], 0.0
  for row, length in enumerate(LENGTHS):
    sequences.append(oracle.Sequence(config, params))
    if not length:
      continue
    logits_LV = sequences[-1].run(data['token_ids'][row, :length])
    targets = data['targets'][row, :length, None]
    shares_LV = np.log(oracle.softmax(logits_LV))
    nll -= np.take_along_axis(shares_LV, targets, 1).sum()
  micro_batches = [sequences[i::count] for i in range(count)]
  balance, z = 0.0, 0.0
  for layer in range(config.model.num_layers * config.moe.factors):
    routed = [
      [tokens(sequence, layer) for sequence in micro_batch]
      for micro_batch in micro_batches
    ]
    balance += choosing.balance_loss(
      routed, config.loss.balance_scope, config.moe.num_experts
    )
    z += partitions(sequences, layer)
  return {'loss': nll / sum(LENGTHS), 'balance_loss': balance, 'z_loss': z}


def tokens(sequence: oracle.Sequence, layer: int) -> list[choosing.Chosen]:
  if not sequence.routed:
    return []
  routed = zip(*sequence.routed[layer], strict=True)
  return [choosing.Chosen(experts, np.ones(2), p_N) for p_N, experts in routed]


def partitions(sequences: list[oracle.Sequence], layer: int) -> float:
  logits = [s.routers.logits[layer] for s in sequences if s.routed]
  return choosing.z_loss(np.concatenate(logits))


FAST = ['global batch, two micro-batches, sigmoid']


@pytest.mark.parametrize('name', fast_only(FAST, CASES))
def test_losses_and_gradients(name: str) -> None:
  config = tiny.config(**SIZES | CASES[name])
  made = setup(config)
  params = gradients.random_like(made.abstract['params'], 0.4)
  params = jax.tree.map(np.float32, params)
  state = jax.tree.map(np.asarray, init(made)) | {'params': params}
  new, metrics = make_train_step(made)(state, batch())
  for key, value in losses(config, params, params).items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)

  def total(params: Any, before: Any) -> np.ndarray:
    parts = losses(config, params, before)
    return np.array(
      parts['loss']
      + config.loss.balance_weight * parts['balance_loss']
      + config.loss.z_weight * parts['z_loss']
    )

  found = first_gradient(new, config)
  gradients.compare(found, total, params, np.array(1.0), rtol=2e-5)


# As few numbers as show what is asked: each is moved for itself.
NARROW = {
  'model.hidden_size': 4,
  'moe.num_experts': 3,
  'router.state_size': 2,
  'router.mlp_width': 3,
}
ROUTERS = {
  'two micro-batches': {
    'model.num_layers': 1,
    'loss.balance_scope': 'global_batch',
    'train.accumulation': 2,
  },
  'gru, two factors': {
    'model.num_layers': 2,
    'moe.factors': 2,
    'router.recurrent': 'gru',
  },
  'a gate that is partly fixed': {
    'model.num_layers': 1,
    'router.score': 'hyper',
  },
}


FASTEST = ['a gate that is partly fixed']


@pytest.mark.slow
@pytest.mark.parametrize('name', fast_only(FASTEST, ROUTERS))
def test_routers_are_pulled_by_both_losses_apart(name: str) -> None:
  """Norms against central differences of the oracle, number by number."""
  config = tiny.config(**SIZES | NARROW | ROUTERS[name])
  made = setup(config)
  params = gradients.random_like(made.abstract['params'], 0.4)
  params = jax.tree.map(np.float32, params)
  state = jax.tree.map(np.asarray, init(made)) | {'params': params}
  found = make_router_norms(made)(state, batch())
  exact = jax.tree.map(np.float64, params)
  layers = [
    layer['router']
    for block in oracle.blocks(exact)
    for layer in oracle.ordered(block['chain']['sub_layers'])
    if 'router' in layer
  ]
  expected = np.array([pulls(config, exact, router) for router in layers])
  expected[:, 1] *= config.loss.balance_weight
  kinds = ('cross_entropy', 'balance_loss')
  for kind, norm_W in zip(kinds, expected.T, strict=True):
    norm_WS = found.pop(f'routing/{kind}_gradient')
    assert norm_WS.shape[1] == config.moe.factors
    np.testing.assert_allclose(np.ravel(norm_WS), norm_W, rtol=2e-5)
  if config.router.recurrent != 'none':
    of_cell = pulls(config, exact, exact['cell'])
    of_cell[1] *= config.loss.balance_weight
    told = [found.pop(f'cell_{kind}_gradient') for kind in kinds]
    np.testing.assert_allclose(told, of_cell, rtol=2e-5)
  assert not found


def pulls(config: ConfigDict, params: Any, part: Any) -> list[float]:
  """The norms of the gradients of both losses in a part of `params`.

  Its arrays are views of those of `params`, so that it is moved in place.
  """
  squares = np.zeros(2)
  for path, leaf in gradients.with_paths(part):
    if 'fixed_' in jax.tree_util.keystr(path):
      continue
    for place in np.ndindex(leaf.shape):
      value, ends = leaf[place], []
      for sign in (1, -1):
        leaf[place] = value + sign * gradients.STEP
        parts = losses(config, params, params)
        ends.append(np.array([parts['loss'], parts['balance_loss']]))
      leaf[place] = value
      squares += ((ends[0] - ends[1]) / (2 * gradients.STEP)) ** 2
  return list(np.sqrt(squares))


def first_gradient(state: Any, config: ConfigDict) -> Any:
  """Adam's first moment after one step is (1 - b1) times the gradient."""
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state['opt_state'])
    if '.mu' in jax.tree_util.keystr(path)
  ]
  tree = jax.tree.structure(state['params'])
  scaled = [np.asarray(m) / (1 - config.optimizer.b1) for m in moments]
  return tree.unflatten(scaled)


PADDED = {'loss.z_weight': 1.0, 'train.batch_size': 8, 'loss.bias_rate': 0.01}


@pytest.mark.slow
@pytest.mark.parametrize('scope', ['global_batch', 'sequence'])
def test_accumulation_changes_nothing(scope: str) -> None:
  """Not even where micro-batches differ in tokens, and one has none at all."""
  lengths = np.array([6, 3, 6, 0, 1, 6, 2, 0])
  ids = np.random.default_rng(1).integers(0, tiny.VOCAB, (8, 7), np.int32)
  data = {
    'token_ids': ids[:, :-1],
    'targets': ids[:, 1:],
    'padding_mask': np.arange(6) < lengths[:, None],
  }
  found = []
  for count in (1, 2, 4):
    config = tiny.config(**SIZES | PADDED | {'loss.balance_scope': scope})
    config.train.accumulation = count
    new, metrics = trainer(config)[1](init(trainer(config)[0]), data)
    told = routing_metrics(metrics.pop('load')) | metrics
    found.append((told, optax.tree.get(new['opt_state'], 'mu')))
  assert found[0][0].keys() >= {'z_loss', 'router_entropy', 'gradient_norm'}
  for others in found[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
      others,
      found[0],
    )
