"""What a comparison is made of: its rows, made equal, and their statistics.

A row is a variant of a config. Nothing here trains: sizes follow from shapes,
statistics from the numbers of finished runs.
"""

import copy
import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from scipy import stats

from moe_jax import config as config_lib
from moe_jax.config import loading
from moe_jax.config.keys import Value
from moe_jax.config.schema import KEYS
from moe_jax.errors import UserError
from moe_jax.model import sizes
from moe_jax.planning import abstract_setup
from moe_jax.training import terminal

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
    variant: Its name: variants of the config file with + between.
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
    is_base = variant == BASE and BASE not in about
    parts = [] if is_base else variant.split('+')
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
    lines = [about.get(part, '') for part in parts] or ['the config as it is']
    found.append(
      Row(
        variant,
        of_row,
        '; '.join(line for line in lines if line),
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
    UserError: A key is unknown or named twice, or a value is not one of its.
  """
  found: dict[str, list[Value]] = {}
  for text in texts:
    name, _, values = text.partition(':')
    if name not in KEYS:
      raise UserError(f'--sweep: {loading.unknown_key(name, [*KEYS])}')
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


def summarise(
  values: Mapping[int, float], baseline: Mapping[int, float] | None
) -> dict[str, Any]:
  """Returns the statistics of a row, as compare.json has them.

  Args:
    values: The result of every finished seed.
    baseline: Those of the baseline; None of the baseline itself.

  Returns:
    `mean`; the sample `deviation`; over the seeds that both have the mean of
    the paired differences, `difference`, its 95 % `interval` of Student's t
    and the two-sided `p_value`. What too few seeds leave undefined is None;
    so is the p-value of differences that are all alike.
  """
  found: dict[str, Any] = {
    'mean': statistics.fmean(values.values()) if values else None,
    'deviation': (
      statistics.stdev(values.values()) if len(values) > 1 else None
    ),
    'difference': None,
    'interval': None,
    'p_value': None,
  }
  others = baseline or {}
  paired = [values[seed] - others[seed] for seed in values if seed in others]
  if not paired:
    return found
  found['difference'] = mean = statistics.fmean(paired)
  if len(paired) < 2:
    return found
  error = statistics.stdev(paired) / math.sqrt(len(paired))
  half = float(stats.t.ppf(0.975, len(paired) - 1)) * error
  found['interval'] = [mean - half, mean + half]
  if error:
    tail = stats.t.sf(abs(mean) / error, len(paired) - 1)
    found['p_value'] = 2 * float(tail)
  return found


def table(result: Mapping[str, Any]) -> str:
  """Returns what compare.json says as a table, with notes below it."""
  head = [
    'variant',
    'parameters',
    'active',
    'FLOPs/token',
    'bits per byte',
    f'difference to {result["baseline"]}',
    'p',
    'seeds',
    'time',
  ]
  [baseline] = [
    row for row in result['rows'] if row['variant'] == result['baseline']
  ]
  lines = [head, *(_line(row, baseline) for row in result['rows'])]
  notes = [note for row in result['rows'] for note in _notes(row, result)]
  split = f'bits per byte of {result["split"]}: mean ± sample deviation over'
  about = (
    f'{split} seeds; difference: mean over the same seeds [95 % interval],'
    ' paired t test; time: training of a run, without compilation'
  )
  return '\n'.join([terminal.summary_table(lines), '', about, *notes])


def sizes_table(found: Sequence[Row], baseline: Row) -> str:
  """Returns what would be trained, with sizes, as a table."""
  head = ['variant', 'parameters', 'active', 'FLOPs/token', 'changes']
  lines = [
    [
      row.variant,
      *(
        _size(size, of_baseline)
        for size, of_baseline in zip(row.sizes, baseline.sizes, strict=True)
      ),
      _assignments({**row.changes, **(row.matched or {})}) or '-',
    ]
    for row in found
  ]
  return terminal.summary_table([head, *lines])


def _line(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
  """Returns the cells of a row of the table."""
  mean, deviation = row['mean'], row['deviation']
  score = '' if mean is None else f'{mean:.4f}'
  score += '' if deviation is None else f' ± {deviation:.4f}'
  difference = row['difference']
  against = '' if difference is None else f'{difference:+.4f}'
  if row['interval'] is not None:
    low, high = row['interval']
    against += f' [{low:+.4f}, {high:+.4f}]'
  p_value = row['p_value']
  seconds = [run['seconds'] for run in row['runs'] if run['seconds']]
  time = terminal.duration(statistics.fmean(seconds)) if seconds else ''
  marks = f' ({len(row["failed"])} failed)' if row['failed'] else ''
  return [
    row['variant'],
    *(_size(row[name], baseline[name]) for name in Sizes._fields),
    score,
    against,
    '' if p_value is None else f'{p_value:.2g}',
    f'{len(row["runs"])}{marks}',
    time,
  ]


def _size(size: int, baseline: int) -> str:
  """Returns `7.01M`, and `7.05M (+0.6%)` where it is not the baseline's."""
  text = f'{size / 1e6:.3f}M'
  if size == baseline:
    return text
  return f'{text} ({(size - baseline) / baseline:+.1%})'


def _notes(row: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
  """Returns what else there is to say of a row, a line each."""
  variant, notes = row['variant'], []
  if row['matched']:
    field = MATCHES[result['match']]
    [target] = [
      other[field]
      for other in result['rows']
      if other['variant'] == result['baseline']
    ]
    notes.append(
      f'{variant}: {_assignments(row["matched"])} to match {result["match"]},'
      f' which leaves {(row[field] - target) / target:+.2%}'
    )
  swept = row['swept']
  if swept and swept['value'] is not None:
    notes.append(
      f'{variant}: best {result["sweep"]["key"]} of'
      f' {", ".join(swept["results"])} is {swept["value"]}'
      + (f', at the edge of {", ".join(swept["edge"])}' * bool(swept['edge']))
    )
  notes += [
    f'{variant}, seed {failed["seed"]}, failed: {failed["error"]}'
    for failed in row['failed']
  ]
  return notes


def _assignments(values: Overrides) -> str:
  return ', '.join(f'{key} = {value}' for key, value in values.items())


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
