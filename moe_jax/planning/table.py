"""Plans for people: as a table, and the trials of a search as they are made."""

import sys
from typing import Any

from moe_jax.model import memory
from moe_jax.planning.fit import Trial
from moe_jax.planning.units import in_bytes

# Rows of the table.
_STATE = ('parameters', 'gradients', 'optimizer', 'segments')
_ROUTER = (
  'score',
  'recurrent',
  'projector',
  'passing',
  'residual',
  'selection',
  'weights',
)
_KINDS = ('arguments', 'outputs', 'aliased', 'temporaries', 'code')


def table(plan: dict[str, Any]) -> str:
  """The plan as plain text."""
  parameters, strategy = plan['parameters'], plan['strategy']
  parts = plan['memory_parts_per_device']
  mesh = ' x '.join(f'{axis} {n}' for axis, n in strategy['mesh'].items())
  layers = strategy['layers']
  repeated = f'{layers["repeats"]} x ({", ".join(layers["period"])})'
  pattern = [*layers['prefix'], *([repeated] if layers['repeats'] else [])]
  rows = {
    'parameters': f'{parameters["total"]:,}',
    '  active': f'{parameters["active"]:,} per token',
    '  router': f'{parameters["router"]:,}',
    '  idle': f'{parameters["idle"]:,} counted, never built',
    'compute': f'{plan["flops_per_token"]:,} FLOPs per token in training,'
    f' {plan["flops_per_token_forward"]:,} forward',
    'memory': f'{in_bytes(plan["memory_bytes_per_device"])} per device',
    '  state': _listed(parts, *_STATE),
    '  step': _listed(parts, *memory.Temporaries._fields),
    'batch': f'{plan["tokens_per_step"]:,} tokens per step',
    'layers': ', '.join(pattern),
    'mesh': mesh,
    'dispatch': f'{strategy["dispatch"]}, expert parallelism'
    f' {strategy["expert_parallelism"]}',
    '  exchange': ', '.join(
      f'{name} {in_bytes(sent)}'
      for name, sent in strategy.get('exchange_bytes', {}).items()
    )
    + ' sent per device, sub-layer and forward pass',
    'router': ', '.join(
      f'{name} {strategy[name]}' for name in _ROUTER if name in strategy
    ),
    'dtype': f'{strategy["dtype"]} on {strategy["platform"]}',
    'remat': strategy['remat'],
  }
  if not parameters['idle']:
    del rows['  idle']
  if 'exchange_bytes' not in strategy:
    del rows['  exchange']
  if 'compiled' in plan:
    rows |= _compiled(plan['compiled'], plan['tokens_per_step'])
  if 'fit' in plan:
    rows['fits'] = ' '.join(
      f'--config.{key}={value}'
      for key, value in plan['fit']['overrides'].items()
    )
  return '\n'.join(f'{name:11} {value}' for name, value in rows.items())


def tell(trial: Trial) -> None:
  """Prints a trial of a search on stderr.

  As `batch 64, remat dots: 12.00 GiB of 15.75 GiB, fits`.
  """
  said = 'fits' if trial.fits else 'does not fit'
  print(
    f'batch {trial.batch_size}, remat {trial.remat}:'
    f' {in_bytes(trial.needed)} of {in_bytes(trial.available)}, {said}',
    file=sys.stderr,
    flush=True,
  )


def _listed(parts: dict[str, int], *names: str) -> str:
  """`a 1.5 GiB, b 3.0 GiB`."""
  shown = [f'{name} {in_bytes(parts[name])}' for name in names if parts[name]]
  return ', '.join(shown)


def _compiled(told: dict[str, Any], tokens_per_step: int) -> dict[str, str]:
  """Rows by their name.

  Args:
    told: as `compiled.plan` returns it.
    tokens_per_step: of the global batch.
  """
  needs, devices = told['memory_bytes'], told['num_devices']
  found = {
    'compiled': f'for {devices} x {told["device"]} in'
    f' {told["compile_seconds"]:.0f} s',
    '  memory': f'{in_bytes(needs["total"])} per device{_spare(told)}',
    '  of it': ', '.join(f'{kind} {in_bytes(needs[kind])}' for kind in _KINDS),
    '  compute': _compute(told),
    '  sent': f'{in_bytes(told["sent_bytes"])} per device and step,'
    f' {in_bytes(told["sent_bytes"] * devices / tokens_per_step)} per token',
  }
  most = told['sent_bytes_most'] - told['sent_bytes']
  if most:
    found['  sent'] += (
      f'; {in_bytes(most)} more if all conditionals turn out so'
    )
  return found | _collectives(told)


def _spare(told: dict[str, Any]) -> str:
  if told['available_bytes'] is None:
    return ''
  spare, available = in_bytes(told['spare_bytes']), told['available_bytes']
  return f' of {in_bytes(available)}: fits, {spare} to spare'


def _compute(told: dict[str, Any]) -> str:
  flops = told['flops']
  text = 'FLOPs not told' if flops is None else f'{flops:,.0f} FLOPs per device'
  text += ', bodies of loops counted once'
  if told['estimated_seconds']:
    seconds = told['estimated_seconds']
    text += f'; fusions estimated at {1000 * seconds:.1f} ms'
  elif told['estimated_cycles']:
    text += f'; fusions estimated at {told["estimated_cycles"]:,} cycles'
  return text


def _collectives(told: dict[str, Any]) -> dict[str, str]:
  """A row for each kind, with the sums of each axis or axes."""
  sums: dict[str, dict[str, tuple[int, int]]] = {}
  for each in told['collectives']:
    of_kind, axes = sums.setdefault(each['kind'], {}), ' x '.join(each['axes'])
    count, sent = of_kind.get(axes, (0, 0))
    of_kind[axes] = count + each['count'], sent + each['total_bytes']
  return {
    f'  {kind}': ', '.join(
      f'{in_bytes(sent)} along {axes} ({count} times)'
      for axes, (count, sent) in of_kind.items()
    )
    for kind, of_kind in sums.items()
  }
