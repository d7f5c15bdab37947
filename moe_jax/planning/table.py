"""Plans for people: as a table, and the trials of a search as they are made."""

import sys
from collections.abc import Callable
from typing import Any

from moe_jax.planning.batch_search import Trial
from moe_jax.planning.memory import format_bytes
from moe_jax.planning.roofline import BANDWIDTH_SHARE, PEAK_SHARE
from moe_jax.planning.temporaries import Temporaries

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
  """Returns the plan as plain text."""
  parameters, strategy = plan['parameters'], plan['strategy']
  vocabulary = plan['vocabulary']
  parts = plan['memory_parts_per_device']
  mesh = ' x '.join(f'{axis} {n}' for axis, n in strategy['mesh'].items())
  on_host = plan['host_memory_bytes_per_device']
  layers = strategy['layers']
  repeated = f'{layers["repeats"]} x ({", ".join(layers["period"])})'
  pattern = [*layers['prefix'], *([repeated] if layers['repeats'] else [])]
  rows = {
    'parameters': f'{parameters["total"]:,}',
    '  active': f'{parameters["active"]:,} per token',
    '  router': f'{parameters["router"]:,}',
    '  idle': f'{parameters["idle"]:,} counted, never built',
    'vocabulary': f'{vocabulary["ids"]:,} ids in {vocabulary["rows"]:,} rows',
    'compute': f'{plan["flops_per_token"]:,} FLOPs per token in training,'
    f' {plan["flops_per_token_forward"]:,} forward',
    'memory': f'{format_bytes(plan["memory_bytes_per_device"])} per device',
    '  state': _listed(parts, *_STATE),
    '  on host': f'optimizer {format_bytes(on_host)} per device',
    '  step': _listed(parts, *Temporaries._fields),
    'batch': f'{plan["tokens_per_step"]:,} tokens per step',
    'layers': ', '.join(pattern),
    'mesh': mesh,
    'dispatch': f'{strategy["dispatch"]}, expert parallelism'
    f' {strategy["expert_parallelism"]}',
    '  exchange': ', '.join(
      f'{name} {format_bytes(sent)}'
      for name, sent in strategy.get('exchange_bytes', {}).items()
    )
    + ' sent per device, sub-layer and forward pass',
    'router': ', '.join(
      f'{name} {strategy[name]}' for name in _ROUTER if name in strategy
    ),
    'attention': strategy['attention'],
    'matmul': f'{strategy["grouped_matmul"]} of experts',
    'dtype': f'{strategy["dtype"]} on {strategy["platform"]}',
    'remat': strategy['remat'],
  }
  if not on_host:
    del rows['  on host']
  if not parameters['idle']:
    del rows['  idle']
  if vocabulary['rows'] == vocabulary['ids']:
    del rows['vocabulary']
  if strategy['grouped_matmul'] == 'none':
    del rows['matmul']
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


def report_trial(trial: Trial) -> None:
  """Prints a trial of a search on stderr.

  It reads `batch 64, remat dots: 12.00 GiB of 15.75 GiB, fits`.
  """
  outcome = 'fits' if trial.fits else 'does not fit'
  print(
    f'batch {trial.batch_size}, remat {trial.remat}:'
    f' {format_bytes(trial.needed)} of {format_bytes(trial.available)},'
    f' {outcome}',
    file=sys.stderr,
    flush=True,
  )


def _listed(parts: dict[str, int], *names: str) -> str:
  """Returns `a 1.5 GiB, b 3.0 GiB` of the parts of these names."""
  shown = [
    f'{name} {format_bytes(parts[name])}' for name in names if parts[name]
  ]
  return ', '.join(shown)


def _compiled(report: dict[str, Any], tokens_per_step: int) -> dict[str, str]:
  """Returns the rows about a compiled step, by their name.

  Args:
    report: The report, as `compiled.compile_and_report` returns it.
    tokens_per_step: The tokens of the global batch.
  """
  needs, devices = report['memory_bytes'], report['num_devices']
  sent = report['sent_bytes']
  rows = {
    'compiled': f'for {devices} x {report["device"]} in'
    f' {report["compile_seconds"]:.0f} s',
    '  memory': f'{format_bytes(needs["total"])} per device{_spare(report)}',
    '  of it': ', '.join(
      f'{kind} {format_bytes(needs[kind])}' for kind in _KINDS
    ),
    '  on host': f'{format_bytes(needs["host"])} per device',
    '  compute': _compute(report),
    '  sent': f'{format_bytes(sent)} per device and step,'
    f' {format_bytes(sent * devices / tokens_per_step)} per token',
  }
  most = report['sent_bytes_most'] - sent
  if most:
    rows['  sent'] += (
      f'; {format_bytes(most)} more if all conditionals turn out so'
    )
  if not needs['host']:
    del rows['  on host']
  if report['cycles']:
    rows |= _cycles(report['cycles'])
  if report['roofline']:
    rows |= _roofline(report['roofline'])
  if report['unknown']:
    rows['  unknown'] = '; '.join(report['unknown'])
  return rows | _collectives(report) | _in_the_open(report)


