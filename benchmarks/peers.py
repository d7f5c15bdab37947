"""Our training step beside that of the same model in transformers, on PyTorch.

  python -m benchmarks.peers --json

Models, batch, losses, optimizer, clipping, threads and parameter counts are
the same; every one trains in a process of its own, a step of each in turn (see
`benchmarks.duel`). On CPU all compute in float32, on a GPU in bfloat16 with
parameters in float32. The peer has its two implementations of experts, and
grouped_mm also without the allocator's settings that we use
(`moe_jax.runtime`).
"""

import argparse
import importlib.util
import statistics
import sys
from typing import Any

from benchmarks import command_line, duel
from benchmarks.peer_sizes import MODELS, Sizes
from moe_jax import strict_json
from moe_jax.errors import UserError, choose

# Names of the workers: ours, and the peer's by experts and allocator.
OURS = 'moe_jax'
PEERS = {
  'grouped_mm': ('grouped_mm', 'tuned'),
  'eager': ('eager', 'tuned'),
  'grouped_mm, default malloc': ('grouped_mm', 'default'),
}


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  made = command_line.parser(__doc__)
  names = ','.join(MODELS)
  made.add_argument('--models', default=names, help='%(default)s')
  made.add_argument('--warmup', type=int, default=2, help='%(default)s')
  made.add_argument('--threads', type=int, default=2, help='%(default)s')
  command_line.main(run, made, arguments)


def run(args: argparse.Namespace) -> None:
  """Prints what `measure` returns for every model."""
  duel.share_accelerator()
  names = args.models.split(',')
  models = {name: MODELS[choose('--models', name, MODELS)] for name in names}
  for name, sizes in models.items():
    row = measure(sizes, args.rounds, args.warmup, args.threads)
    _show({'benchmark': 'peers', 'model': name} | row, args.json)


def measure(
  sizes: Sizes, rounds: int, warmup: int, threads: int
) -> dict[str, Any]:
  """Trains all sides in turn.

  Returns:
    By side: `tokens_per_second` at the median step; `step_seconds`, its time;
    `peak_resident_bytes`, the most memory that the process has held, with its
    interpreter, its libraries and the compiler; `steps_peak_resident_bytes`,
    the most in its steps, without the compiler; `speedup`, the median over the
    rounds of the side's time over ours; and the `facts` it told. And
    `fastest_peer`, its `speedup_over_fastest_peer`, and the sizes.

  Raises:
    UserError: PyTorch is missing, a number is out of range, or the sides do not
      have the same number of parameters.
  """
  if min(rounds, warmup + 1, threads) < 1:
    raise UserError(
      f'--rounds = {rounds} and --threads = {threads} must be at least 1,'
      f' --warmup = {warmup} at least 0'
    )
  for package in ('torch', 'transformers'):
    if importlib.util.find_spec(package) is None:
      raise UserError(
        f"{package} is not installed: pip install -e '.[interop]'"
      )
  measured = duel.run(
    _commands(sizes), rounds=rounds, warmup=warmup, threads=threads
  )
  counts = {name: side.facts['parameters'] for name, side in measured.items()}
  if len(set(counts.values())) > 1:
    raise UserError(f'the models differ in their parameters: {counts}')
  medians = {
    name: statistics.median(side.seconds) for name, side in measured.items()
  }
  ours = measured[OURS].seconds
  speedup = {
    name: statistics.median(
      [theirs / own for theirs, own in zip(side.seconds, ours, strict=True)]
    )
    for name, side in measured.items()
  }
  fastest = min(PEERS, key=medians.get)
  tokens = sizes.batch_size * sizes.seq_len
  return {
    'fastest_peer': fastest,
    'speedup_over_fastest_peer': speedup[fastest],
    'tokens_per_second': {name: tokens / t for name, t in medians.items()},
    'step_seconds': medians,
    'speedup': speedup,
    'peak_resident_bytes': {
      name: side.peak_bytes for name, side in measured.items()
    },
    'steps_peak_resident_bytes': {
      name: side.steps_peak_bytes for name, side in measured.items()
    },
    'parameters': counts[OURS],
    'rounds': rounds,
    'threads': threads,
    'sizes': sizes._asdict(),
    'facts': {name: side.facts for name, side in measured.items()},
  }


def _commands(sizes: Sizes) -> dict[str, list[str]]:
  python = [sys.executable, '-m']
  text = sizes.to_json()
  ours = {OURS: [*python, 'benchmarks.peer_jax', text]}
  return ours | {
    name: [*python, 'benchmarks.peer_torch', text, *arguments]
    for name, arguments in PEERS.items()
  }


def _show(row: dict[str, Any], as_json: bool) -> None:
  if as_json:
    print(strict_json.dumps(row), flush=True)
    return
  print(f'{row["model"]}, {row["parameters"]:,} parameters')
  for name, speed in row['tokens_per_second'].items():
    peak = row['peak_resident_bytes'][name]
    steps = row['steps_peak_resident_bytes'][name] or peak
    print(
      f'  {name:28}{speed:8.0f} tokens/s{steps / 2**20:8.0f} MiB in steps,'
      f'{peak / 2**20:8.0f} MiB in all',
      flush=True,
    )
  print(
    f'  {row["speedup_over_fastest_peer"]:.2f} times the fastest peer,'
    f' {row["fastest_peer"]}'
  )


if __name__ == '__main__':
  main()
