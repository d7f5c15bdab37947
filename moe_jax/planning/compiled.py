"""Compiles the training step and tells what the compiler made of it.

The step is the one that trains, and only its shapes are given: neither
parameters nor batches exist, nor need the devices.
"""

import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning import cycles, replica_groups, setups
from moe_jax.planning.collectives import Collective, collectives, total_bytes
from moe_jax.planning.topologies import Target
from moe_jax.planning.units import in_bytes
from moe_jax.training.state import Setup
from moe_jax.training.step import Batch, make_train_step

# How XLA says that a program is too large, the bytes it needs and those there
# are; of the first form the program's arguments come on top.
_TOO_LARGE = (
  r'HLO temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM'
  r' \(([\d.]+[KMGT]?)\)',
  r'Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm',
)
# By how much, which is told more precisely.
_EXCEEDED = r'Exceeded hbm capacity by ([\d.]+[KMGT]?)'
_POWERS = {'': 0, 'K': 10, 'M': 20, 'G': 30, 'T': 40}


class DoesNotFitError(UserError):
  """A program needs more memory than a device has.

  Attributes:
    needed: bytes per device, at least; more than `available`.
    available: bytes per device.
  """

  def __init__(self, needed: int, available: int) -> None:
    over = in_bytes(needed - available)
    super().__init__(
      f'the training step does not fit: it needs {in_bytes(needed)} per device,'
      f' {over} more than the {in_bytes(available)} there are'
    )
    self.needed = needed
    self.available = available


def abstract_batch(setup: Setup) -> Batch:
  """The shapes of the batches that a setup trains on."""
  rows = setup.config.train.batch_size, setup.config.data.seq_len
  sharding = mesh_lib.batch_sharding(setup.mesh)

  def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  batch = {name: array(rows, jnp.int32) for name in ('token_ids', 'targets')}
  batch['padding_mask'] = array(rows, jnp.bool)
  if setup.config.data.order == 'contiguous':
    batch['segment_start'] = array(rows[:1], jnp.bool)
  return batch


def plan(config: ConfigDict, target: Target) -> dict[str, Any]:
  """Compiles the training step of a config for some devices.

  Returns:
    What `report` does, `compile_seconds`, and `compile_cpu_seconds`: of all
    threads together, which other programs of the machine hardly change.

  Raises:
    UserError: anything wrong with the config on so many devices.
    DoesNotFitError: the program needs more than a device has.
  """
  setup = setups.make(config, target.devices)
  began = time.process_time()
  compiled, seconds = train_step(setup)
  of_cpu = time.process_time() - began
  told = report(setup, compiled, target)
  return told | {'compile_seconds': seconds, 'compile_cpu_seconds': of_cpu}


