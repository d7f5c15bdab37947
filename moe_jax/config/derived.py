"""What follows from a config: its mesh, its layers and their sizes."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from moe_jax.config.schema import KEYS
from moe_jax.errors import UserError

# From the one that sends least.
MESH_AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
# Sequences are split over these axes together, and outside the experts tokens
# over those and the one that splits positions.
BATCH_AXES = ('data', 'fsdp', 'expert')
TOKEN_AXES = (*BATCH_AXES, 'context')


def get(config: ConfigDict, key: str) -> Any:
  """Returns the value of a dotted key."""
  return functools.reduce(lambda part, name: part[name], key.split('.'), config)


def is_read(config: ConfigDict, name: str) -> bool:
  """Returns whether other keys leave a meaning to the key of that name."""
  only = KEYS[name].only
  if not only:
    return True
  other, sign, values = only.split(' ', 2)
  is_one_of_them = str(get(config, other)) in values.split(', ')
  return is_read(config, other) and is_one_of_them == (sign == '=')


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns dotted keys: {'a': {'b': 1}} becomes {'a.b': 1}."""
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      flat |= {f'{name}.{key}': leaf for key, leaf in flatten(value).items()}
    else:
      flat[name] = value
  return flat


def mesh_shape(config: ConfigDict, num_devices: int) -> dict[str, int]:
  """Returns the devices along every mesh axis; -1 has taken what is left.

  Raises:
    UserError: The axes do not multiply to `num_devices`.
  """
  sizes = {axis: config.mesh[axis] for axis in MESH_AXES}
  return fill(sizes, 'mesh', num_devices, 'devices')


def layer_kinds(config: ConfigDict) -> tuple[str, ...]:
  """Returns 'moe' or 'dense' for every layer, from the first."""
  moe = config.moe

  def kind(layer: int) -> str:
    early = layer < max(moe.first_dense, moe.offset)
    chosen = (layer - moe.offset) % moe.every == 0
    return 'moe' if moe.num_experts and chosen and not early else 'dense'

  return tuple(kind(layer) for layer in range(config.model.num_layers))


def moe_layers(config: ConfigDict) -> list[int]:
  """Returns the numbers of the MoE layers, counted from 1 over all layers."""
  kinds = layer_kinds(config)
  return [i for i, kind in enumerate(kinds, start=1) if kind == 'moe']


def router_names(config: ConfigDict) -> list[str]:
  """Returns the name of every router, from the lowest.

  It is the number of its layer, as '3', and where that has several sub-layers
  their letters, as '3A' and '3B'.
  """
  factors = config.moe.factors
  letters = [chr(ord('A') + s) for s in range(factors)] if factors > 1 else ['']
  return [
    f'{layer}{letter}' for layer in moe_layers(config) for letter in letters
  ]


def head_dim(config: ConfigDict) -> int:
  """Returns the size of one attention head."""
  model = config.model
  return model.head_dim or model.hidden_size // model.num_heads


def decay_end(config: ConfigDict) -> int:
  """Returns the step at which the learning rate reaches its last value.

  At least one step follows the warm-up, so a short trial of a long recipe
  runs: it ends while the learning rate still rises.
  """
  optimizer = config.optimizer
  end = optimizer.decay_steps or config.train.steps
  return max(end, optimizer.warmup_steps + 1)


def vocab_size(config: ConfigDict, of_tokenizer: int) -> int:
  """Returns V: `model.vocab_size`, or what the tokenizer needs.

  Raises:
    UserError: The tokenizer has ids that the model would not have.
  """
  size = config.model.vocab_size or of_tokenizer
  if size < of_tokenizer:
    raise UserError(
      f'model.vocab_size = {size} is below the {of_tokenizer} ids of'
      f" data.tokenizer = {config.data.tokenizer!r}; 0 takes the tokenizer's"
    )
  return size


def vocab_rows(config: ConfigDict, vocab_size: int) -> int:
  """Returns the rows of embedding and head: V, and the padding behind."""
  multiple = config.model.vocab_multiple
  return -(-vocab_size // multiple) * multiple


def profiled_steps(profile: str) -> range:
  """Returns the steps that a valid `train.profile` names: START:STEPS or ''."""
  if not profile:
    return range(0)
  start, _, steps = profile.partition(':')
  return range(int(start), int(start) + int(steps))


def eval_batch_size(config: ConfigDict) -> int:
  """Returns the sequences in a batch of an evaluation, over all devices."""
  return config.eval.batch_size or config.train.batch_size


def fill(
  sizes: dict[str, int], section: str, total: int, of: str
) -> dict[str, int]:
  """Returns `sizes`, one of -1 having taken what the others leave of `total`.

  Args:
    sizes: The size of each axis, as the config has them.
    section: The section of the config that has the axes.
    total: The number that the sizes have to multiply to.
    of: The name of the things that are counted.

  Raises:
    UserError: The sizes do not multiply to `total`.
  """
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise UserError(f'{section}.{axis} = {size} must be at least 1, or -1')
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    names = ' and '.join(f'{section}.{axis}' for axis in free)
    many = 'both' if len(free) == 2 else 'all'
    raise UserError(
      f'{names} are {many} -1; only one axis can take what is left'
    )
  fixed = {axis: size for axis, size in sizes.items() if size != -1}
  product = math.prod(fixed.values())
  if free and total % product == 0:
    return sizes | {free[0]: total // product}
  if free:
    raise UserError(
      f'{_product(section, fixed)} does not divide the number of'
      f' {of}, {total}; choose axes whose product does'
    )
  if product != total:
    raise UserError(
      f'{_product(section, fixed)}, but the number of {of} is'
      f' {total}; change an axis, or set one to -1: what is left'
    )
  return sizes


def _product(section: str, axes: dict[str, int]) -> str:
  """Returns `mesh.data x mesh.fsdp = 2 x 4 = 8`."""
  names = [f'{section}.{axis}' for axis in axes]
  return f'{written_out(names, axes.values())} = {math.prod(axes.values())}'


def written_out(names: Iterable[str], sizes: Iterable[int]) -> str:
  """Returns `a x b = 2 x 4`."""
  return f'{" x ".join(names)} = {" x ".join(map(str, sizes))}'
