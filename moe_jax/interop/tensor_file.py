"""The tensors of a checkpoint: read whole, held against what is asked for.

They are in `model.safetensors`, or in several files that
`model.safetensors.index.json` lists by tensor.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.interop.released_keys import read_json

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# By the file's names; bfloat16 is known to NumPy once jax is imported.
_DTYPES = ('F64', 'F32', 'F16', 'BF16')
_FREQUENCIES = r'model\.layers\.(\d+)\.self_attn\.rotary_emb\.inv_freq'
_MOST_NAMED = 4  # tensors of one kind that an error lists


def read(
  directory: Path,
  wanted: Mapping[str, tuple[int, ...]],
  unread: Collection[str],
  config: ConfigDict,
) -> dict[str, np.ndarray]:
  """Reads exactly the wanted tensors.

  Args:
    directory: of the checkpoint.
    wanted: the shape of every tensor, by name.
    unread: further tensors that may be there, and are dropped.
    config: of the model; what the file may repeat follows from it.

  Raises:
    UserError: a file cannot be read; or a tensor is missing, left over, or
      of another shape, or holds something else than floats.
  """
  sharded = not (directory / SINGLE).exists() and (directory / INDEX).exists()
  path = directory / (INDEX if sharded else SINGLE)
  tensors = _load_shards(path) if sharded else _load(path)
  tensors = {name: t for name, t in tensors.items() if name not in unread}
  tensors = _without_repeats(path, tensors, config)
  _check(path, tensors, wanted)
  return tensors


def _load_shards(index: Path) -> dict[str, np.ndarray]:
  """Every tensor of the files that the index names, each from its own."""
  places = read_json(index).get('weight_map')
  names = places.values() if isinstance(places, dict) else [None]
  if not all(
    isinstance(name, str) and Path(name).name == name for name in names
  ):
    raise UserError(
      f'{index} has no weight_map from tensors to files beside it'
    )
  tensors = {}
  for file in sorted(set(names)):
    found = _load(index.with_name(file))
    stray = [name for name in found if places.get(name) != file]
    lost = [n for n, f in places.items() if f == file and n not in found]
    problems = _listed(f'{file} has ', stray) + _listed(f'{file} lacks ', lost)
    if problems:
      raise UserError(f'{index} is of other files: {"; ".join(problems)}')
    tensors |= found
  return tensors


def _load(path: Path) -> dict[str, np.ndarray]:
  """Every tensor of the file, if all are floats."""
  try:
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
    f'{k} is {dtype}' for k, dtype in dtypes.items() if dtype not in _DTYPES
  ]
  if odd:
    raise UserError(
      f'{path}: {_listed("", odd)[0]}; supported are {", ".join(_DTYPES)}'
    )


def _without_repeats(
  path: Path, tensors: Mapping[str, np.ndarray], config: ConfigDict
) -> dict[str, np.ndarray]:
  """Drops tensors that repeat what the config or another tensor says.

  Some PyTorch versions save the rotary frequencies, or a tied output head.

  Raises:
    UserError: such a tensor says something else.
  """
  model = config.model
  head_dim = config_lib.head_dim(config)
  exponent = np.arange(0, head_dim, 2) / head_dim
  frequencies = model.rope_theta**-exponent

  def repeats(name: str) -> bool:
    found = re.fullmatch(_FREQUENCIES, name)
    if found and int(found[1]) < model.num_layers:
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


def _listed(title: str, names: Iterable[str]) -> list[str]:
  """One line for the message, the first few by name; none for none."""
  names = sorted(names)
  more = len(names) - _MOST_NAMED
  tail = f' and {more} more' if more > 0 else ''
  return [title + ', '.join(names[:_MOST_NAMED]) + tail] if names else []
