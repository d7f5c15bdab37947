"""What stands after the colon of `--config=FILE:preset,variant,variant`."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from moe_jax.config import loading
from moe_jax.config.keys import Value
from moe_jax.config.schema import KEYS
from moe_jax.errors import UserError, nearest

Change = Callable[[ConfigDict], None]


def build(
  names: str,
  start: ConfigDict,
  presets: Mapping[str, Change],
  variants: Mapping[str, Change],
) -> ConfigDict:
  """Returns `start` as the preset and then every variant, in order, change it.

  Args:
    names: A preset and variants with commas between; the first preset may be
      left out, so may all. A variant may also be KEY=VALUE.
    start: The config to change.
    presets: The presets there are, the default first; may be empty.
    variants: The variants there are.

  Raises:
    UserError: A name or key is unknown, a value is not one of its key, or a
      preset does not come first.
  """
  chosen = [name.strip() for name in names.split(',') if name.strip()]
  if presets and (not chosen or chosen[0] not in presets):
    chosen.insert(0, next(iter(presets)))
  for place, name in enumerate(chosen):
    key, assigned, text = name.partition('=')
    if assigned:
      start.update_from_flattened_dict({key: _value(key, text)})
      continue
    known = presets if presets and place == 0 else variants
    if name not in known:
      raise UserError(_unknown(name, presets, variants))
    known[name](start)
  return start


def sets(
  values: Mapping[str, int | float | bool | str], about: str = ''
) -> Change:
  """Returns the change that gives dotted keys these values.

  Args:
    values: The values by their keys.
    about: What the change is, in a line; the assignments if left out.
  """

  def change(config: ConfigDict) -> None:
    config.update_from_flattened_dict(values)

  # What `moe_jax presets` says of it.
  change.__doc__ = about or ', '.join(
    f'{key} = {value}' for key, value in values.items()
  )
  return change


def _value(key: str, text: str) -> Value:
  """Returns the value that the text stands for."""
  if key not in KEYS:
    raise UserError(loading.unknown_key(key, loading.known_keys()))
  return KEYS[key].parse(key, text)


def _unknown(
  name: str, presets: Mapping[str, Change], variants: Mapping[str, Change]
) -> str:
  if name in presets:
    return f"preset '{name}' must come first after the colon, and alone"
  known = [
    f'{kind}: {", ".join(names)}'
    for kind, names in (('presets', presets), ('variants', variants))
    if names
  ]
  hint = nearest(name, [*presets, *variants])
  return f"there is no preset or variant '{name}'{hint} ({'; '.join(known)})"
