"""Tensors in safetensors files, as a released checkpoint keeps them.

They are in `model.safetensors`, or in several files that
`model.safetensors.index.json` lists by tensor. They are read whole, and held
against what is asked for.
"""

import errno
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax import config as config_lib
from moe_jax import strict_json
from moe_jax.errors import UserError, choose, printable
from moe_jax.files import check_regular
from moe_jax.interop.formats.base import read_json

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# The dtypes that are written, by their names in configs.
DTYPES = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
}
# The dtypes that are read, by their names in files; NumPy knows bfloat16 since
# ml_dtypes is imported.
_READABLE = ('F64', 'F32', 'F16', 'BF16')
# By it transformers knows that the names are PyTorch's.
_METADATA = {'format': 'pt'}
_FREQUENCIES = r'model\.layers\.(\d+)\.self_attn\.rotary_emb\.inv_freq'
_MOST_NAMED = 4  # tensors of one kind that an error lists
_LONGEST_NAME = 200


def read(
  directory: Path,
  wanted: Mapping[str, tuple[int, ...]],
  unread: Collection[str],
  config: ConfigDict,
) -> dict[str, np.ndarray]:
  """Reads exactly the wanted tensors.

  Args:
    directory: The folder of the checkpoint.
    wanted: The shape of every tensor, by name.
    unread: The names of further tensors that may be there and are dropped.
    config: The config of the model, from which follows what the file may
      repeat.

  Raises:
    UserError: A file cannot be read; or a tensor is missing, left over, or
      of another shape, or holds something else than finite floats.
  """
  sharded = not (directory / SINGLE).exists() and (directory / INDEX).exists()
  path = directory / (INDEX if sharded else SINGLE)
  tensors = _load_shards(path) if sharded else _load(path)
  tensors = {name: t for name, t in tensors.items() if name not in unread}
  tensors = _without_repeats(path, tensors, config)
  _check(path, tensors, wanted)
  _check_finite(path, tensors)
  return tensors


def _load_shards(index: Path) -> dict[str, np.ndarray]:
  """Returns every tensor of the index, each from the file that it names."""
  places = read_json(index).get('weight_map')
  if not isinstance(places, dict) or not all(
    isinstance(name, str) and name and Path(name).name == name
    for name in places.values()
  ):
    raise UserError(
      f'{index} has no weight_map from tensors to files beside it'
    )
  tensors: dict[str, np.ndarray] = {}
  for file in sorted(set(places.values())):
    shard = _load(index.with_name(file))
    stray = [name for name in shard if places.get(name) != file]
    lost = [n for n, f in places.items() if f == file and n not in shard]
    problems = _listed(f'{file} has ', stray) + _listed(f'{file} lacks ', lost)
    if problems:
      raise UserError(f'{index} is of other files: {"; ".join(problems)}')
    tensors |= shard
  return tensors


def _load(path: Path) -> dict[str, np.ndarray]:
  """Returns every tensor of the file, if all are floats."""
  try:
    check_regular(path)
    with safe_open(path, framework='numpy') as file:
      names = file.keys()
      dtypes = {name: file.get_slice(name).get_dtype() for name in names}
      _check_dtypes(path, dtypes)
      return {name: file.get_tensor(name) for name in names}
  except FileNotFoundError as error:
    raise UserError(f'{path} does not exist') from error
  except (OSError, SafetensorError) as error:
    raise UserError(
      f'{path} is not a whole safetensors file: {error}'
    ) from error


def _check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
  odd = [
    f'{k} is {dtype}' for k, dtype in dtypes.items() if dtype not in _READABLE
  ]
  if odd:
    raise UserError(
      f'{path}: {_listed("", odd)[0]}; supported are {", ".join(_READABLE)}'
    )


