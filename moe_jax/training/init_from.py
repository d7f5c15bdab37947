"""Where a run's first parameters come from, if not from its seed."""

from typing import Any

import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from moe_jax.config import saved as saved_config
from moe_jax.errors import UserError
from moe_jax.training import run_dir
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.state import Setup

_REMEDY = 'name another train.init_from'
_CHOICE_BIAS = 'choice_bias_N'


def params(setup: Setup) -> dict[str, Any] | None:
  """The newest parameters of the run that `train.init_from` names.

  The biases on the choice of experts start at 0 where that run had none.

  Returns:
    Them where they belong on the mesh; None where it names no run.

  Raises:
    UserError: that is no run, one without checkpoints or of another model.
  """
  origin = setup.config.train.init_from
  if not origin:
    return None
  try:
    config = _with_its_biases(setup.config, origin)
    wanted = traverse_util.flatten_dict(setup.abstract['params'])
    zeros = {}
    if not config.loss.bias_rate:
      zeros = {path: leaf for path, leaf in wanted.items() if _is_bias(path)}
    kept = {path: wanted[path] for path in wanted if path not in zeros}
    with Checkpointer.open(
      origin, config, setup.dictionary, read_only=True, remedy=_REMEDY
    ) as store:
      abstract = {'params': traverse_util.unflatten_dict(kept)}
      found, _ = store.restore(abstract)
  except UserError as error:
    raise UserError(f'train.init_from: {error}') from error
  made = traverse_util.flatten_dict(found['params']) | {
    path: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    for path, leaf in zeros.items()
  }
  return traverse_util.unflatten_dict(made)


def _with_its_biases(config: ConfigDict, origin: str) -> ConfigDict:
  """The config, without biases on the choice if `origin` has none."""
  saved = run_dir.config_of(origin, _REMEDY)
  if saved_config.has_choice_bias(saved):
    return config
  unbiased = config.copy_and_resolve_references()
  unbiased.loss.bias_rate = 0.0
  return unbiased


def _is_bias(path: tuple[Any, ...]) -> bool:
  return path[-1] == _CHOICE_BIAS
