"""Models in workdirs as training makes them: a config and its checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax import config_file
from moe_jax.data import tokenizers
from moe_jax.distributed import mesh as mesh_lib
from moe_jax.errors import UserError
from moe_jax.model.build import build
from moe_jax.model.decoder import Decoder
from moe_jax.training import optimizer
from moe_jax.training.checkpoint import Store


def full_config(
  sections: ConfigDict, tokenizer: str, seq_len: Any
) -> ConfigDict:
  """Every key of the schema: the model's from `sections`, others' defaults.

  Args:
    sections: as `released.load` returns them.
    tokenizer: `data.tokenizer`.
    seq_len: `data.seq_len`, unless it is no number of tokens.

  Raises:
    UserError: the config is not valid.
  """
  config = config_file.schema()
  with config.unlocked():
    for name in ('model', 'moe', 'router'):
      config[name].update(sections[name])
    config.model.dtype = 'auto'
    config.loss.balance_layers = sections.loss.balance_layers
    config.data.tokenizer = tokenizer
    if type(seq_len) is int and seq_len > 0:
      config.data.seq_len = seq_len
  config_lib.validate(config, 1)
  return config


def write(workdir: Path, config: ConfigDict, params: Mapping[str, Any]) -> None:
  """Makes a workdir whose checkpoint of step 0 holds `params`.

  Training goes on from there, with an optimizer that has seen nothing.
  """
  params = jax.tree.map(jnp.asarray, dict(params))
  _, run_key = jax.random.split(jax.random.key(config.seed))
  state = {
    'step': jnp.zeros((), jnp.int32),
    'params': params,
    'opt_state': optimizer.make(config).init(params),
    'key': jax.random.key_data(run_key),
  }
  with Store.open(str(workdir), config) as store:
    store.save(0, state, {'step': 0})


def read(
  workdir: Path, step: int | None
) -> tuple[ConfigDict, dict[str, Any], int]:
  """The config, the parameters and the step of a checkpoint.

  The config's `model.vocab_size` is never 0 here.

  Args:
    workdir: of a run.
    step: None for the newest.

  Raises:
    UserError: there is no such run or checkpoint.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(f'{workdir} is not the workdir of a run: it has no {path}')
  config = config_file.load(str(path))
  whole = ConfigDict(config).unlock()
  if not config.model.vocab_size:
    whole.model.vocab_size = tokenizers.build(config.data.tokenizer).vocab_size
  with Store.open(str(workdir), config, read_only=True) as store:
    step = store.latest_step() if step is None else step
    state, _ = store.restore({'params': _abstract(whole)}, step)
  return whole.lock(), jax.tree.map(np.asarray, state['params']), step


def _abstract(config: ConfigDict) -> dict[str, Any]:
  """Shapes of the parameters, whole on one device."""

  def make() -> Decoder:
    return build(config, config.model.vocab_size, None, rngs=nnx.Rngs(0))

  params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
  one = mesh_lib.make_mesh(dict.fromkeys(mesh_lib.AXES, 1), jax.devices()[:1])
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    params,
    mesh_lib.shardings(params, one),
  )
