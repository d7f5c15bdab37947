"""What every format shares: reading a `config.json`, the keys of a decoder."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from moe_jax import files
from moe_jax.config.keys import LARGEST
from moe_jax.config.schema import KEYS
from moe_jax.errors import UserError, printable
from moe_jax.interop.mapping import Rules

_MOST = sys.float_info.max
_MOST_LAYERS = int(KEYS['model.num_layers'].high or LARGEST)

# What the released configuration classes fill in for an absent key.
DEFAULTS = {
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'rope_theta': 10_000.0,
  'rope_scaling': None,
  'rope_parameters': None,
  'attention_bias': False,
  'mlp_bias': False,
  'tie_word_embeddings': False,
  'num_key_value_heads': None,
  'head_dim': None,
}


def is_file(path: Path) -> bool:
  """Returns whether there is a file at `path`.

  Raises:
    UserError: The folder that it would be in cannot be read.
  """
  try:
    return path.is_file()
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error


def read_json(path: Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Raises:
    UserError: The file is not there or holds something else.
  """
  try:
    values = files.read_json(path)
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error
  except ValueError as error:
    raise UserError(f'{path} is not JSON: {error}') from error
  if not isinstance(values, dict):
    raise UserError(f'{path} is JSON, but not an object of keys and values')
  return values


@dataclasses.dataclass(frozen=True)
class Keys:
  """The keys of a released `config.json`, each read with its check.

  Every method raises a `UserError` that names the file, the key and its value
  where the key is missing or its value is not of the kind that the method
  returns.

  Attributes:
    path: The path of the file.
    values: The values by key, with defaults for keys that it may leave out.
  """

  path: Path
  values: dict[str, Any]

  def fail(self, key: str, wanted: str) -> UserError:
    """Returns the error of a key whose value is not what is wanted."""
    value = printable(json.dumps(self.values[key]), 200)
    return UserError(f'{self.path}: {key} = {value} {wanted}')

  def __getitem__(self, key: str) -> Any:
    if key not in self.values:
      raise UserError(f'{self.path}: the key {key} is missing')
    return self.values[key]

  def integer(
    self, key: str, least: int | None = 1, most: int | None = None
  ) -> int:
    """Returns an integer between `least` and `most`.

    Args:
      key: The key.
      least: The least; None is no bound but that of int32.
      most: The most; None is the most that int32 holds.
    """
    value = self[key]
    if type(value) is not int:
      raise self.fail(key, 'must be an integer')
    if least is not None and value < least:
      raise self.fail(key, f'is not supported; it must be at least {least}')
    most = LARGEST if most is None else most
    if not -LARGEST <= value <= most:
      raise self.fail(key, f'must be at most {most}')
    return value

  def size(self, key: str, otherwise: str) -> int:
    """Returns the integer of `key`, or of `otherwise` where that is null."""
    return self.integer(otherwise if self[key] is None else key)

  def number(self, key: str) -> float:
    """Returns a number of at least 0."""
    value = self[key]
    if type(value) not in (int, float) or not 0 <= value <= _MOST:
      raise self.fail(key, 'must be a number of at least 0')
    return float(value)

  def flag(self, key: str) -> bool:
    """Returns true or false."""
    if not isinstance(self[key], bool):
      raise self.fail(key, 'must be true or false')
    return self[key]

  def only(self, key: str, *supported: Any) -> None:
    """Refuses every value but those that are supported."""
    if self[key] not in supported:
      known = ', '.join(map(json.dumps, supported))
      raise self.fail(key, f'is not supported (supported: {known})')


class Format(NamedTuple):
  """One released format, both ways.

  Attributes:
    recognises: Whether the values of a `config.json` are of this format.
    defaults: What its configuration class fills in for an absent key.
    read: A function from its keys to our sections of a config.
    write: A function from our config to its keys; what they cannot say, the
      caller finds.
    rules: A function from our config to where the tensors are; see `mapping`.
    unread: A function from our config to the shapes of tensors that its code
      keeps and never reads.
    runs: A function from our config to who runs an export of this model, in
      words; docs/interop.md has the commands.
  """

  recognises: Callable[[dict[str, Any]], bool]
  defaults: dict[str, Any]
  read: Callable[[Keys], dict[str, dict[str, Any]]]
  write: Callable[[ConfigDict], dict[str, Any]]
  rules: Callable[[ConfigDict], Rules]
  runs: Callable[[ConfigDict], str]
  unread: Callable[[ConfigDict], dict[str, tuple[int, ...]]] = lambda config: {}


def read(keys: Keys) -> dict[str, Any]:
  """Returns our section `model`, without what a format may not say."""
  keys.only('hidden_act', 'silu')
  keys.only('rope_scaling', None, {'rope_type': 'default'})
  keys.only('attention_bias', False)
  keys.only('mlp_bias', False)
  hidden_size = keys.integer('hidden_size')
  num_heads = keys.integer('num_attention_heads')
  num_kv_heads = keys.size('num_key_value_heads', 'num_attention_heads')
  head_dim = 0 if keys['head_dim'] is None else keys.integer('head_dim')
  if head_dim % 2:
    raise keys.fail('head_dim', 'must be even')
  if not head_dim and hidden_size % (2 * num_heads):
    raise keys.fail(
      'hidden_size',
      f'must be a multiple of 2 x num_attention_heads ({num_heads})',
    )
  if num_heads % num_kv_heads:
    raise keys.fail(
      'num_key_value_heads', f'must divide num_attention_heads = {num_heads}'
    )
  return {
    'num_layers': keys.integer('num_hidden_layers', 1, _MOST_LAYERS),
    'hidden_size': hidden_size,
    'num_heads': num_heads,
    'num_kv_heads': num_kv_heads,
    'head_dim': head_dim,
    'ffn_width': keys.integer('intermediate_size'),
    'vocab_size': keys.integer('vocab_size'),
    'rope_theta': _rope_theta(keys),
    'norm_epsilon': keys.number('rms_norm_eps'),
    'tie_embeddings': keys.flag('tie_word_embeddings'),
  }


def _rope_theta(keys: Keys) -> float:
  """Reads its own key, or as transformers 5 writes it, `rope_parameters`."""
  parameters = keys['rope_parameters']
  if parameters is None:
    return _positive(keys, 'rope_theta')
  plain = {
    'rope_type': 'default',
    'partial_rotary_factor': 1.0,
    'rope_theta': None,
  }
  theta = parameters.get('rope_theta') if isinstance(parameters, dict) else None
  if theta is None or plain | parameters != plain | {'rope_theta': theta}:
    raise keys.fail(
      'rope_parameters', 'is not supported (supported: null, rope_theta alone)'
    )
  inside = dataclasses.replace(keys, values=parameters)
  return _positive(inside, 'rope_theta')


def _positive(keys: Keys, key: str) -> float:
  """Returns a number above 0."""
  value = keys.number(key)
  if not value:
    raise keys.fail(key, 'must be above 0')
  return value


def write(config: ConfigDict) -> dict[str, Any]:
  """Returns the keys of a decoder, which every format has."""
  model = config.model
  return {
    'vocab_size': model.vocab_size,
    'hidden_size': model.hidden_size,
    'num_hidden_layers': model.num_layers,
    'num_attention_heads': model.num_heads,
    'num_key_value_heads': model.num_kv_heads,
    'hidden_act': 'silu',
    'rms_norm_eps': model.norm_epsilon,
    'rope_theta': model.rope_theta,
    'tie_word_embeddings': model.tie_embeddings,
    'initializer_range': model.init_std,
  }
