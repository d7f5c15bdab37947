"""Times every grouped matmul that runs here, forward and backward.

  python -m benchmarks.grouped_matmul --json
  python -m benchmarks.grouped_matmul --sizes=4096x512x1024x16 --kinds=random
  python -m benchmarks.grouped_matmul --tune       # for moe.grouped_matmul=auto
  python -m benchmarks.grouped_matmul --show_tuned

`--sizes` are rows M, sizes D and F of the matrices, and their number N. The
measure is a dense matmul of as many rows, forward and backward, in the same
rounds, and the rate of a large square one. With `--tune` the tiles of every
kernel are timed first, and the fastest are used and kept; on a GPU that takes
minutes.

A JSON line is a case: the median seconds of all `implementations` and of the
`dense` one; their `ratios` to it (the median over rounds); `tflops` of useful
work a second; `share_of_peak`, of the rate of a square matmul of `peak_size`;
and `skew`, rows of the largest group over the mean.
"""

import argparse
from typing import Any

from benchmarks import command_line
from moe_jax.errors import UserError

_CPU_SIZES = ('4096x512x1024x8', '4096x512x1024x16', '4096x1024x1024x64')
_SIZES = ('32768x2048x2048x8', '32768x2048x2048x16', '32768x2048x2048x64')
# XLA computes it densely on CPU: these many times the work.
_SLOW_ON_CPU = ('ragged_dot',)


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  made = command_line.parser(__doc__)
  made.add_argument(
    '--sizes',
    action='append',
    type=command_line.sizes('rows d f groups'),
    help='MxDxFxN, once or more',
  )
  command_line.add_dtype(made)
  made.add_argument('--kinds', default='balanced,random,half')
  made.add_argument('--all', action='store_true', help='slow ones too')
  made.add_argument('--tune', action='store_true', help='keep the results')
  made.add_argument('--show_tuned', action='store_true', help='print them')
  command_line.main(run, made, arguments)


def run(args: argparse.Namespace) -> None:
  """Prints a line per case; or what was kept, with `--show_tuned`."""
  # jax must not be imported before the command line has set the allocator.
  import jax

  from benchmarks import common, timing
  from moe_jax.model import tuned

  if args.show_tuned:
    kept = tuned.as_json(tuned.load())
    common.show({'file': str(tuned.path())} | kept, args.json)
    return
  device = jax.devices()[0]
  cpu = device.platform == 'cpu'
  dtype = timing.dtype_of(args.dtype)
  parse = command_line.sizes('rows d f groups')
  cases = args.sizes or [parse(s) for s in (_CPU_SIZES if cpu else _SIZES)]
  # What is tuned holds for any routing: of the usual kind.
  kinds = ['random'] if args.tune else timing.kinds(args.kinds)
  if args.tune:
    _check_writable(device)
  for sizes in cases:
    for kind in kinds:
      row = measure(**sizes, kind=kind, dtype=dtype, rounds=args.rounds,
                    slow=args.all, tune=args.tune)  # fmt: skip
      if args.tune:
        found = tuned.Measured(row['implementations'], row.pop('tiles'))
        tuned.store(device, {row['case']: found})
      common.show(row, args.json)


def _check_writable(device: Any) -> None:
  """Before anything is measured, which takes minutes."""
  from moe_jax.model import tuned

  try:
    tuned.store(device, {})
  except OSError as error:
    raise UserError(
      f'--tune cannot write {tuned.path()}: {error.strerror};'
      ' the environment variable MOE_JAX_TUNED names another file'
    ) from error


def measure(
  rows: int,
  d: int,
  f: int,
  groups: int,
  *,
  kind: str,
  dtype: Any,
  rounds: int,
  slow: bool = False,
  tune: bool = False,
) -> dict[str, Any]:
  """One case; see the module. With `tune` it has the `tiles` of kernels too."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from benchmarks import common, timing
  from moe_jax import strict_json
  from moe_jax.experts.grouped_matmul import case, grouped_matmul, tokamax
  from moe_jax.model.implementations import available_matmuls
  from moe_jax.registry import GROUPED_MATMULS

  chosen = timing.choices(kind, rows, 1, groups)
  sizes_N = jnp.bincount(chosen.reshape(-1), length=groups).astype(jnp.int32)
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (rows, d), (groups, d, f), (rows, f)
  rows_MD, weights_NDF, grad_MF = (
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  )

  operands = rows_MD, weights_NDF, sizes_N, grad_MF

  def both(name: str) -> timing.Program:
    def function(rows: Any, weights: Any, sizes: Any, grad: Any) -> Any:
      def multiply(rows: Any, weights: Any) -> Any:
        return grouped_matmul(rows, weights, sizes, name, target)

      out, vjp = jax.vjp(multiply, rows, weights)
      return out, vjp(grad)

    return timing.Program(function, operands)

  def dense(rows: Any, weight: Any, grad: Any) -> Any:
    out, vjp = jax.vjp(jnp.matmul, rows, weight)
    return out, vjp(grad)

  device = jax.devices()[0]
  names = [
    name
    for name in available_matmuls(device)
    if slow or device.platform != 'cpu' or name not in _SLOW_ON_CPU
  ]
  tiles = {}
  if tune:
    kernels = {each for name in names for each in GROUPED_MATMULS[name].kernels}
    tiles = {each: tokamax.tune(each, *operands) for each in sorted(kernels)}
  target = tokamax.Target(tiles=strict_json.dumps(tiles))
  programs = {name: both(name) for name in names}
  programs['dense'] = timing.Program(dense, (rows_MD, weights_NDF[0], grad_MF))
  size, square = timing.square_matmul(dtype)
  programs['peak'] = square
  seconds = timing.in_turn(programs, rounds)
  flops = 6 * rows * d * f
  peak = 2 * size**3 / float(np.median(seconds.pop('peak')))
  medians = {name: float(np.median(s)) for name, s in seconds.items()}
  return {
    'benchmark': 'grouped_matmul',
    'case': case(rows, groups, d, f, dtype),
    'rows': rows,
    'kind': kind,
    'skew': timing.skew(chosen, groups),
    'implementations': {name: medians[name] for name in names},
    'dense': medians['dense'],
    'ratios': {
      name: timing.ratio(seconds[name], seconds['dense']) for name in names
    },
    'tflops': {name: flops / s / 1e12 for name, s in medians.items()},
    'share_of_peak': {name: flops / s / peak for name, s in medians.items()},
    'peak_size': size,
    'rounds': rounds,
    **({'tiles': tiles} if tune else {}),
  } | common.place()


if __name__ == '__main__':
  main()