def _without_repeats(
  path: Path, tensors: Mapping[str, np.ndarray], config: ConfigDict
) -> dict[str, np.ndarray]:
  """Drops tensors that repeat what the config or another tensor says.

  Some PyTorch versions save the rotary frequencies, or a tied output head.

  Raises:
    UserError: Such a tensor says something else.
  """
  model = config.model
  head_dim = config_lib.head_dim(config)
  exponent = np.arange(0, head_dim, 2) / head_dim
  frequencies = model.rope_theta**-exponent

  def repeats(name: str) -> bool:
    match = re.fullmatch(_FREQUENCIES, name)
    if match and int(match[1]) < model.num_layers:
      original, tolerance = frequencies, 1e-2  # they may be saved in bfloat16
    elif name == 'lm_head.weight' and model.tie_embeddings:
      original, tolerance = tensors.get('model.embed_tokens.weight'), 0
    else:
      return False
    if original is None or _same(tensors[name], original, tolerance):
      return True
    raise UserError(
      f'{path}: {name} is not what follows from config.json, which has'
      f' rope_theta = {model.rope_theta:g} and tie_word_embeddings ='
      f' {str(model.tie_embeddings).lower()}'
    )

  return {name: t for name, t in tensors.items() if not repeats(name)}


def _same(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=0)


def _check(
  path: Path,
  tensors: Mapping[str, np.ndarray],
  wanted: Mapping[str, tuple[int, ...]],
) -> None:
  """Refuses any difference in names and shapes."""
  wrong = [
    f'{name} has shape {tensors[name].shape}, not {shape}'
    for name, shape in wanted.items()
    if name in tensors and tensors[name].shape != shape
  ]
  problems = (
    _listed('missing: ', wanted.keys() - tensors.keys())
    + _listed('left over: ', tensors.keys() - wanted.keys())
    + _listed('', wrong)
  )
  if problems:
    raise UserError(f'{path} does not fit config.json: {"; ".join(problems)}')


def _check_finite(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Refuses NaN and infinity, with which no logits could be compared."""
  odd = [name for name, t in tensors.items() if not np.isfinite(t).all()]
  if odd:
    raise UserError(
      f'{path} has {_listed("values that are no numbers in ", odd)[0]}'
    )


def _listed(title: str, names: Iterable[str]) -> list[str]:
  """Returns one line that has the first few by name; none for none.

  The names may be a stranger's.
  """
  names = [printable(name, _LONGEST_NAME) for name in sorted(names)]
  more = len(names) - _MOST_NAMED
  tail = f' and {more} more' if more > 0 else ''
  return [title + ', '.join(names[:_MOST_NAMED]) + tail] if names else []


def round_to(
  tensors: Mapping[str, np.ndarray], dtype: str
) -> dict[str, np.ndarray]:
  """Returns the tensors in a dtype of `DTYPES`.

  Raises:
    UserError: There is no such dtype, or a value is too large for it.
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
    directory: The folder.
    tensors: The tensors by name; in this order they fill the files.
    max_shard_bytes: The most bytes of tensors in a file, unless one tensor is
      larger; 0 for a single file whatever its size.

  Raises:
    UserError: `max_shard_bytes` is negative.
    OSError: The disk is full, or refuses a file.
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
  places: dict[str, str] = {}
  for number, shard in enumerate(shards, start=1):
    name = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    _save(shard, directory / name)
    places |= dict.fromkeys(shard, name)
  total = sum(tensor.nbytes for tensor in tensors.values())
  index = {'metadata': {'total_size': total}, 'weight_map': places}
  text = strict_json.dumps(index, indent=2, sort_keys=True)
  (directory / INDEX).write_text(text + '\n', 'utf-8')


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
  try:
    save_file(tensors, path, metadata=_METADATA)
  except SafetensorError as error:  # which is no OSError, as the disk's are
    said = re.search(r'os error (\d+)', str(error))
    number = int(said[1]) if said else errno.EIO
    raise OSError(number, os.strerror(number), str(path)) from error


def _shards(
  tensors: Mapping[str, np.ndarray], most: int
) -> list[dict[str, np.ndarray]]:
  """Returns the tensors in order, as many to a shard as fit."""
  shards: list[dict[str, np.ndarray]] = [{}]
  size = 0
  for name, tensor in tensors.items():
    if most and shards[-1] and size + tensor.nbytes > most:
      shards.append({})
      size = 0
    shards[-1][name] = np.ascontiguousarray(tensor)
    size += tensor.nbytes
  return shards
