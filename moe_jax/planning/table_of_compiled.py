"""What the compiler said, as rows of the plan's table."""

from typing import Any

from moe_jax.planning.units import in_bytes

_KINDS = ('arguments', 'outputs', 'aliased', 'temporaries', 'code')


def rows(told: dict[str, Any], tokens_per_step: int) -> dict[str, str]:
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
