"""Released checkpoints: from a folder to our parameters and back.

A checkpoint loads whole or not at all: every tensor is used once, or the error
names it.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from ml_collections import ConfigDict

from moe_jax import strict_json
from moe_jax.errors import UserError, choose
from moe_jax.files import expand
from moe_jax.interop import formats, mapping, safetensors
from moe_jax.model.decoder import Decoder


def logits(
  directory: str | Path, input_ids: np.ndarray | jax.Array
) -> jax.Array:
  """Runs a released checkpoint in float32.

  Args:
    directory: The folder that has `config.json` and `model.safetensors`, or
      several files of tensors and their index.
    input_ids: Integers of shape [B, L]; every position is a token, none is
      padding.

  Returns:
    logits_BLV, float32.

  Raises:
    UserError: As `load`, or `input_ids` has another rank or an id that is not
      in the vocabulary.
  """
  config, params = load(directory)
  ids_BL = _check_ids(input_ids, config.model.vocab_size)
  return run(config, params, ids_BL)


def run(
  config: ConfigDict, params: Mapping[str, Any], ids_BL: np.ndarray | jax.Array
) -> jax.Array:
  """Returns logits_BLV of a model that computes in float32, dropping nothing.

  Args:
    config: The config of the model; see `abstract`.
    params: The nested dict of its parameters, float32.
    ids_BL: Token ids, int32; every position is a token.
  """
  graphdef, _ = abstract(config)

  def apply(params: dict[str, Any], ids_BL: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model(ids_BL, jnp.ones(ids_BL.shape, bool)).logits_BLV

  with jax.default_matmul_precision('highest'):  # on TPU and GPU too
    return jax.jit(apply)(params, ids_BL)


def load(
  directory: str | Path, allowed: Iterable[str] = formats.ROUTED
) -> tuple[ConfigDict, dict[str, Any]]:
  """Reads a released checkpoint.

  Args:
    directory: The folder, as in `logits`.
    allowed: The names of the formats, of `formats.FORMATS`, that will do.

  Returns:
    config: The sections `model`, `moe`, `router` and `loss`, locked.
    params: The nested dict that `Decoder` describes, NumPy float32.

  Raises:
    UserError: A file cannot be read, the config is not supported, or a tensor
      is missing, left over, or of the wrong shape or dtype.
  """
  directory = Path(expand(str(directory)))
  format, config = formats.read(directory, allowed)
  _, shapes = abstract(config)
  leaves = _leaves(shapes, config, format)
  wanted = {
    name: leaf.tensor_shape
    for leaf in leaves.values()
    for name in leaf.names.flat
  }
  unread = formats.FORMATS[format].unread(config)
  tensors = safetensors.read(directory, wanted, unread, config)
  params = {key: leaf.gather(tensors) for key, leaf in leaves.items()}
  return config, traverse_util.unflatten_dict(params)


def save(
  directory: Path,
  config: ConfigDict,
  params: Mapping[str, Any],
  format: str,
  *,
  max_positions: int,
  dtype: str,
  max_shard_bytes: int,
) -> None:
  """Writes a model as a released checkpoint, into an existing folder.

  Args:
    directory: The folder.
    config: The config of the model, with a `model.vocab_size` that is not 0.
    params: The parameters of the model.
    format: A name of `formats.FORMATS`.
    max_positions: The longest sequence that the model is for, in tokens.
    dtype: The dtype of the file's tensors, a name of `safetensors.DTYPES`.
    max_shard_bytes: The most bytes of one file; 0 for a single file.

  Raises:
    UserError: The format cannot say what the model is, or the dtype cannot
      hold it.
  """
  values = formats.write(config, format) | {
    'max_position_embeddings': max_positions,
    'torch_dtype': dtype,
  }
  tensors = to_released(params, config, format)
  for name, shape in formats.FORMATS[format].unread(config).items():
    tensors[name] = np.zeros(shape, np.float32)
  tensors = safetensors.round_to(tensors, dtype)
  safetensors.write(directory, tensors, max_shard_bytes)
  text = strict_json.dumps(values, indent=2) + '\n'
  (directory / 'config.json').write_text(text, 'utf-8')


def to_released(
  params: Mapping[str, Any], config: ConfigDict, format: str
) -> dict[str, np.ndarray]:
  """Names and shapes a dict like our parameters as a released format does.

  Args:
    params: A nested dict with the leaves of the model's parameters: the
      parameters themselves or, say, their gradients.
    config: The config of the model.
    format: A name of `formats.FORMATS`.

  Returns:
    Tensors by their released names; `load` reads the same values from them.

  Raises:
    UserError: The released format has no tensor for one of the parameters.
  """
  arrays = traverse_util.flatten_dict(dict(params))
  shapes = {path: array.shape for path, array in arrays.items()}
  leaves = _leaves(shapes, config, format)
  return mapping.join(
    pair
    for path, leaf in leaves.items()
    for pair in leaf.scatter(np.asarray(arrays[path])).items()
  )


def abstract(
  config: ConfigDict,
) -> tuple[nnx.GraphDef, dict[mapping.Path, tuple[int, ...]]]:
  """Returns the model without arrays, and the shape of every parameter.

  It computes in float32 and drops no token, whatever the config says of that.
  """
  make = functools.partial(
    Decoder, exact(config), config.model.vocab_size, None
  )
  model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(params=0)))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  flat = traverse_util.flatten_dict(params)
  return nnx.graphdef(model), {path: leaf.shape for path, leaf in flat.items()}


def exact(config: ConfigDict) -> ConfigDict:
  """Returns the config of what computes in float32 and drops no token."""
  changed = config.copy_and_resolve_references()
  with changed.unlocked():
    changed.model.dtype = 'float32'
    changed.moe.dispatch = 'dropless'
  return changed


def _leaves(
  shapes: Mapping[mapping.Path, tuple[int, ...]],
  config: ConfigDict,
  format: str,
) -> dict[mapping.Path, mapping.Leaf]:
  choose('--format', format, formats.FORMATS)
  rules = formats.FORMATS[format].rules(config)
  return mapping.leaves(shapes, config, format, rules)


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
