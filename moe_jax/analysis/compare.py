"""What a comparison is made of: its rows, made equal, and their statistics.

A row is a variant of a config. Nothing here trains: sizes follow from shapes,
statistics from the numbers of finished runs.
"""

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import loading
from moe_jax.config.keys import Value
from moe_jax.config.schema import KEYS
from moe_jax.errors import UserError
from moe_jax.model import sizes
from moe_jax.planning import abstract_setup

# The config as it is, where its file has no variant of that name.
BASE = 'base'
# What may be made equal, and the field of `Sizes` that it is.
MATCHES = {
  'none': '',
  'parameters': 'parameters',
  'active': 'active_parameters',
  'flops': 'flops_per_token',
}
_CLOSE = 0.005  # of the baseline's size: equal enough
_ALIGNED = 8  # widths stay multiples of it where they are

Overrides = Mapping[str, Value]
# The values of the swept keys; empty where nothing is swept.
Point = tuple[Value, ...]


class Sizes(NamedTuple):
  """What a row costs: `moe_jax.model.sizes` of its model."""

  parameters: int
  active_parameters: int
  flops_per_token: int


@dataclasses.dataclass(frozen=True)
class Row:
  """A variant that is compared.

  Attributes:
    variant: Its name: variants of the config file, or assignments KEY=VALUE,
      with + between.
    argument: The --config of its runs.
    about: What the config file says of the variants, in a line.
    config: Its config, all but the seed and what is swept.
    changes: The keys in which it differs from the base config, and their
      values, what matching changed left out.
    sizes: What it costs, after matching.
    matched: The keys that matching changed, with their values; None if none.
  """

  variant: str
  argument: str
  about: str
  config: ConfigDict
  changes: Overrides
  sizes: Sizes
  matched: Overrides | None = None


def names(argument: str, text: str) -> list[str]:
  """Returns the variants that `--variants` names, without repetitions.

  Args:
    argument: The --config.
    text: Names with commas between; `all` stands for the variants of the file.

  Raises:
    UserError: The file has no variants, or the text names none.
  """
  given = [name.strip() for name in text.split(',') if name.strip()]
  if 'all' in given:
    known = loading.variants(argument)
    if not known:
      raise UserError(
        f'--variants=all: {argument} has no VARIANTS; a config file lists its'
        ' changes there, as configs/quickstart.py does'
      )
    place = given.index('all')
    given[place : place + 1] = known
  if not given:
    raise UserError(
      '--variants is missing: name variants of the config file with commas'
      ' between, combined with + if they are several, or all'
    )
  return list(dict.fromkeys(given))


def rows(
  argument: str, overrides: Overrides, variants: Sequence[str]
) -> list[Row]:
  """Returns the rows of these variants, unmatched.

  Args:
    argument: The --config.
    overrides: Keys that all rows have another value of.
    variants: Names as `names` returns them.

  Raises:
    UserError: A variant is unknown or invalid, or two are the same config.
  """
  base = _config(argument, overrides)
  about = loading.variants(argument)
  found: list[Row] = []
  for variant in variants:
    # A plus before a digit is part of an assignment: router.residual=1e+0.
    parts = re.split(r'\+(?=[^\d])', variant)
    parts = [part for part in parts if part != BASE or BASE in about]
    of_row = loading.with_names(argument, parts)
    config = _config(of_row, overrides)
    for other in found:
      if other.config.to_dict() == config.to_dict():
        raise UserError(
          f'--variants: {other.variant} and {variant} are the same config;'
          ' leave one of them out'
        )
    try:
      config_lib.validate(config, _devices(config))
      counted = count(config)
    except UserError as error:
      raise UserError(f'variant {variant}: {error}') from error
    lines = [about.get(part, part) for part in parts] or [
      'The config as it is.'
    ]
    found.append(
      Row(
        variant,
        of_row,
        ' '.join(line for line in lines if line),
        config,
        changes(base, config),
        counted,
      )
    )
  return found


def changes(base: ConfigDict, config: ConfigDict) -> dict[str, Value]:
  """Returns the keys of which `config` has another value than `base`."""
  before, after = (config_lib.flatten(c.to_dict()) for c in (base, config))
  return {key: value for key, value in after.items() if value != before[key]}


def changed(config: ConfigDict, values: Overrides) -> ConfigDict:
  """Returns a copy of `config`, locked, in which keys have these values."""
  made = copy.deepcopy(config)
  made.update_from_flattened_dict(dict(values))
  return made.lock()


def count(config: ConfigDict) -> Sizes:
  """Returns what a validated config's model costs, from shapes alone."""
  setup = abstract_setup.on_one_device(config)
  counted = config, setup.abstract['params'], setup.declarations
  parameters = sizes.count_parameters(*counted)
  return Sizes(
    parameters.total, parameters.active, sizes.flops_per_token(*counted)
  )


