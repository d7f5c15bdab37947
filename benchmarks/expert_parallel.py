"""What every exchange between devices sends, holds and takes.

  python -m benchmarks.expert_parallel --config=configs/base.py --json

One MoE sub-layer of the config, forward and backward, on all devices along the
expert axis; a line for each exchange and routing. A CPU stands in for
`--devices` of them: bytes and memory are then those of so many devices, but
seconds are of one machine that computes all devices' work and copies instead of
sending.
"""

import os
import time
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.errors import UserError

# Of all devices' tokens to the experts: evenly; half of them to one expert.
ROUTINGS = ('balanced', 'skewed')


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_boolean('json', False, 'print JSON lines', flag_values=values)
  flags.DEFINE_integer(
    'devices', 8, 'that a CPU stands in for', flag_values=values
  )
  flags.DEFINE_integer('steps', 5, 'that are measured', flag_values=values)
  flags.DEFINE_integer('warmup', 2, 'steps before them', flag_values=values)


def run(
  config: ConfigDict, json: bool, devices: int, steps: int, warmup: int
) -> None:
  """Prints what `measure` returns."""
  if devices < 2:
    raise UserError(f'--devices = {devices} must be at least 2')
  # Before jax is imported; it concerns CPUs alone.
  force = f'--xla_force_host_platform_device_count={devices}'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {force}'

  import jax

  from benchmarks import common

  jax.config.update('jax_enable_compilation_cache', False)
  for row in measure(config, steps, warmup):
    common.show(row, json)


def measure(
  config: ConfigDict, steps: int, warmup: int
) -> list[dict[str, Any]]:
  """Measures every exchange of `moe.dispatch`, each with every routing.

  Steps of all of them alternate, so that a machine whose speed drifts is fair.

  Returns:
    For each `exchange` and `routing`: `forward_bytes` and `backward_bytes` that
    a device sends as the compiled program has it, `estimated_bytes` of the
    forward pass as the plan has it, `rare_bytes` more in both where something
    overflows, `temp_bytes` that one device's program needs beside arguments and
    results, `seconds` of forward and backward (the median), `overflowed` and
    `dropped` of all `assignments`, and where it ran. `emulated`: whether the
    platform lacks the collective, and everything travels in its stead.

  Raises:
    UserError: anything wrong with the config or the numbers of steps, or there
      is one device.
  """
  import jax
  import numpy as np

  from benchmarks import common, exchanges

  common.check_steps(steps, warmup)
  layer = exchanges.Layer(config)
  programs = {name: layer.compiled(name) for name in layer.exchanges}
  cases = [(name, routing) for name in programs for routing in ROUTINGS]
  seconds = {case: [] for case in cases}
  counts = {}
  operands = jax.block_until_ready(
    {routing: layer.operands(routing) for routing in ROUTINGS}
  )
  for _ in range(warmup + steps):
    for name, routing in cases:
      began = time.perf_counter()
      counts[name, routing] = programs[name].run(operands[routing])
      seconds[name, routing].append(time.perf_counter() - began)
  place = common.place()
  return [
    {'benchmark': 'expert_parallel', 'exchange': name, 'routing': routing}
    | programs[name].costs
    | {
      'seconds': float(np.median(seconds[name, routing][warmup:])),
      'assignments': layer.assignments,
      'emulated': name == 'ragged' and place['platform'] == 'cpu',
      'steps': steps,
    }
    | counts[name, routing]
    | place
    for name, routing in cases
  ]


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
