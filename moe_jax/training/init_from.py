"""Where a run's first parameters come from, if not from its seed."""

from typing import Any

import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import saved as saved_config
from moe_jax.errors import UserError
from moe_jax.parameter import BIAS_UPDATED
from moe_jax.training import run_dir
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.run_dir import RunDir
from moe_jax.training.state import Setup

_REMEDY = 'name another train.init_from'


def params(setup: Setup) -> dict[str, Any] | None:
  """Returns the newest parameters of the run that `train.init_from` names.

  Expert biases start at 0 where that run had none.

  Args:
    setup: The setup of the run that begins.

  Returns:
    The parameters where they belong on the mesh; None where the key names no
    run.

  Raises:
    UserError: That is no run, one without checkpoints or of another model; or
      the preset asks for one, and none is given.
  """
  origin = setup.config.train.init_from
  if not origin:
    return None
  config_lib.check_given(setup.config)
  try:
    config = _with_its_biases(setup.config, origin)
    wanted = traverse_util.flatten_dict(setup.abstract['params'])
    zeros = {}
    if not config.loss.bias_rate:
      declared = traverse_util.flatten_dict(setup.declarations)
      zeros = {
        path: leaf
        for path, leaf in wanted.items()
        if declared[path].update == BIAS_UPDATED
      }
    kept = {path: wanted[path] for path in wanted if path not in zeros}
    run = RunDir.existing(origin, config, _REMEDY)
    with Checkpointer(run, setup.vocabulary) as checkpointer:
      abstract = {'params': traverse_util.unflatten_dict(kept)}
      restored = checkpointer.restore(abstract).state
  except UserError as error:
    raise UserError(f'train.init_from: {error}') from error
  params = traverse_util.flatten_dict(restored['params']) | {
    path: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    for path, leaf in zeros.items()
  }
  return traverse_util.unflatten_dict(params)


def _with_its_biases(config: ConfigDict, origin: str) -> ConfigDict:
  """Returns the config, without expert biases if `origin` has none."""
  saved = run_dir.config_of(origin, _REMEDY)
  if saved_config.has_expert_bias(saved):
    return config
  unbiased = config.copy_and_resolve_references()
  unbiased.loss.bias_rate = 0.0
  return unbiased
