"""Writes tensors as a released checkpoint keeps them: safetensors files."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from moe_jax.errors import UserError, choose
from moe_jax.interop.tensor_file import INDEX, SINGLE

DTYPES = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
}
# By it transformers knows that the names are PyTorch's.
_METADATA = {'format': 'pt'}


def rounded(
  tensors: Mapping[str, np.ndarray], dtype: str
) -> dict[str, np.ndarray]:
  """The tensors in a dtype of `DTYPES`.

  Raises:
    UserError: there is no such dtype, or a value is too large for it.
  """
  choose('--dtype', dtype, DTYPES)
  with np.errstate(over='ignore'):
    small = {name: t.astype(DTYPES[dtype]) for name, t in tensors.items()}
  for name, tensor in tensors.items():
    if np.isfinite(tensor).all() and not np.isfinite(small[name]).all():
      raise UserError(
        f'--dtype = {dtype!r} cannot hold {name}, which goes up to'
        f' {abs(tensor).max():g}; bfloat16 and float32 can'
      )
  return small


def write(
  directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
) -> None:
  """Writes the files of a checkpoint into an existing folder.

  Args:
    directory: the folder.
    tensors: by name; in this order they fill the files.
    max_shard_bytes: of a file's tensors, unless one alone is larger; 0 for a
      single file whatever its size.

  Raises:
    UserError: `max_shard_bytes` is negative.
    OSError: the disk is full, or refuses a file.
  """
  if max_shard_bytes < 0:
    raise UserError(
      f'--max-shard-bytes = {max_shard_bytes} must be a number of bytes, or 0'
      ' for a single file'
    )
  shards = _shards(tensors, max_shard_bytes)
  if len(shards) == 1:
    _save(shards[0], directory / SINGLE)
    return
  places = {}
  for number, shard in enumerate(shards, start=1):
    name = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    _save(shard, directory / name)
    places |= dict.fromkeys(shard, name)
  total = sum(tensor.nbytes for tensor in tensors.values())
  index = {'metadata': {'total_size': total}, 'weight_map': places}
  text = json.dumps(index, indent=2, sort_keys=True)
  (directory / INDEX).write_text(text + '\n', 'utf-8')


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
  try:
    save_file(tensors, path, metadata=_METADATA)
  except SafetensorError as error:  # which is no OSError, as the disk's are
    raise OSError(errno.EIO, str(error)) from error


def _shards(
  tensors: Mapping[str, np.ndarray], most: int
) -> list[dict[str, np.ndarray]]:
  """The tensors in order, as many to a shard as fit."""
  shards, size = [{}], 0
  for name, tensor in tensors.items():
    if most and shards[-1] and size + tensor.nbytes > most:
      shards.append({})
      size = 0
    shards[-1][name] = np.ascontiguousarray(tensor)
    size += tensor.nbytes
  return shards
