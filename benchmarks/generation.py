"""Tokens a second of generation, beside no cache and transformers' Mixtral.

  python -m benchmarks.generation --json

A step goes on with texts of 512 tokens by some more, the likeliest each time:
from a cache of keys and values, as `moe_jax generate` does; the same with every
layer's experts copied for its use, as on accelerators; without a cache, where
the whole text is read again for every token; and from the cache of the same
model in transformers, by both of its implementations of experts, where PyTorch
is installed. Every side is a process of its own, one step of each in turn (see
`benchmarks.duel`). Reading the text the first time is not counted.
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

# Names of the sides.
CACHED, UNCACHED = 'moe_jax', 'moe_jax, no cache'
COPIED = 'moe_jax, experts copied'
PEERS = ('grouped_mm', 'eager')


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  made = command_line.parser(__doc__)
  names = ', '.join(MODELS)
  made.add_argument('--model', default='mixtral_18m', help=f'one of {names}')
  made.add_argument('--batches', default='1,32', help='rows; %(default)s')
  made.add_argument('--context', type=int, default=512, help='%(default)s')
  made.add_argument('--tokens', type=int, default=16, help='%(default)s')
  made.add_argument('--warmup', type=int, default=1, help='%(default)s')
  made.add_argument('--threads', type=int, default=2, help='%(default)s')
  command_line.main(run, made, arguments)


def run(args: argparse.Namespace) -> None:
  """Prints what `measure` returns for every number of rows."""
  duel.share_accelerator()
  sizes = MODELS[choose('--model', args.model, MODELS)]
  if min(args.context, args.tokens, args.warmup + 1) < 1:
    raise UserError('--context and --tokens must be at least 1, --warmup 0')
  batches = args.batches.split(',')
  if not all(rows.isdigit() and int(rows) for rows in batches):
    raise UserError(f'--batches = {args.batches!r} must be numbers of rows')
  for rows in batches:
    made = sizes._replace(batch_size=int(rows), seq_len=args.context)
    row = measure(made, args)
    _show({'benchmark': 'generation', 'model': args.model} | row, args.json)


def measure(sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
  """Runs all sides in turn.

  Returns:
    `tokens_per_second` of every side at its median step, over all rows;
    `speedup`, the median over the rounds of a side's time for a token over that
    of ours with a cache; and the sizes.
  """
  measured = duel.run(
    _commands(sizes, args.tokens),
    rounds=args.rounds,
    warmup=args.warmup,
    threads=args.threads,
  )
  seconds = {
    name: [each / side.facts['tokens'] for each in side.seconds]
    for name, side in measured.items()
  }
  speedup = {
    name: statistics.median(
      [one / own for one, own in zip(each, seconds[CACHED], strict=True)]
    )
    for name, each in seconds.items()
  }
  return {
    'rows': sizes.batch_size,
    'context': sizes.seq_len,
    'tokens_per_second': {
      name: sizes.batch_size / statistics.median(each)
      for name, each in seconds.items()
    },
    'speedup': speedup,
    'rounds': args.rounds,
    'threads': args.threads,
    'sizes': sizes._asdict(),
    'facts': {name: side.facts for name, side in measured.items()},
  }


def _commands(sizes: Sizes, tokens: int) -> dict[str, list[str]]:
  python, text = [sys.executable, '-m'], sizes.to_json()
  ours = [*python, 'benchmarks.generation_jax', text]
  found = {
    CACHED: [*ours, str(tokens), 'cached'],
    COPIED: [*ours, str(tokens), 'copied'],
    UNCACHED: [*ours, '1', 'uncached'],
  }
  if all(map(importlib.util.find_spec, ('torch', 'transformers'))):
    theirs = [*python, 'benchmarks.generation_torch', text, str(tokens)]
    found |= {f'transformers, {name}': [*theirs, name] for name in PEERS}
  return found


def _show(row: dict[str, Any], as_json: bool) -> None:
  if as_json:
    print(strict_json.dumps(row), flush=True)
    return
  print(f'{row["model"]}, {row["rows"]} rows of {row["context"]} tokens')
  for name, speed in row['tokens_per_second'].items():
    print(
      f'  {name:28}{speed:10.1f} tokens/s{row["speedup"][name]:8.2f} times the'
      ' time of a token',
      flush=True,
    )
  if len(row['speedup']) == 3:
    print('  transformers is not installed: pip install -e ".[interop]"')


if __name__ == '__main__':
  main()
