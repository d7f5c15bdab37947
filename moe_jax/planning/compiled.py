"""Compiles the training step and reports what the compiler made of it.

The step is the one that trains, and only its shapes are given: neither
parameters nor batches exist, nor need the devices.
"""

import functools
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax.config import mixture
from moe_jax.errors import UserError
from moe_jax.model import sizes
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning import (
  abstract_setup,
  gpus,
  hlo,
  replica_groups,
  roofline,
  topologies,
  tpu_cycles,
)
from moe_jax.planning.collectives import Collective, collectives, total_bytes
from moe_jax.planning.memory import format_bytes
from moe_jax.planning.topologies import Target
from moe_jax.training import device_peaks
from moe_jax.training.state import Setup
from moe_jax.training.step import make_train_step

# What XLA says of a program that is too large: the bytes it needs and those
# there are. In the first form the program's arguments come on top.
_TOO_LARGE = (
  r'HLO temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM'
  r' \(([\d.]+[KMGT]?)\)',
  r'Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm',
)
# By how much it is too large, which XLA says more precisely.
_EXCEEDED = r'Exceeded hbm capacity by ([\d.]+[KMGT]?)'
_POWERS = {'': 0, 'K': 10, 'M': 20, 'G': 30, 'T': 40}


class DoesNotFitError(UserError):
  """A program needs more memory than a device has.

  Attributes:
    needed: The bytes per device, at least; more than `available`.
    available: The bytes per device that programs may use.
  """

  def __init__(self, needed: int, available: int) -> None:
    over = format_bytes(needed - available)
    super().__init__(
      f'the training step does not fit: it needs {format_bytes(needed)} per'
      f' device, {over} more than the {format_bytes(available)} there are'
    )
    self.needed = needed
    self.available = available


# What no compiler knows without its device: of GPUs alone.
_UNKNOWN_OF_GPUS = (
  'the kernels of plain matmuls, which XLA chooses by timing them',
  "cuDNN's workspace, which counts as 0 bytes",
)
# Parts of NVIDIA's compiler, as errors name them.
_PARTS_OF_CUDA = r'(?i)\b(cudnn|ptxas|nvlink|libdevice)'
_OF_SEGMENTS = 'segment_ids', 'positions'


