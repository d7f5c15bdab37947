"""Every two settings of a model meet in some model that trains.

A pairwise covering set (`covering.py`) over routers, selections, balancing,
layers and backbones. Each combination equals the float64 oracle, trains, and
does the same however and wherever it is computed.
"""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training import state
from moe_jax.training.step import make_train_step
from tests.helpers import covering, marks, oracle, oracle_span, steps, tiny

SIZES = {
  'model.hidden_size': 16,
  'model.num_heads': 2,
  'model.num_kv_heads': 2,
  'moe.expert_width': 24,
  'router.state_size': 8,
  'router.mlp_width': 12,
  'router.reduced_size': 4,
  'data.seq_len': 8,
  'optimizer.warmup_steps': 0,
  'optimizer.learning_rate': 1e-2,
  # Room for every token wherever it goes: dropping depends on the devices.
  'moe.capacity_factor': 4.0,
  # For less than every token: the others take the slower way.
  'moe.buffer_factor': 0.8,
}

SPAN = {
  'model.norm': 'layer',
  'model.norm_place': 'post',
  'model.positions': 'span',
  'model.span': 4,
  'model.activation': 'relu',
  'model.head_bias': True,
  'data.order': 'contiguous',
}

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
  'score': {
    name: {'router.score': name}
    for name in 'linear mlp cosine xmoe hyper random hash'.split()
  },
  'recurrent': {
    name: {'router.recurrent': name} for name in 'none gru rnn lstm'.split()
  },
  'projector': {
    name: {'router.projector': name} for name in 'layerwise shared'.split()
  },
  'passing': {
    name: {'router.passing': name} for name in 'state detached none'.split()
  },
  'residual': {
    'no residual': {},
    'residual': {'router.residual': 0.5},
    'residual detached': {
      'router.residual': 0.5,
      'router.residual_detached': True,
    },
  },
  'choice': {
    'softmax': {},
    'chosen': {'router.weights': 'chosen'},
    'raw': {'moe.renormalize': False},
    'sigmoid': {'router.weights': 'sigmoid'},
    'top_p': {'router.selection': 'top_p', 'moe.renormalize': False},
    'groups': {'router.groups': 4, 'router.top_groups': 2},
  },
  'bias': {'no bias': {}, 'bias': {'loss.bias_rate': 0.01}},
  'factors': {str(n): {'moe.factors': n} for n in (1, 2, 3)},
  'shared': {'no shared': {}}
  | {
    name: {
      'moe.shared.width': 12,
      'moe.shared.parts': 2,
      'moe.shared.mixing': name,
    }
    for name in 'sum fixed coefficient'.split()
  },
  'dispatch': {
    name: {'moe.dispatch': name} for name in 'dropless capacity'.split()
  },
  'exchange': {
    name: {'moe.exchange': name} for name in 'gather all_to_all ragged'.split()
  },
  'scope': {
    name: {'loss.balance_scope': name}
    for name in 'micro_batch sequence global_batch'.split()
  },
  'backbone': {'llama': {}, 'span': SPAN},
}

# What `moe_jax.config` refuses.
REFUSED = [
  ({'score': ['hash']}, {'recurrent': ['gru', 'rnn', 'lstm']}),
  ({'score': ['hash']}, {'residual': ['residual', 'residual detached']}),
  ({'score': ['random', 'hash']}, {'bias': ['bias']}),
  ({'choice': ['top_p']}, {'dispatch': ['capacity']}),
  ({'exchange': ['ragged']}, {'dispatch': ['capacity']}),
  (
    {'recurrent': ['none']},
    {'projector': ['shared'], 'passing': ['detached', 'none']},
  ),
]

DIMENSIONS = {name: list(values) for name, values in SETTINGS.items()}
ROWS = covering.cover(DIMENSIONS, REFUSED)


def configure(row: covering.Row) -> ConfigDict:
  changes = dict(SIZES)
  for name, value in row.items():
    changes |= SETTINGS[name][value]
  return tiny.config(**changes)


def spelled(row: covering.Row) -> str:
  return ', '.join(row.values())


# The rows of the fast suite, on one device.
FEW = covering.most_varied(ROWS, 2, by='score')


def test_every_pair_of_settings_occurs_or_is_refused() -> None:
  seen = {
    pair for row in ROWS for pair in itertools.combinations(row.items(), 2)
  }
  for row in ROWS:
    config_lib.validate(configure(row), num_devices=8)
  for a, b in itertools.combinations(DIMENSIONS, 2):
    for x, y in itertools.product(DIMENSIONS[a], DIMENSIONS[b]):
      assert ((a, x), (b, y)) in seen or unwanted({a: x, b: y}), (x, y)


def unwanted(pair: covering.Row) -> bool:
  """Whether every valid combination leaves this pair out."""
  if pair.get('score') == 'hash' and pair.keys() & {'projector', 'passing'}:
    return bool({'shared', 'detached', 'none'} & set(pair.values()))
  return any(
    any(pair.get(name) in values for name, values in left.items())
    and any(pair.get(name) in values for name, values in right.items())
    for left, right in REFUSED
  )