def match(found: Sequence[Row], baseline: Row, what: str) -> list[Row]:
  """Returns the rows with the baseline's size, within half a percent.

  A row that is not so near has its experts' width changed, a dense model that
  of its feed-forwards: to what comes nearest among the widths that the mesh and
  the factors divide. Where a token chooses as many experts as it likes, what it
  costs cannot be matched, and the row stays as it is.

  Args:
    found: The rows.
    baseline: The row that stays as it is.
    what: One of `MATCHES`.
  """
  field = MATCHES[what]
  if not field:
    return list(found)
  target = getattr(baseline.sizes, field)
  return [_matched(row, field, target) for row in found]


def _matched(row: Row, field: str, target: int) -> Row:
  """Returns a row whose `field` of `Sizes` is near `target`."""
  size = getattr(row.sizes, field)
  learned = field != MATCHES['parameters'] and _learns_how_many(row.config)
  if abs(size - target) <= _CLOSE * target or learned:
    return row
  moe = row.config.moe
  key = 'moe.expert_width' if moe.num_experts else 'model.ffn_width'
  width = config_lib.get(row.config, key)
  divisor = max(row.config.mesh.tensor, 1) * (
    moe.factors if moe.num_experts else 1
  )
  # All sizes are a + b x width, so two of them tell the width.
  wider = count(changed(row.config, {key: width + divisor}))
  per_unit = (getattr(wider, field) - size) / divisor
  wanted = width + (target - size) / per_unit
  aligned = math.lcm(divisor, _ALIGNED)
  if wanted < divisor / 2:
    raise UserError(
      f'--match: without any experts, variant {row.variant} is larger than the'
      f' baseline ({field} {target:,}) already; leave it out, or choose another'
      ' --match'
    )
  for step in (aligned, divisor) if width % aligned == 0 else (divisor,):
    values = {key: max(step * round(wanted / step), step)}
    config = changed(row.config, values)
    counted = count(config)
    if abs(getattr(counted, field) - target) <= _CLOSE * target:
      break
  return dataclasses.replace(row, config=config, sizes=counted, matched=values)


def _learns_how_many(config: ConfigDict) -> bool:
  """Returns whether how many experts a token has is known only in training."""
  return config.moe.num_experts and config.router.selection == 'top_p'


def sweep(texts: Sequence[str]) -> dict[str, list[Value]]:
  """Returns the values of every key that a --sweep=KEY:V1,V2,... names.

  Raises:
    UserError: A key is unknown, named twice or the seed, or a value is not one
        of its.
  """
  found: dict[str, list[Value]] = {}
  for text in texts:
    name, _, values = text.partition(':')
    if name not in KEYS:
      raise UserError(f'--sweep: {loading.unknown_key(name, [*KEYS])}')
    if name == 'seed':
      raise UserError('--sweep: seed is no setting to choose; give --seeds')
    if name in found or not values:
      wrong = 'is given twice' if name in found else 'has no values'
      raise UserError(
        f'--sweep={text}: {name} {wrong}; write --sweep={name}:V1,V2'
      )
    parsed = [
      KEYS[name].parse(f'--sweep: {name}', value) for value in values.split(',')
    ]
    for value in parsed:
      KEYS[name].check(f'--sweep: {name}', value)
    found[name] = list(dict.fromkeys(parsed))
  return found


def points(swept: Mapping[str, Sequence[Value]]) -> list[Point]:
  """Returns every combination of the swept values; one empty one of none."""
  return list(itertools.product(*swept.values()))


def at_edge(swept: Mapping[str, Sequence[Value]], point: Point) -> list[str]:
  """Returns the keys whose value at `point` is the least or largest swept."""
  return [
    key
    for (key, values), value in zip(swept.items(), point, strict=True)
    if len(values) > 1 and not isinstance(value, bool | str)
    if value in (min(values), max(values))
  ]


def as_text(point: Point) -> str:
  """Returns `0.001` of one value, `0.001,2` of several."""
  return ','.join(str(value) for value in point)


def _config(argument: str, overrides: Overrides) -> ConfigDict:
  """Returns the config of --config=ARGUMENT and --config.KEY=VALUE, locked."""
  config = loading.load(argument)
  config.update_from_flattened_dict(dict(overrides))
  return loading.expand_paths(config)


def _devices(config: ConfigDict) -> int:
  """Returns a number of devices that the config's mesh fits on.

  A run learns itself whether it is that of the devices it has.
  """
  return math.prod(
    size for axis in config_lib.MESH_AXES if (size := config.mesh[axis]) > 0
  )