def abstract_batch(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of the batches that a setup trains on."""
  rows = setup.config.train.batch_size, setup.config.data.seq_len
  sharding = mesh_lib.batch_sharding(setup.mesh)

  def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  batch = {name: array(rows, jnp.int32) for name in ('token_ids', 'targets')}
  batch['padding_mask'] = array(rows, jnp.bool)
  if setup.config.data.order == 'contiguous':
    batch['segment_start'] = array(rows[:1], jnp.bool)
  if setup.config.data.order == 'packed':
    batch |= {name: array(rows, jnp.int32) for name in _OF_SEGMENTS}
  if mixture.formats(setup.config.data) != {'text'}:
    batch['target_mask'] = array(rows, jnp.bool)
  if setup.config.data.mixture:
    batch['source'] = array(rows[:1], jnp.int32)
  return batch


def compile_and_report(config: ConfigDict, target: Target) -> dict[str, Any]:
  """Compiles the training step of a config for some devices.

  Returns:
    What `report` returns, `compile_seconds`, and `compile_cpu_seconds` of all
    threads together, which other programs of the machine hardly change.

  Raises:
    UserError: Something is wrong with the config on so many devices.
    DoesNotFitError: The program needs more than a device has.
  """
  setup = abstract_setup.make(config, target.devices)
  began = time.process_time()
  compiled, seconds = train_step(setup)
  cpu_seconds = time.process_time() - began
  return report(setup, compiled, target) | {
    'compile_seconds': seconds,
    'compile_cpu_seconds': cpu_seconds,
  }


def train_step(setup: Setup) -> tuple[jax.stages.Compiled, float]:
  """Returns the train step as a program, and the seconds it took to compile.

  They include tracing and lowering. JAX's cache of compiled programs has to be
  off, or they are those of the cache.

  Raises:
    DoesNotFitError: The compiler refuses it for its size, as those of TPUs do.
    UserError: The compiler fails; it may not with other settings.
  """
  began = time.perf_counter()
  step = make_train_step(setup)
  try:
    lowered = step.lower(setup.abstract, abstract_batch(setup))
    compiled = lowered.compile()
  except RuntimeError as error:
    # JAX asks cuDNN for its version when it traces; all else there is a defect.
    if not isinstance(error, jax.errors.JaxRuntimeError) and not re.search(
      _PARTS_OF_CUDA, str(error)
    ):
      raise
    if refused := too_large(str(error), _argument_bytes(setup)):
      raise refused from error
    raise UserError(failure(str(error))) from error
  return compiled, time.perf_counter() - began


def memory_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Returns the bytes per device of a program, by kind, and in all.

  Donated arguments are outputs too: `aliased` says how much stands in both.
  `host` is what it needs of the host's memory, and no part of `total`.
  """
  needs = compiled.memory_analysis()
  assert needs is not None, 'XLA analyses the memory of every program'
  kinds = {
    'arguments': needs.argument_size_in_bytes,
    'outputs': needs.output_size_in_bytes,
    'temporaries': needs.temp_size_in_bytes,
    'code': needs.generated_code_size_in_bytes,
  }
  aliased = needs.alias_size_in_bytes
  host = (
    needs.host_argument_size_in_bytes
    + needs.host_output_size_in_bytes
    + needs.host_temp_size_in_bytes
    - needs.host_alias_size_in_bytes
  )
  total = sum(kinds.values()) - aliased
  return kinds | {'aliased': aliased, 'total': total, 'host': host}


def available_bytes(target: Target) -> int | None:
  """Returns the bytes that programs may use; None where a device is silent."""
  if target.chip:
    return target.chip.memory_bytes
  return (target.devices[0].memory_stats() or {}).get('bytes_limit')


def report(
  setup: Setup, compiled: jax.stages.Compiled, target: Target
) -> dict[str, Any]:
  """Returns what a compiled train step needs, sends and computes, for JSON.

  Args:
    setup: The setup that it was made of.
    compiled: The program.
    target: The devices that it is compiled for.

  Returns:
    `memory_bytes` as the function of that name returns them, `available_bytes`
    of a device, `spare_bytes` and `fits` (None where a device is silent);
    `flops` as the compiler counts them, what a loop repeats once, and
    `matmul_flops` of `hlo`, each None where there is no count; `unknown`, what
    a compiler cannot know without the device, in words;
    `collectives`, each with `axes` of the mesh and whether a loop of unknown
    length repeats it (`in_unknown_loop`); of a GPU that is known by name with
    the seconds that it travels by NVLink (`travel_seconds`) and the roofline's
    of what is computed meanwhile (`beside_seconds`), else None; the bytes that
    a device sends in a step (`sent_bytes`), where conditionals take the branch
    that sends least, and those where they take the other (`sent_bytes_most`);
    of a TPU the `cycles` of `_cycles`; and of a TPU to compile for, or such a
    GPU, the `roofline` of that module, with `mfu_bound`, the MFU if no kernel
    were better and nothing travelled. Each is None of other devices.

  Raises:
    DoesNotFitError: The program needs more than a device has.
  """
  text, needs = compiled.as_text(), memory_bytes(compiled)
  assert text is not None, 'XLA has the text of every program'
  available = available_bytes(target)
  if available is not None and needs['total'] > available:
    raise DoesNotFitError(needs['total'], available)
  costs = compiled.cost_analysis() or {}
  gpu = gpus.of_kind(target.devices[0].device_kind)
  beside = functools.partial(roofline.beside, device=gpu) if gpu else None
  least = collectives(text, choose=min, beside=beside)
  on_gpu = target.devices[0].platform == 'gpu'
  return {
    'device': target.devices[0].device_kind,
    'num_devices': setup.mesh.size,
    'memory_bytes': needs,
    'available_bytes': available,
    'spare_bytes': None if available is None else available - needs['total'],
    'fits': None if available is None else True,
    'flops': costs.get('flops'),
    'matmul_flops': hlo.matmul_flops(text) if on_gpu else None,
    'unknown': list(_UNKNOWN_OF_GPUS) if on_gpu and target.chip else [],
    'cycles': _cycles(setup, text, target),
    'roofline': _roofline(setup, text, target),
    'sent_bytes': total_bytes(least),
    'sent_bytes_most': total_bytes(collectives(text, choose=max)),
    'collectives': [_row(each, setup.mesh.shape, gpu) for each in least],
  }


def _cycles(setup: Setup, text: str, target: Target) -> dict[str, Any] | None:
  """Returns for how long a TPU computes, None of another device.

  It has the cycles of `fusions` of `tpu_cycles.estimated_cycles`, with the
  other branches `fusions_most`; `kernel_flops` of that module; and, None where
  the clock is not published, `fusion_seconds`, `kernel_seconds` at the peak,
  and `mfu_bound`, the MFU if nothing but these took time.
  """
  fusions = tpu_cycles.estimated_cycles(text)
  if fusions is None:
    return None
  kernel_flops = tpu_cycles.kernel_flops(text)
  told = {
    'fusions': fusions,
    'fusions_most': tpu_cycles.estimated_cycles(text, max),
    'kernel_flops': kernel_flops,
    'fusion_seconds': None,
    'kernel_seconds': None,
    'mfu_bound': None,
  }
  hertz = target.chip.hertz if target.chip else None
  peak = device_peaks.peak(target.devices[0].device_kind, 'bfloat16')
  if hertz is None or peak is None:
    return told
  seconds = {
    'fusion_seconds': fusions / hertz,
    'kernel_seconds': kernel_flops / peak,
  }
  bound = _model_flops(setup) / peak / sum(seconds.values())
  return told | seconds | {'mfu_bound': bound}


def _roofline(setup: Setup, text: str, target: Target) -> dict[str, Any] | None:
  """Returns the roofline and its `mfu_bound`; None of what is not known."""
  kind = target.devices[0].device_kind
  device: roofline.Device | None = gpus.of_kind(kind)
  peak = device_peaks.peak(kind, 'bfloat16')
  if target.chip and target.chip.bytes_per_second:
    assert peak is not None, 'the peaks of all TPUs here are known'
    device = roofline.Tpu(
      target.chip.bytes_per_second, peak, target.chip.matrix_side
    )
  if device is None:
    return None
  assert peak is not None, 'the peaks of all GPUs here are known'
  told = roofline.report(text, device)
  return told | {'mfu_bound': _model_flops(setup) / peak / told['seconds']}


def _model_flops(setup: Setup) -> float:
  """Returns the operations that the model asks of a device in a step."""
  config = setup.config
  counted = config, setup.abstract['params'], setup.declarations
  tokens = config.train.batch_size * config.data.seq_len / setup.mesh.size
  return sizes.flops_per_token(*counted) * tokens


def _row(
  each: Collective, mesh: Mapping[str, int], gpu: gpus.Gpu | None
) -> dict[str, Any]:
  """Returns a collective for JSON."""
  rate = gpu and roofline.BANDWIDTH_SHARE * gpu.link_bytes_per_second
  return {
    'kind': each.kind,
    'axes': list(replica_groups.axes(each.group, dict(mesh))),
    'devices': len(each.group),
    'count': each.count,
    'in_unknown_loop': each.in_unknown_loop,
    'sent_bytes': each.sent_bytes,
    'total_bytes': each.total_bytes,
    'travel_seconds': each.sent_bytes / rate if rate else None,
    'beside_seconds': each.beside_seconds,
  }


def _argument_bytes(setup: Setup) -> int:
  """Returns the bytes of the state and a batch in one device's memory."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves((setup.abstract, abstract_batch(setup)))
    if not mesh_lib.is_in_host_memory(leaf.sharding)
  )


def too_large(message: str, arguments: int) -> DoesNotFitError | None:
  """Returns the error of a compiler's message, if that is about memory.

  Args:
    message: The compiler's message.
    arguments: The bytes of the program's arguments, per device.
  """
  beside, in_all = (re.search(form, message) for form in _TOO_LARGE)
  match = in_all or beside
  if not match:
    return None
  needed, available = map(_number, match.groups())
  needed += 0 if in_all else arguments
  exceeded = re.search(_EXCEEDED, message)
  over = _number(exceeded[1]) if exceeded else 0
  # Both are rounded and may look equal.
  return DoesNotFitError(max(needed, available + max(over, 1)), available)


def failure(message: str) -> str:
  """Returns a compiler's message as one line, with a remedy if one is known."""
  line = f'the compiler fails on the training step: {" ".join(message.split())}'
  if part := re.search(_PARTS_OF_CUDA, message):
    remedy = topologies.INSTALL_GPU_COMPILER
    return f'{line[:300]}; if {part[1]} is missing: {remedy}'
  if 'memory space vmem' not in message:
    return line[:300]
  # libtpu 0.0.42 tiles some grouped matmuls larger than a v4 or v5p holds.
  return (
    f'{line[:300]}; a kernel is tiled too large for this TPU: take another'
    ' train.batch_size'
  )


def _number(text: str) -> int:
  """Returns `15.75G` in bytes."""
  number = text.rstrip('KMGT')
  return round(float(number) * 2 ** _POWERS[text.removeprefix(number)])