def train_step(setup: Setup) -> tuple[jax.stages.Compiled, float]:
  """The train step as a program, and the seconds it took to get there.

  They include tracing and lowering. JAX's cache of compiled programs has to be
  off, or they tell of the cache.

  Raises:
    DoesNotFitError: the compiler refuses it for its size, as those of TPUs do.
    UserError: the compiler fails; it may not with other settings.
  """
  began = time.perf_counter()
  lowered = make_train_step(setup).lower(setup.abstract, abstract_batch(setup))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if refused := too_large(str(error), _argument_bytes(setup)):
      raise refused from error
    raise UserError(failure(str(error))) from error
  return compiled, time.perf_counter() - began


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Bytes per device of a program, by kind, and in all.

  Donated arguments are outputs too: `aliased` says how much stands in both.
  """
  needs = compiled.memory_analysis()
  kinds = {
    'arguments': needs.argument_size_in_bytes,
    'outputs': needs.output_size_in_bytes,
    'temporaries': needs.temp_size_in_bytes,
    'code': needs.generated_code_size_in_bytes,
  }
  aliased = needs.alias_size_in_bytes
  return kinds | {'aliased': aliased, 'total': sum(kinds.values()) - aliased}


def available_bytes(target: Target) -> int | None:
  """Bytes of a device that programs may use; None where it does not say."""
  if target.chip:
    return target.chip.memory_bytes
  return (target.devices[0].memory_stats() or {}).get('bytes_limit')


def report(
  setup: Setup, compiled: jax.stages.Compiled, target: Target
) -> dict[str, Any]:
  """What a compiled train step needs, sends and computes, for JSON.

  Args:
    setup: that it was made of.
    compiled: the program.
    target: that it is compiled for.

  Returns:
    `memory_bytes` as `memory` returns them, `available_bytes` of a device,
    `spare_bytes` and `fits` (None where it does not say); `flops` as the
    compiler counts them, what a loop repeats once; `collectives`, each
    with `axes` of the mesh and whether a loop of unknown length repeats it
    (`in_unknown_loop`), and the bytes that a device sends in a step
    (`sent_bytes`), where conditionals take the branch that sends least, and
    those where they take the other (`sent_bytes_most`); `estimated_cycles` and
    `estimated_seconds` of `cycles`, None where the compiler gives none.

  Raises:
    DoesNotFitError: the program needs more than a device has.
  """
  text, needs = compiled.as_text(), memory(compiled)
  available = available_bytes(target)
  if available is not None and needs['total'] > available:
    raise DoesNotFitError(needs['total'], available)
  costs = compiled.cost_analysis() or {}
  found = collectives(text, choose=min)
  estimate = cycles.estimate(text)
  hertz = target.chip.hertz if target.chip else None
  return {
    'device': target.devices[0].device_kind,
    'num_devices': setup.mesh.size,
    'memory_bytes': needs,
    'available_bytes': available,
    'spare_bytes': None if available is None else available - needs['total'],
    'fits': None if available is None else True,
    'flops': costs.get('flops'),
    'estimated_cycles': estimate,
    'estimated_seconds': estimate / hertz if estimate and hertz else None,
    'sent_bytes': total_bytes(found),
    'sent_bytes_most': total_bytes(collectives(text, choose=max)),
    'collectives': [_row(each, setup.mesh.shape) for each in found],
  }


def _row(each: Collective, mesh: dict[str, int]) -> dict[str, Any]:
  return {
    'kind': each.kind,
    'axes': list(replica_groups.axes(each.group, dict(mesh))),
    'devices': len(each.group),
    'count': each.count,
    'in_unknown_loop': each.in_unknown_loop,
    'sent_bytes': each.sent_bytes,
    'total_bytes': each.total_bytes,
  }


def _argument_bytes(setup: Setup) -> int:
  """Of one device: the state and a batch."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves((setup.abstract, abstract_batch(setup)))
  )


def too_large(said: str, arguments: int) -> DoesNotFitError | None:
  """What a compiler's complaint comes to, if it is about memory.

  Args:
    said: the complaint.
    arguments: bytes of the program's, per device.
  """
  beside, in_all = (re.search(form, said) for form in _TOO_LARGE)
  found = in_all or beside
  if not found:
    return None
  needed, available = map(_number, found.groups())
  needed += 0 if in_all else arguments
  exceeded = re.search(_EXCEEDED, said)
  over = _number(exceeded[1]) if exceeded else 0
  # Both are rounded and may be told as equal.
  return DoesNotFitError(max(needed, available + max(over, 1)), available)


def failure(said: str) -> str:
  """A compiler's complaint as one line, with a remedy where one is known."""
  line = f'the compiler fails on the training step: {" ".join(said.split())}'
  if 'memory space vmem' not in said:
    return line[:300]
  # libtpu 0.0.42 tiles some grouped matmuls larger than a v4 or v5p holds.
  return (
    f'{line[:300]}; a kernel is tiled too large for this TPU: take another'
    ' train.batch_size'
  )


def _number(text: str) -> int:
  """`15.75G` in bytes."""
  number = text.rstrip('KMGT')
  return round(float(number) * 2 ** _POWERS[text.removeprefix(number)])
