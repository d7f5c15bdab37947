"""How a training step grows with the devices, by what their compiler says.

  python -m benchmarks.scaling --config=configs/cartesian_moe.py:large --json

prints a JSON line for 4, 16, 64 and 256 chips of v5e; `--topologies` names
others, TPUs or GPUs. None has to be here. The scaling is weak: the batch grows
with the chips, so the tokens of a chip stay what they are, `--sequences` of
them of `data.seq_len`.

The mesh follows from the number of chips: as many as `--fsdp`, 16, along
`fsdp`; of what is left `--expert`, 1, along `expert`, as many as divide the
experts; and what is left then along `data`. So parameters travel and tokens
stay, which takes the fewest cycles where a device holds a layer's experts.

  python -m benchmarks.scaling --config=... --label=large --results=DIR

also appends the rows to DIR/scaling.jsonl as they are made, and then draws
DIR/scaling.png and writes DIR/README.md, a table, of all rows in there.
"""

import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.config import MESH_AXES
from moe_jax.errors import UserError

TOPOLOGIES = ('v5e:2x2', 'v5e:4x4', 'v5e:8x8', 'v5e:16x16')
_PACKAGES = ('jax', 'libtpu', 'moe_jax')
# Flags that do not change a row; all but the first have a value.
_BESIDE = ('json', 'topologies', 'label', 'results')


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_boolean('json', False, 'print JSON lines', flag_values=values)
  flags.DEFINE_list(
    'topologies', list(TOPOLOGIES), 'see moe_jax.plan', flag_values=values
  )
  flags.DEFINE_integer(
    'sequences', 1, 'of every chip and micro-batch', flag_values=values
  )
  flags.DEFINE_integer(
    'fsdp', 16, 'chips along mesh.fsdp, at most', flag_values=values
  )
  flags.DEFINE_integer(
    'expert', 1, 'chips along mesh.expert, at most', flag_values=values
  )
  flags.DEFINE_string(
    'label', 'model', 'a name for the config', flag_values=values
  )
  flags.DEFINE_string(
    'results', None, 'a folder to keep the rows in', flag_values=values
  )


def run(
  config: ConfigDict,
  json: bool,
  topologies: list[str],
  sequences: int,
  fsdp: int,
  expert: int,
  label: str,
  results: str | None,
) -> None:
  """Prints a row for every topology, as it is made."""
  import jax

  from benchmarks import common, scaling_results

  if results:
    scaling_results.check()
  jax.config.update('jax_enable_compilation_cache', False)
  given = arguments(sys.argv[1:])
  for row in measure(config, topologies, sequences, fsdp, expert):
    named = {'label': label, 'arguments': given} | row
    common.show(named, json)
    sys.stdout.flush()
    if results:
      scaling_results.keep(named, Path(results))


def arguments(argv: list[str]) -> str:
  """The arguments of a command that a row depends on, for a shell."""
  words, kept = iter(argv), []
  for word in words:
    name, joined, _ = word.lstrip('-').partition('=')
    if name not in _BESIDE:
      kept.append(word)
    elif name != 'json' and not joined:
      next(words)
  return shlex.join(kept)


def measure(
  config: ConfigDict,
  topologies: list[str],
  sequences: int,
  fsdp: int,
  expert: int,
) -> Iterator[dict[str, Any]]:
  """Compiles the training step of a config for every topology.

  Yields:
    `num_devices`, `mesh`, `tokens_per_step`, `available_bytes` of a device; of
    a program that `fits`, also `memory_bytes` by kind, `sent_bytes_per_token`
    and `_most` (where every conditional sends as much as it can) of all
    devices together, `collectives`: bytes per device by kind and axes,
    `cycles` and `roofline` as `planning.compiled.report` returns them,
    `compile_seconds` and,
    of all threads, `compile_cpu_seconds`; of one that does not, `needed_bytes`,
    at least.

  Raises:
    UserError: anything wrong with the config or the topologies.
  """
  from benchmarks import common
  from moe_jax.planning import topologies as targets

  given = {'sequences': sequences, 'fsdp': fsdp, 'expert': expert}
  for flag, value in given.items():
    if value < 1:
      raise UserError(f'--{flag} = {value} must be at least 1')
  for name in topologies:
    target = targets.target(name)
    placed = on_chips(config, len(target.devices), **given)
    yield {
      'benchmark': 'scaling',
      'topology': name,
      'num_devices': len(target.devices),
      'mesh': {axis: placed.mesh[axis] for axis in MESH_AXES},
      'tokens_per_step': placed.train.batch_size * placed.data.seq_len,
      'remat': placed.model.remat,
      **_compile(placed, target),
      'versions': {name: common.version(name) for name in _PACKAGES},
    }


def on_chips(
  config: ConfigDict, chips: int, sequences: int, fsdp: int, expert: int
) -> ConfigDict:
  """The config on so many chips: its mesh by the rule above, and its batch."""
  placed = config.copy_and_resolve_references()
  fsdp = math.gcd(fsdp, chips)
  left = math.gcd(expert, chips // fsdp)
  expert = math.gcd(placed.moe.num_experts or 1, left)
  placed.mesh.update(
    expert=expert, fsdp=fsdp, data=chips // expert // fsdp, tensor=1
  )
  placed.train.batch_size = sequences * chips * placed.train.accumulation
  return placed


def _compile(config: ConfigDict, target: Any) -> dict[str, Any]:
  from moe_jax.planning import compiled

  try:
    told = compiled.compile_and_report(config, target)
  except compiled.DoesNotFitError as refused:
    return {
      'fits': False,
      'needed_bytes': refused.needed,
      'available_bytes': refused.available,
    }
  tokens = config.train.batch_size * config.data.seq_len / told['num_devices']
  kept = (
    'memory_bytes',
    'available_bytes',
    'cycles',
    'roofline',
    'compile_seconds',
    'compile_cpu_seconds',
  )
  return {
    'fits': True,
    **{name: told[name] for name in kept},
    'sent_bytes_per_token': told['sent_bytes'] / tokens,
    'sent_bytes_per_token_most': told['sent_bytes_most'] / tokens,
    'collectives': _summed(told['collectives']),
  }


def _summed(collectives: list[dict[str, Any]]) -> dict[str, int]:
  """`{'all-gather along fsdp': bytes of a device}`, the most first."""
  sums: dict[str, int] = {}
  for each in collectives:
    name = f'{each["kind"]} along {" x ".join(each["axes"])}'
    sums[name] = sums.get(name, 0) + each['total_bytes']
  return dict(sorted(sums.items(), key=lambda item: -item[1]))


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
