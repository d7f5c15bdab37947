"""Configs small enough to build in every test."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.model.decoder import Decoder
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.routing.selection import Pick, Select, SelectOptions, TopK
from moe_jax.training import state

VOCAB = 61

# The four models that the project is about, as overrides.
MODELS: dict[str, dict[str, Any]] = {
  'linear': {},
  'rmoe': {'router.recurrent': 'gru'},
  'cartesian': {'moe.factors': 2},
  'cartesian rmoe': {'moe.factors': 2, 'router.recurrent': 'gru'},
}


def config(**overrides: Any) -> ConfigDict:
  """A tiny model; `moe__top_k=1` or `**{'moe.top_k': 1}` changes a key."""
  made = config_lib.get_config()
  sizes = {
    'model.num_layers': 2,
    'model.hidden_size': 32,
    'model.ffn_width': 48,
    'model.init_std': 0.1,
    'model.dtype': 'float32',
    'moe.num_experts': 8,
    'moe.expert_width': 24,
    'router.state_size': 16,
    'data.seq_len': 16,
    'data.threads': 1,
    'train.batch_size': 8,
    'train.steps': 20,
    'optimizer.warmup_steps': 4,
  }
  for key, value in (sizes | overrides).items():
    path = key.replace('__', '.').split('.')
    section = made
    for name in path[:-1]:
      section = section[name]
    section[path[-1]] = value
  return made


def select(
  num_experts: int, k: int = 2, *, pick: Pick | None = None, **changes: Any
) -> Select:
  """Top-k of the softmax, renormalised, unless changed."""
  options = SelectOptions(num_experts, k, **changes)
  return Select(options, TopK(k) if pick is None else pick)


def abstract(made: ConfigDict) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """As `decoder`, but shapes and dtypes instead of arrays."""
  model = nnx.eval_shape(
    lambda: Decoder(made, VOCAB, None, rngs=nnx.Rngs(params=0))
  )
  return nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model, nnx.Param))


def decoder(
  made: ConfigDict, seed: int = 0, mesh: jax.sharding.Mesh | None = None
) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """A graph definition and parameters of it, biases and scales not trivial."""

  def create(key: jax.Array) -> Decoder:
    return Decoder(made, VOCAB, mesh, rngs=nnx.Rngs(params=key))

  graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(jax.random.key(0))))
  # One operation after another: those of one shape compile once for all models,
  # where a jitted initialisation would compile anew for every one.
  first = nnx.to_pure_dict(nnx.state(create(jax.random.key(seed)), nnx.Param))
  leaves, tree = jax.tree.flatten(first)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  noisy = [
    leaf + 0.1 * jax.random.normal(k, leaf.shape)
    for leaf, k in zip(leaves, keys, strict=True)
  ]
  return graphdef, jax.tree.unflatten(tree, noisy)


def on_mesh(
  axes: dict[str, int], scale: float = 1.0, **changes: Any
) -> tuple[ConfigDict, state.Setup, Any]:
  """A tiny model on a mesh: the config, the setup and its parameters.

  Args:
    axes: Sizes of the mesh.
    scale: What parameters are multiplied by: large ones make some tokens likely
      and others not.
    **changes: As of `config`.
  """
  made = config(**{'model.num_layers': 1, 'eval.batch_size': 4} | changes)
  shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | axes
  devices = jax.devices()[: int(np.prod(list(shape.values())))]
  setup = state.setup(made, VOCAB, mesh_lib.make_mesh(shape, devices))
  params = jax.tree.map(
    lambda leaf, place: jax.device_put(scale * leaf, place.sharding),
    decoder(made)[1],
    setup.abstract['params'],
  )
  return made, setup, params