def _cycles(report: dict[str, Any]) -> dict[str, str]:
  """Returns the row about how long a TPU computes."""
  cycles = f'{report["fusions"]:,} cycles of fusions'
  if more := report['fusions_most'] - report['fusions']:
    cycles += f' ({more:,} more if all conditionals turn out so)'
  if report['mfu_bound'] is None:
    return {'  time': f'{cycles}; the clock is not published'}
  fusions, kernels = report['fusion_seconds'], report['kernel_seconds']
  return {
    '  time': f'{1000 * (fusions + kernels):.1f} ms, MFU'
    f' {report["mfu_bound"]:.1%} as the compiler expects: {cycles} in'
    f' {1000 * fusions:.1f} ms, and {1000 * kernels:.1f} ms of kernels at the'
    ' peak, without collectives'
  }


def _roofline(report: dict[str, Any]) -> dict[str, str]:
  """Returns the rows about what a device could take at best."""
  return {
    '  roofline': f'{1000 * report["seconds"]:.2f} ms, MFU at most'
    f" {report['mfu_bound']:.1%}, at {BANDWIDTH_SHARE:.0%} of the memory's"
    f' bandwidth and {PEAK_SHARE:.0%} of the peak, without collectives',
    '  moved': f'{format_bytes(report["num_bytes"])} per device by'
    f' {report["launches"]:,} kernels',
    '  kernels': _milliseconds(report['kinds']),
    '  parts': _milliseconds(report['parts']),
  }


def _milliseconds(sums: dict[str, dict[str, Any]]) -> str:
  """Returns `fusion 19.87 ms (813), ...`, how often in parentheses."""
  return ', '.join(
    f'{name} {1000 * each["seconds"]:.2f} ms ({each["launches"]:,})'
    for name, each in sums.items()
  )


def _spare(report: dict[str, Any]) -> str:
  if report['available_bytes'] is None:
    return ''
  spare, available = (
    format_bytes(report['spare_bytes']),
    report['available_bytes'],
  )
  return f' of {format_bytes(available)}: fits, {spare} to spare'


def _compute(report: dict[str, Any]) -> str:
  if report['flops'] is None and report['matmul_flops'] is not None:
    return f'{report["matmul_flops"]:,} FLOPs in matmuls per device'
  flops = report['flops']
  text = 'FLOPs unknown' if flops is None else f'{flops:,.0f} FLOPs per device'
  return text + ', bodies of loops counted once'


def _collectives(report: dict[str, Any]) -> dict[str, str]:
  """Returns a row for each kind, with the sums for each axis or axes."""
  sums: dict[str, dict[str, tuple[int, int]]] = {}
  for each in report['collectives']:
    of_kind, axes = sums.setdefault(each['kind'], {}), ' x '.join(each['axes'])
    count, sent = of_kind.get(axes, (0, 0))
    of_kind[axes] = count + each['count'], sent + each['total_bytes']
  return {
    f'  {kind}': ', '.join(
      f'{format_bytes(sent)} along {axes} ({count} times)'
      for axes, (count, sent) in of_kind.items()
    )
    for kind, of_kind in sums.items()
  }


def _in_the_open(report: dict[str, Any]) -> dict[str, str]:
  """Returns the row about what travels while a GPU computes nothing."""
  known = [
    each for each in report['collectives'] if each['travel_seconds'] is not None
  ]
  if not known:
    return {}
  longest = max(known, key=_open_seconds)
  text = (
    f'{_milliseconds_of(known, _open_seconds)} of'
    f' {_milliseconds_of(known, lambda each: each["travel_seconds"])} of travel'
    f' at {BANDWIDTH_SHARE:.0%} of NVLink, with nothing computed beside'
  )
  if _open_seconds(longest):
    sent, axes = (
      format_bytes(longest['sent_bytes']),
      ' x '.join(longest['axes']),
    )
    text += (
      f'; the longest {longest["kind"]} of {sent} along {axes},'
      f' {1000 * longest["beside_seconds"]:.2f} ms computed in'
      f' {1000 * longest["travel_seconds"]:.2f}'
    )
  return {'  open': text}


def _open_seconds(each: dict[str, Any]) -> float:
  """Returns how much longer a collective travels than is computed meanwhile."""
  return max(0.0, each['travel_seconds'] - each['beside_seconds'])


def _milliseconds_of(
  listed: list[dict[str, Any]], seconds: Callable[[dict[str, Any]], float]
) -> str:
  total = sum(each['count'] * seconds(each) for each in listed)
  return f'{1000 * total:.2f} ms'
