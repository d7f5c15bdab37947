"""Times the training step of a config on random tokens.

  python -m benchmarks.train_step --config=configs/quickstart.py --json

Compilation and warm-up are not in the step's time; neither is the data.
"""

import time
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_boolean('json', False, 'print one JSON line', flag_values=values)
  flags.DEFINE_integer('steps', 10, 'that are measured', flag_values=values)
  flags.DEFINE_integer('warmup', 3, 'steps before them', flag_values=values)


def run(config: ConfigDict, json: bool, steps: int, warmup: int) -> None:
  """Prints what `measure` returns."""
  # jax must not be imported before the command line has set the allocator.
  import jax

  from benchmarks import common

  jax.config.update('jax_enable_compilation_cache', False)
  row = measure(config, steps, warmup)
  common.show(row, json)


def measure(config: ConfigDict, steps: int, warmup: int) -> dict[str, Any]:
  """Times `steps` steps of training, after `warmup` that are not timed.

  Returns:
    `tokens_per_second` (at the median step, over all devices),
    `tflops_per_second` of a device and `mfu` (see `training.device_peaks`),
    `step_seconds` (the median), `step_seconds_min` and `_max`,
    `compile_seconds` (tracing and lowering too), `peak_memory_bytes` (of one
    device; see `common.peak_memory`) and `peak_memory_source`, `loss` (of the
    last step: that it is finite shows that something was trained),
    `tokens_per_step`, and where it ran.

  Raises:
    UserError: anything wrong with the config or the numbers of steps.
  """
  import jax
  import numpy as np

  from benchmarks import common
  from moe_jax.model import sizes
  from moe_jax.model.build import compute_dtype
  from moe_jax.planning.compiled import train_step as compile_train_step
  from moe_jax.training import device_peaks

  common.check_steps(steps, warmup)
  made = common.set_up(config)
  compiled, compile_seconds = compile_train_step(made)
  batches = common.random_batches(made, warmup + steps)
  state = jax.block_until_ready(made.init())
  seconds = []
  for batch in batches:
    began = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(state, batch))
    seconds.append(time.perf_counter() - began)
  median = float(np.median(seconds[warmup:]))
  tokens = config.train.batch_size * config.data.seq_len
  flops = tokens * sizes.flops_per_token(
    config, made.abstract['params'], made.declarations
  )
  devices = list(made.mesh.devices.flat)
  dtype = str(compute_dtype(config, made.mesh))
  peak, source = common.peak_memory(compiled)
  return {
    'benchmark': 'train_step',
    'tokens_per_second': tokens / median,
    **device_peaks.utilisation(flops / median, devices, dtype),
    'step_seconds': median,
    'step_seconds_min': min(seconds[warmup:]),
    'step_seconds_max': max(seconds[warmup:]),
    'compile_seconds': compile_seconds,
    'peak_memory_bytes': peak,
    'peak_memory_source': source,
    'loss': float(metrics['loss']),
    'tokens_per_step': tokens,
    'steps': steps,
  } | common.place()


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
