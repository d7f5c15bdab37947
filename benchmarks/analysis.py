"""What the statistics of routing cost: seconds and memory for many tokens.

  python -m benchmarks.analysis --json

The routing is random, so that no router is sure of anything, and is made before
the clock starts; every chunk of tokens is measured anew.
"""

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import command_line, resident
from moe_jax.errors import UserError

_SIZES = 'routers experts chosen'
_VOCABULARY = 32_000


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints what `measure` returns."""
  made = command_line.parser(__doc__ or '')
  sizes = command_line.sizes(_SIZES)
  made.add_argument('--sizes', type=sizes, default='24x16x4', help=_SIZES)
  made.add_argument('--tokens', type=int, default=1_000_000)
  made.set_defaults(rounds=1)
  command_line.main(run, made, arguments)


def run(args: argparse.Namespace) -> None:
  """Prints a row for every round."""
  # jax must not be imported before the command line has set the allocator.
  from benchmarks import common

  for _ in range(args.rounds):
    common.show(measure(**args.sizes, tokens=args.tokens), args.json)


def measure(
  routers: int, experts: int, chosen: int, tokens: int
) -> dict[str, Any]:
  """Measures all statistics of so many tokens, chunk by chunk.

  Returns:
    `seconds` and, of the process's processors, `processor_seconds`, each with
    what compiling took; `peak_resident_bytes` of the process, and of those
    `before_bytes`, which it held before the first chunk; and where it ran.

  Raises:
    UserError: There is no token, or fewer experts than are chosen.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  from benchmarks import common
  from moe_jax.analysis.routing import Statistics, TokenCounts
  from moe_jax.routing.selection import Select, SelectOptions, TopK

  if tokens < 1 or chosen > experts:
    raise UserError(
      f'--tokens = {tokens} must be at least 1, and of {experts} experts'
      f' {chosen} cannot be chosen'
    )
  select = Select(SelectOptions(experts, chosen), TopK(chosen))
  chunk = 8192
  key = jax.random.key(0)
  logits_WTN = 2 * jax.random.normal(key, (routers, chunk, experts))
  routing = jax.block_until_ready(
    jax.tree.map(lambda *a: jnp.stack(a), *map(select, logits_WTN))
  )
  indices_WTK = np.asarray(routing.indices_TK)
  rng = np.random.default_rng(0)
  ids_T = rng.integers(_VOCABULARY, size=chunk, dtype=np.int32)
  resident.start_anew()
  before = resident.peak_bytes()
  began, processor_began = time.perf_counter(), time.process_time()
  statistics = Statistics(experts)
  counts = TokenCounts(experts, _VOCABULARY)
  for start in range(0, tokens, chunk):
    real_T = np.arange(start, start + chunk) < tokens
    statistics.add(routing, real_T)
    counts.add(indices_WTK, ids_T, real_T)
  statistics.mutual_information()
  return {
    'benchmark': 'analysis',
    'routers': routers,
    'experts': experts,
    'chosen': chosen,
    'tokens': tokens,
    'seconds': time.perf_counter() - began,
    'processor_seconds': time.process_time() - processor_began,
    'peak_resident_bytes': resident.peak_bytes(),
    'before_bytes': before,
    'load_average': os.getloadavg()[0],
  } | common.place()


if __name__ == '__main__':
  main()
