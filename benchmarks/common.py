"""What the measurements share: the train step, batches and the devices."""

import importlib.metadata
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from moe_jax import strict_json
from moe_jax.errors import UserError
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning import abstract_setup
from moe_jax.planning.compiled import memory_bytes
from moe_jax.training.state import Setup
from moe_jax.training.step import Batch

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'moe_jax')


def set_up(config: ConfigDict) -> Setup:
  """The setup of a config on all devices there are; no data set is read.

  Raises:
    UserError: anything wrong with the config.
  """
  return abstract_setup.make(config, jax.devices())


def check_steps(steps: int, warmup: int) -> None:
  """Refuses numbers of steps that nothing can be measured with.

  Raises:
    UserError: names both flags.
  """
  if steps < 1 or warmup < 0:
    raise UserError(
      f'--steps = {steps} must be at least 1, --warmup = {warmup} at least 0'
    )


def random_batches(made: Setup, count: int) -> list[Batch]:
  """Batches of uniformly random tokens without padding, on the devices.

  Packed rows have two documents each, cut at random.
  """
  rng = np.random.default_rng(0)

  def batch() -> Batch:
    ids = rng.integers(made.vocab_size, size=(2, *_shape(made)), dtype=np.int32)
    rows = {'token_ids': ids[0], 'targets': ids[1]}
    rows['padding_mask'] = np.ones(_shape(made), bool)
    if made.config.data.order == 'contiguous':
      rows['segment_start'] = np.zeros(len(ids[0]), bool)
    if made.config.data.order == 'packed':
      rows |= _halves(rng, *_shape(made))
    return jax.device_put(rows, mesh_lib.batch_sharding(made.mesh))

  return [batch() for _ in range(count)]


def _halves(
  rng: np.random.Generator, size: int, length: int
) -> dict[str, np.ndarray]:
  """Segments of rows that two documents share."""
  cut = rng.integers(1, length + 1, size=(size, 1), dtype=np.int32)
  place = np.arange(length, dtype=np.int32)
  second = place >= cut
  return {
    'segment_ids': 1 + second.astype(np.int32),
    'positions': place - cut * second,
  }


def show(row: dict[str, Any], as_json: bool) -> None:
  """Prints a measurement: one JSON line, or a name and a value a line."""
  if as_json:
    print(strict_json.dumps(row))
    return
  for name, value in row.items():
    print(f'{name:20}{value}')


def place() -> dict[str, Any]:
  """The devices and versions that a measurement holds for."""
  device = jax.devices()[0]
  return {
    'device': device.device_kind,
    'platform': device.platform,
    'num_devices': jax.device_count(),
    'versions': {name: version(name) for name in _PACKAGES},
  }


def peak_memory(program: jax.stages.Compiled) -> tuple[int, str]:
  """The most bytes in use on any device, and whose figure that is.

  `device`: the allocator's own, which counts everything since the process
  began. `compiler`: where the device keeps no count (CPU), what the program
  needs at once: its code, arguments, results and temporaries.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [each.get('peak_bytes_in_use', 0) for each in stats]
  if any(peaks):
    return max(peaks), 'device'
  return memory_bytes(program)['total'], 'compiler'


def _shape(made: Setup) -> tuple[int, int]:
  return made.config.train.batch_size, made.config.data.seq_len


def version(package: str) -> str:
  """Of an installed package, or that there is none."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:  # run from a checkout
    return 'not installed'
