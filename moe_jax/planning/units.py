"""Numbers for people."""


def in_bytes(number: float) -> str:
  """`512 B`, `1.50 GiB`."""
  for power, unit in ((40, 'TiB'), (30, 'GiB'), (20, 'MiB'), (10, 'KiB')):
    if number >= 1 << power:
      return f'{number / (1 << power):.2f} {unit}'
  return f'{number:.0f} B'
