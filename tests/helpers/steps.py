"""Setups of tiny configs on meshes, first states and something to learn."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe_jax.model.decoder import Decoder
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training import state
from moe_jax.training.state import Setup, TrainState
from moe_jax.training.step import make_train_step
from tests.helpers import tiny

EVERY_AXIS = {'fsdp': 2, 'expert': 2, 'tensor': 2}
# Balanced by a bias too, which also lets a test choose the experts.
BALANCED = tiny.MODELS['cartesian rmoe'] | {
  'loss.bias_rate': 0.01,
  'loss.z_weight': 0.01,
}
# Room for little more than half of the assignments.
BOUNDED = BALANCED | {'moe.exchange': 'all_to_all', 'moe.buffer_factor': 0.6}


def setup(config: ConfigDict, **axes: int) -> Setup:
  """The setup of a config on a mesh of as many devices as `axes` ask for."""
  shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | axes
  size = int(np.prod(list(shape.values())))
  mesh = mesh_lib.make_mesh(shape, jax.devices()[:size])
  return state.setup(config, tiny.VOCAB, mesh)


def trainer(config: ConfigDict, **axes: int) -> tuple[Setup, Any]:
  """The setup and its training step, the same for equal configs.

  So that tests which ask different questions of one program compile it once.
  """
  key = config.to_json(sort_keys=True), tuple(axes.items())
  if key not in _trainers:
    made = setup(config, **axes)
    _trainers[key] = made, make_train_step(made)
  return _trainers[key]


_trainers: dict[Any, tuple[Setup, Any]] = {}


def init(made: Setup) -> TrainState:
  """The state of `made.init()`, whose parameters are drawn op by op.

  Operations of one shape compile once for all tests of a process, where
  `made.init()` compiles a program for every config.
  """
  key, _ = jax.random.split(jax.random.key(made.config.seed))
  model = Decoder(
    made.config, made.vocab_size, made.mesh, rngs=nnx.Rngs(params=key)
  )
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  placed = jax.tree.map(
    lambda leaf, asked: jax.device_put(leaf, asked.sharding),
    params,
    made.abstract['params'],
  )
  return made.init(placed)


def batch(config: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
  """Sequences with something to learn: every second token repeats."""
  rng = np.random.default_rng(seed)
  size, length = config.train.batch_size, config.data.seq_len
  ids = rng.integers(0, tiny.VOCAB, (size, length + 1)).astype(np.int32)
  ids[:, 1::2] = ids[:, :-1:2]
  mask = np.ones((size, length), bool)
  mask[-1, length // 2 :] = False
  return {'token_ids': ids[:, :-1], 'targets': ids[:, 1:], 'padding_mask': mask}


def packed_batch(
  config: ConfigDict, lengths: tuple[int, ...]
) -> dict[str, np.ndarray]:
  """Rows that hold documents of these lengths, and padding after them.

  The n-th document of a row has the ids from 15 n to 15 n + 14; every row has
  them in another order.
  """
  rng = np.random.default_rng(0)
  size, length = config.train.batch_size, config.data.seq_len
  made = {
    key: np.zeros((size, length), np.int32)
    for key in ('token_ids', 'targets', 'segment_ids', 'positions')
  }
  for b in range(size):
    begin = 0
    for n, count in enumerate(np.roll(lengths, b)):
      here = b, slice(begin, begin + count)
      ids = rng.integers(15 * n, 15 * n + 15, count + 1)
      made['token_ids'][here], made['targets'][here] = ids[:-1], ids[1:]
      made['segment_ids'][here], made['positions'][here] = n + 1, range(count)
      begin += count
  return made | {'padding_mask': made['segment_ids'] > 0}


def to_numpy(tree: Any) -> Any:
  return jax.tree.map(np.asarray, tree)
