"""Released PyTorch checkpoints of RMoE and CartesianMoE, in and out.

A checkpoint is a folder with a `config.json` and a `model.safetensors`. It
loads whole or not at all: every tensor is used once, or the error names it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.interop import layouts, released_config, tensor_file
from moe_jax.model.build import build


def logits(
  directory: str | Path, input_ids: np.ndarray | jax.Array
) -> jax.Array:
  """Runs a released checkpoint in float32.

  Args:
    directory: with `config.json` and `model.safetensors`.
    input_ids: integers of shape [B, L]; every position is a token, none is
      padding.

  Returns:
    logits_BLV float32.

  Raises:
    UserError: as `load`, or `input_ids` has another rank or an id that is not
      in the vocabulary.
  """
  config, params = load(directory)
  ids_BL = _check_ids(input_ids, config.model.vocab_size)
  graphdef, _ = _abstract(config)

  def apply(params: dict[str, Any], ids_BL: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model(ids_BL, jnp.ones(ids_BL.shape, bool)).logits_BLV

  with jax.default_matmul_precision('highest'):  # on TPU and GPU too
    return jax.jit(apply)(params, ids_BL)


def load(directory: str | Path) -> tuple[ConfigDict, dict[str, Any]]:
  """Reads a released checkpoint.

  Args:
    directory: with `config.json` and `model.safetensors`.

  Returns:
    config: the sections `model`, `moe`, `router` and `loss`, locked.
    params: the nested dict that `moe_jax.model.build` describes, NumPy float32.

  Raises:
    UserError: a file cannot be read, the config is not supported, or a tensor
      is missing, left over, or of the wrong shape or dtype.
  """
  path = Path(directory) / 'model.safetensors'
  layout, config = released_config.read(path.with_name('config.json'))
  _, shapes = _abstract(config)
  leaves = layouts.leaves(shapes, config, layout)
  wanted = {
    name: leaf.tensor_shape(shapes[key])
    for key, leaf in leaves.items()
    for name in leaf.names.flat
  }
  tensors = tensor_file.read(path, wanted, config)
  params = {
    key: leaf.gather(tensors, shapes[key]) for key, leaf in leaves.items()
  }
  return config, traverse_util.unflatten_dict(params)


def to_released(
  params: Mapping[str, Any], config: ConfigDict, layout: str
) -> dict[str, np.ndarray]:
  """Names and shapes a dict like our parameters as a released format does.

  Args:
    params: nested, with the leaves of the model's parameters: they themselves
      or, say, their gradients.
    config: of the model.
    layout: 'rmoe' or 'cartesian'.

  Returns:
    Tensors by their released names; `load` reads the same values from them.

  Raises:
    UserError: the released format has no tensor for one of the parameters.
  """
  arrays = traverse_util.flatten_dict(dict(params))
  shapes = {path: array.shape for path, array in arrays.items()}
  released = {}
  for path, leaf in layouts.leaves(shapes, config, layout).items():
    released |= leaf.scatter(np.asarray(arrays[path]))
  return released


def _abstract(
  config: ConfigDict,
) -> tuple[nnx.GraphDef, dict[layouts.Path, tuple[int, ...]]]:
  """The model without arrays, and the shape of every parameter."""
  model = nnx.eval_shape(
    lambda: build(
      config, config.model.vocab_size, None, rngs=nnx.Rngs(params=0)
    )
  )
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  flat = traverse_util.flatten_dict(params)
  return nnx.graphdef(model), {path: leaf.shape for path, leaf in flat.items()}


def _check_ids(input_ids: np.ndarray | jax.Array, vocab_size: int) -> jax.Array:
  """Returns `input_ids` as int32 [B, L]."""
  try:
    ids = np.asarray(input_ids)
  except ValueError as error:  # rows of unequal length
    raise UserError(f'input_ids is not an array: {error}') from error
  if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
    raise UserError(
      f'input_ids has shape {ids.shape} and dtype {ids.dtype}; it must be an'
      ' array of integers [sequences, tokens], with at least one of each'
    )
  if ids.min() < 0 or ids.max() >= vocab_size:
    raise UserError(
      f'input_ids has ids from {ids.min()} to {ids.max()}, but the vocabulary'
      f' has {vocab_size}: 0 to {vocab_size - 1}'
    )
  return jnp.asarray(ids, jnp.int32)