@pytest.mark.parametrize('clash', REFUSED, ids=str)
def test_what_cannot_go_together_is_refused(clash: tuple) -> None:
  left, right = clash
  plain = {name: values[0] for name, values in DIMENSIONS.items()}
  for a, b in itertools.product(left, right):
    for x, y in itertools.product(left[a], right[b]):
      with pytest.raises(UserError):
        config_lib.validate(configure(plain | {a: x, b: y}), num_devices=8)


@pytest.mark.slow
@pytest.mark.parametrize('row', FEW, ids=spelled)
def test_a_few_combinations(row: covering.Row) -> None:
  check_alone(row)


@pytest.mark.slow
@pytest.mark.parametrize('row', marks.at_first(10, ROWS), ids=spelled)
def test_all_combinations_on_one_device_and_eight(row: covering.Row) -> None:
  alone = check_alone(row)
  together = Run(configure(row), {'data': 2, 'expert': 2, 'fsdp': 2})
  np.testing.assert_allclose(together.losses, alone.losses, rtol=2e-5)


def check_alone(row: covering.Row) -> 'Run':
  run = Run(configure(row), {})
  run.agrees_with_the_oracle()
  run.agrees_with_itself_unrolled_and_unjitted()
  run.trains()
  run.moves_what_is_to_be_trained()
  return run


class Run:
  """A model and its first three steps on one batch."""

  def __init__(self, config: ConfigDict, axes: dict[str, int]) -> None:
    shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | axes
    size = int(np.prod(list(shape.values())))
    mesh = mesh_lib.make_mesh(shape, jax.devices()[:size])
    self.made = state.setup(config, tiny.VOCAB, mesh)
    self.config = config
    self.batch = batch(config)
    self.losses, self.first, self.before, self.after = self.train()

  def train(self) -> tuple[list[float], Any, Any, Any]:
    """Losses, the state after one step, parameters before and after all."""
    train_step, now = make_train_step(self.made), steps.init(self.made)
    data = jax.device_put(self.batch, mesh_lib.batch_sharding(self.made.mesh))
    before, first, losses = to_numpy(now['params']), None, []
    for _ in range(3):
      now, metrics = train_step(now, data)
      losses.append(float(metrics['loss']))
      first = first or to_numpy(now)
    return losses, first, before, to_numpy(now['params'])

  @functools.cached_property
  def logits(self) -> np.ndarray:
    return np.asarray(jax.jit(self.forward(self.made))(self.before))

  def forward(self, made: state.Setup) -> Any:
    def logits(params: Any) -> jax.Array:
      model = nnx.merge(made.graphdef, params)
      return model(self.batch['token_ids'], self.batch['padding_mask'])[0]

    return logits

  def agrees_with_the_oracle(self) -> None:
    real_BL = self.batch['padding_mask']
    for row in (0, -1):
      length = real_BL[row].sum()
      ids_BL = self.batch['token_ids'][row : row + 1 or None, :length]
      expected = expected_logits(self.config, self.before, ids_BL[0])
      np.testing.assert_allclose(
        self.logits[row, :length], expected, atol=2e-5 * np.abs(expected).max()
      )

  def agrees_with_itself_unrolled_and_unjitted(self) -> None:
    config = self.config.copy_and_resolve_references()
    config.model.unroll = 2
    unrolled = state.setup(config, tiny.VOCAB, self.made.mesh)
    again = self.forward(unrolled)(self.before)
    np.testing.assert_allclose(
      again, self.logits, atol=1e-5 * np.abs(self.logits).max()
    )

  def trains(self) -> None:
    assert np.isfinite(self.losses).all()
    assert (np.diff(self.losses) < 0).all(), self.losses

  def moves_what_is_to_be_trained(self) -> None:
    moments = {
      name.split('.mu')[1]: leaf
      for name, leaf in named(self.first['opt_state']).items()
      if '.mu' in name
    }
    after = named(self.after)
    for name, leaf in named(self.before).items():
      if 'fixed_' in name:
        np.testing.assert_array_equal(after[name], leaf, err_msg=name)
      elif 'choice_bias' not in name and not self.is_never_read(name):
        assert np.abs(moments[name]).max() > 0, name
        assert np.abs(after[name] - leaf).max() > 0, name

  def is_never_read(self, name: str) -> bool:
    """Without a passed state, what would multiply it always multiplies 0."""
    passing = self.config.router.passing
    return passing == 'none' and "['cell']['hidden_R" in name


def expected_logits(
  config: ConfigDict, params: Any, ids_L: np.ndarray
) -> np.ndarray:
  spans = config.model.positions == 'span'
  decoder = oracle_span if spans else oracle
  return decoder.Sequence(config, params).run(ids_L)


def batch(config: ConfigDict) -> dict[str, np.ndarray]:
  """As in training, the last sequence half padding."""
  rng = np.random.default_rng(0)
  size, length = config.train.batch_size, config.data.seq_len
  ids = rng.integers(0, tiny.VOCAB, (size, length + 1)).astype(np.int32)
  mask = np.ones((size, length), bool)
  mask[-1, length // 2 :] = False
  made = {'token_ids': ids[:, :-1], 'targets': ids[:, 1:], 'padding_mask': mask}
  if config.data.order == 'contiguous':  # every step forgets the one before
    made['segment_start'] = np.ones(size, bool)
  return made


def to_numpy(tree: Any) -> Any:
  return jax.tree.map(np.asarray, tree)


def named(tree: Any) -> dict[str, np.ndarray]:
  """Every leaf under its path."""
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
