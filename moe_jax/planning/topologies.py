"""Devices by name, to compile for: TPU slices and hosts of GPUs, all absent."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from moe_jax import runtime
from moe_jax.errors import UserError, nearest
from moe_jax.planning import gpus

_GIB = 1 << 30


class Chip(NamedTuple):
  """A kind of TPU or GPU.

  Attributes:
    memory_bytes: The bytes of one JAX device that a program may use: of a TPU
      what libtpu 0.0.42 names when a program exceeds it, of a GPU what JAX
      takes of its memory.
    hertz: The clock of a TPU's tensor cores; None where it is not published.
    example: The name of a slice; other names have as many sizes, or fewer.
    bytes_per_second: The bandwidth of the memory of a TPU's JAX device; of a
      GPU `gpus` has it.
    matrix_side: The rows and columns of a TPU's matrix unit.
  """

  memory_bytes: int
  hertz: float | None
  example: str
  bytes_per_second: float | None = None
  matrix_side: int = 1


class Target(NamedTuple):
  """The devices to compile for.

  Attributes:
    devices: The devices that are here, or those of a topology.
    chip: Their kind in a topology; None for the devices that are here.
  """

  devices: Sequence[jax.Device]
  chip: Chip | None


# Capacity per chip: v4 32 GiB, v5e 16, v5p 95, v6e 32, tpu7x 192 (two devices):
# https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e, .../tpu7x
# Bandwidths are from the same pages; of a TPU7x, half a chip's.
# Clocks are the published bfloat16 peak over the operations of a cycle, where
# the matrix units are published too (2 x 128 x 128 x their number):
# https://jax-ml.github.io/scaling-book/tpus. A v6e has 4 of 256 x 256 by its
# page; by later versions of it 2, but its compiler expects more of matmuls than
# these could do.
CHIPS = {
  'v4': Chip(int(30.75 * _GIB), 1.05e9, 'v4:4x4x4', 1.228e12, 128),
  'v5e': Chip(int(15.75 * _GIB), 1.5e9, 'v5e:4x4', 0.819e12, 128),
  'v5p': Chip(int(95.74 * _GIB), 1.75e9, 'v5p:4x4x4', 2.765e12, 128),
  'v6e': Chip(int(31.25 * _GIB), 1.75e9, 'v6e:4x4', 1.64e12, 256),
  'tpu7x': Chip(int(94.75 * _GIB), None, 'tpu7x:2x2x4', 3.69e12, 256),
}
_ALIASES = {'v5litepod': 'v5e', 'v7x': 'tpu7x'}
_FORM = re.compile(r'([a-z]\w*):(\d+(?:x\d+){1,2})')


INSTALL_GPU_COMPILER = "pip install 'moe_jax[gpu-compiler]'"


def target(name: str, slices: int = 1) -> Target:
  """Returns the devices of a topology, to be compiled for, not run on.

  Args:
    name: A chip and the sizes of a slice in chips, as `v5e:16x16`; or a GPU,
      the hosts and the GPUs of each, as `h100:2x8`.
    slices: How many slices of that size the data centre's network joins.

  Raises:
    UserError: There is no such topology, or its compiler is not installed.
  """
  chip, sizes = _parse(name)
  if slices < 1:
    raise UserError(f'--slices = {slices} must be at least 1')
  if chip in gpus.GPUS:
    if slices > 1:
      raise UserError(
        f'--slices = {slices} is of TPUs; of GPUs --topology has the hosts, as'
        f' {chip}:{slices}x8'
      )
    return _of_gpus(name, chip, sizes)
  options: dict[str, Any] = {'num_slices': slices} if slices > 1 else {}
  if set(sizes.split('x')) == {'1'}:
    options['chips_per_host_bounds'] = (1, 1, 1)  # otherwise 2 x 2
  if chip == 'v4':
    options['chip_config_name'] = 'megacore'  # one device, as jax runs them
  runtime.silence_libtpu()
  try:
    description = topologies.get_topology_desc(
      f'{chip}:{sizes}', platform='tpu', **options
    )
  except RuntimeError as error:
    raise _refused(name, error) from error
  return Target(description.devices, CHIPS[chip])


def _of_gpus(name: str, gpu: str, sizes: str) -> Target:
  """Returns hosts of GPUs, as `_parse` returns them."""
  facts = gpus.GPUS[gpu]
  try:
    description = topologies.get_topology_desc(
      gpu,
      platform='cuda',
      topology=f'1x{sizes}',  # one partition of hosts
      target_config=gpus.target_config(facts),
    )
  except NotImplementedError as error:  # JAX has no plugin for CUDA
    raise UserError(
      f"--topology = {name!r} needs the compiler of NVIDIA's GPUs:"
      f' {INSTALL_GPU_COMPILER}'
    ) from error
  except RuntimeError as error:
    raise _refused(name, error) from error
  memory = gpus.usable_bytes(facts)
  return Target(description.devices, Chip(memory, None, f'{gpu}:1x8'))


def here() -> Target:
  """Returns the devices of this machine and of those joined to it."""
  return Target(jax.devices(), None)


def _parse(name: str) -> tuple[str, str]:
  """Returns the chip and the sizes, as `v5e` and `4x4`."""
  match = _FORM.fullmatch(name)
  if not match:
    raise UserError(
      f'--topology = {name!r} is not of the form chip:sizes, as'
      f' {", ".join(chip.example for chip in CHIPS.values())}, or of GPUs'
      ' h100:1x8, one host of eight'
    )
  chip, known = _ALIASES.get(match[1], match[1]), [*CHIPS, *gpus.GPUS]
  if chip not in known:
    raise UserError(
      f'--topology = {name!r}: there is no chip {chip!r}'
      f'{nearest(chip, known)}; there are {", ".join(known)}'
    )
  if chip in gpus.GPUS:
    if match[2].count('x') > 1:
      raise UserError(
        f'--topology = {name!r}: of GPUs it is HOSTSxDEVICES, as {chip}:1x8'
      )
    return chip, match[2]
  example = CHIPS[chip].example
  if match[2].count('x') > example.count('x'):
    raise UserError(
      f'--topology = {name!r}: slices of {chip} are flat, as {example}'
    )
  return chip, match[2]


def _refused(name: str, error: RuntimeError) -> UserError:
  """Returns the error for a topology that libtpu does not describe."""
  message = ' '.join(str(error).split())
  if 'support not installed' in message:
    return UserError(
      f"--topology = {name!r} needs libtpu: pip install 'jax[tpu]'"
    )
  return UserError(f'--topology = {name!r} does not exist: {message[:200]}')
