"""How fast a device could run a compiled program: the roofline of its kernels.

  kernels(compiled.as_text(), device)

Every kernel takes as long as its bytes take to be read and written, or its
matmuls to be computed, whichever is longer: each at a share of the device's
rate that good kernels attain. Nothing overlaps, and collectives are left out.
So it is what the step would take if every kernel were good, and tells where the
time goes before there is a device.

Of a TPU, arrays in its own memory (VMEM) cost nothing; what is fetched into it
ahead of time counts as a kernel `prefetch` of its own.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from moe_jax.planning import hlo, tpu_cycles

# Of the memory's bandwidth and of the peak of matmuls.
BANDWIDTH_SHARE, PEAK_SHARE = 0.8, 0.7

# What is no kernel, or only travels.
_FREE = {
  *'parameter constant get-tuple-element tuple bitcast after-all'.split(),
  *'iota partition-id replica-id opt-barrier'.split(),
}
# Custom calls that only say where something is.
_NOTES = r'"(AllocateBuffer|ConcatBitcast|PrepareAsync\w*|AssumeGather\w*)"'
_TRAVELS = (
  r'(ragged-)?all-(gather|reduce|to-all)|reduce-scatter|collective-.*|.*-done'
)
# What reads of its first operand no more than it returns.
_PICKS = ('dynamic-slice', 'gather', 'slice')
# Copies between the memories of a TPU, beside other work.
_PREFETCHES = ('copy-start', 'slice-start')
# What a fusion does on the way to a slice, element by element.
_ON_THE_WAY = ('bitcast', 'convert', 'copy', 'reshape', 'transpose')


class Device(Protocol):
  """What a roofline is made of; `gpus.Gpu` is one.

  Attributes:
    bytes_per_second: The bandwidth of its memory.
  """

  @property
  def bytes_per_second(self) -> float: ...

  def flops_per_second(self, precision: str) -> float:
    """Returns the peak of matmuls in a precision, as `hlo.Matmul` names it."""
    ...


class Tpu(NamedTuple):
  """A TPU core, as JAX counts them.

  Attributes:
    bytes_per_second: The bandwidth of its memory.
    peak: The peak of matmuls of bfloat16, the only ones that it has.
    matrix_side: The rows and columns of a matrix unit. Heads are narrower, and
      so an attention kernel leaves part of it idle.
  """

  bytes_per_second: float
  peak: float
  matrix_side: int

  def flops_per_second(self, precision: str) -> float:
    """Returns the peak; float32 is multiplied in passes."""
    del precision
    return self.peak


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel of a program.

  Attributes:
    kind: How it computes: `matmul`, `grouped matmul`, `attention`, `fusion`, or
      XLA's name of the operation.
    part: What it computes, a part of the training step.
    count: How often it runs.
    num_bytes: What it reads and writes each time.
    flops: The operations of its matmuls each time.
    seconds: What it takes each time.
  """

  kind: str
  part: str
  count: int
  num_bytes: int
  flops: int
  seconds: float

  @property
  def total_seconds(self) -> float:
    """What all its runs take."""
    return self.count * self.seconds


def kernels(hlo_text: str, device: Device) -> list[Kernel]:
  """Lists the kernels of a program for a device, in order.

  Those of a loop count as often as it runs; of a conditional the branch that
  takes the least.
  """
  program = hlo.parse(hlo_text)
  return _inside(program, program.entry, 1, device)


def _inside(
  program: hlo.Program, name: str, count: int, device: Device
) -> list[Kernel]:
  """Returns the kernels of a computation that runs so often."""
  computation = program.computations[name]
  return [
    kernel
    for instruction in computation.values()
    for kernel in _below(program, instruction, computation, count, device)
  ]


def _below(
  program: hlo.Program,
  instruction: hlo.Instruction,
  computation: dict[str, hlo.Instruction],
  count: int,
  device: Device,
) -> list[Kernel]:
  """Returns the kernels of an instruction that runs so often."""
  if loop := hlo.loop(program, instruction):
    return _inside(program, loop[0], count * (loop[1] or 1), device)
  opcode = instruction.opcode
  if opcode in _FREE or re.fullmatch(_TRAVELS, opcode.removesuffix('-start')):
    return []
  if opcode == 'custom-call' and re.search(_NOTES, instruction.attributes):
    return []
  if opcode == 'conditional':
    names = hlo.callees(instruction)
    branches = [_inside(program, name, count, device) for name in names]
    return min(branches, key=total_seconds)
  if opcode == 'call':
    [called] = hlo.callees(instruction)
    return _inside(program, called, count, device)
  return [_kernel(program, instruction, computation, count, device)]


def beside(
  program: hlo.Program, device: Device
) -> Callable[[hlo.Instruction, dict[str, hlo.Instruction]], float]:
  """Returns a function of what is computed beside a collective, in seconds.

  It is given the instruction that starts one, and its computation. A program of
  a GPU is a schedule: what stands between start and end runs meanwhile. Of two
  collectives on their way at once both have it beside them. One that does not
  start and end apart has nothing.
  """
  taken: dict[int, float] = {}

  def seconds(
    start: hlo.Instruction, computation: dict[str, hlo.Instruction]
  ) -> float:
    if not start.opcode.endswith('-start'):
      return 0.0
    order = iter(computation.values())
    after = itertools.dropwhile(lambda each: each is not start, order)
    meanwhile = itertools.takewhile(
      lambda each: not _closes(each, start), itertools.islice(after, 1, None)
    )
    return sum(of(each, computation) for each in meanwhile)

  def of(
    each: hlo.Instruction, computation: dict[str, hlo.Instruction]
  ) -> float:
    if id(each) not in taken:
      listed = _below(program, each, computation, 1, device)
      taken[id(each)] = total_seconds(listed)
    return taken[id(each)]

  return seconds


def _closes(each: hlo.Instruction, start: hlo.Instruction) -> bool:
  return each.opcode.endswith('-done') and start.name in each.operands


def total_seconds(listed: Iterable[Kernel]) -> float:
  """Returns what kernels take one after the other."""
  return sum(each.total_seconds for each in listed)


def report(hlo_text: str, device: Device) -> dict[str, Any]:
  """Returns the roofline of a program for JSON.

  It has the `seconds`, `num_bytes` and `launches` of all kernels, and of the
  same, by kind of kernel and by part of the step, those of `kinds` and `parts`,
  the longest first.
  """
  listed = kernels(hlo_text, device)
  return _sums(listed) | {
    'kinds': _grouped(listed, 'kind'),
    'parts': _grouped(listed, 'part'),
  }


def _grouped(listed: list[Kernel], by: str) -> dict[str, dict[str, Any]]:
  names = {getattr(each, by) for each in listed}
  sums = {
    name: _sums([each for each in listed if getattr(each, by) == name])
    for name in names
  }
  return dict(sorted(sums.items(), key=lambda item: -item[1]['seconds']))


def _sums(listed: list[Kernel]) -> dict[str, Any]:
  return {
    'seconds': total_seconds(listed),
    'num_bytes': sum(each.count * each.num_bytes for each in listed),
    'launches': sum(each.count for each in listed),
  }


def _kernel(
  program: hlo.Program,
  instruction: hlo.Instruction,
  computation: dict[str, hlo.Instruction],
  count: int,
  device: Device,
) -> Kernel:
  matmuls = hlo.matmuls(program, instruction, computation)
  if tpu_cycles.is_kernel(instruction):
    flops = tpu_cycles.flops_of_kernel(instruction, computation)
    matmuls = [hlo.Matmul(flops, '16')] if flops else []
  num_bytes = _num_bytes(program, instruction, computation)
  computing = sum(
    each.passes * each.flops / device.flops_per_second(each.precision)
    for each in matmuls
  )
  if isinstance(device, Tpu) and tpu_cycles.is_attention(instruction):
    computing *= _idle_factor(instruction, computation, device.matrix_side)
  moving = num_bytes / device.bytes_per_second
  flops = sum(each.flops for each in matmuls)
  kind = _kind(instruction, flops)
  return Kernel(
    kind,
    _part(instruction, kind),
    count,
    num_bytes,
    flops,
    max(computing / PEAK_SHARE, moving / BANDWIDTH_SHARE),
  )


def _idle_factor(
  instruction: hlo.Instruction,
  computation: dict[str, hlo.Instruction],
  side: int,
) -> float:
  """Returns what the width of heads is rounded up by on a matrix unit."""
  query = next(
    computation[name].type
    for name in instruction.operands
    if computation[name].type.startswith(('bf16', 'f32'))
  )
  width = hlo.shape(query)[-1]
  return -(-width // side) * side / width


def _kind(instruction: hlo.Instruction, flops: int) -> str:
  if '"__cudnn$fmha' in instruction.attributes:
    return 'attention'
  if tpu_cycles.is_attention(instruction):
    return 'attention'
  if hlo.is_grouped_matmul(instruction):
    return 'grouped matmul'
  if tpu_cycles.is_kernel(instruction):  # of libtpu and of megablox
    return 'grouped matmul'
  if instruction.opcode in _PREFETCHES:
    return 'prefetch'
  return 'matmul' if flops else instruction.opcode


def _part(instruction: hlo.Instruction, kind: str) -> str:
  """Returns a part of the step, by the scopes that the model names."""
  if kind in ('attention', 'grouped matmul', 'prefetch'):
    return kind
  match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes)
  path = match[1] if match else ''
  # What a scan keeps of its layers, and the zeros that this is written into.
  if 'dynamic_update_slice' in path or not path:
    return 'scan'
  for scope, part in (
    ('(loss)', 'head'),
    ('attention', 'attention'),
    ('router', 'router'),
    ('shared_expert', 'dense layers'),
    ('experts', 'permutation and activation of experts'),
  ):
    if scope in path:
      return part
  if 'jvp(' not in path:
    return 'optimizer'
  return 'dense layers' if kind == 'matmul' else 'other'


def _num_bytes(
  program: hlo.Program,
  instruction: hlo.Instruction,
  computation: dict[str, hlo.Instruction],
) -> int:
  """Returns what a kernel reads and writes; of slices only themselves."""
  if instruction.opcode in _PREFETCHES:
    source, into = _ends(instruction)
    return into.num_bytes * (2 - source.is_near - into.is_near)
  types = [
    computation[name].type
    for name in instruction.operands
    if name in computation
  ]
  if instruction.opcode == 'fusion':
    [name] = hlo.callees(instruction)
    read = sum(
      share * hlo.far_bytes(type_)
      for share, type_ in zip(_shares(program, name), types, strict=False)
    )
    return round(read) + _written(program, name, instruction.type)
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * hlo.far_bytes(types[1])
  written = hlo.far_bytes(instruction.type)
  if instruction.opcode == 'dynamic-slice':
    return 2 * written
  return written + sum(map(hlo.far_bytes, types))


def _ends(instruction: hlo.Instruction) -> list[hlo.Stored]:
  """Returns where a prefetch reads and where it writes, in this order."""
  first, second = hlo.stored(instruction.type)[:2]
  if instruction.opcode == 'copy-start':  # has its result first
    return [second, first]
  return [first, second]


def _shares(program: hlo.Program, name: str) -> list[float]:
  """Returns the share of each operand that a fusion reads."""
  fused = program.computations[name]
  parameters = [each for each in fused.values() if each.opcode == 'parameter']
  parameters.sort(key=lambda each: int(each.literal))
  return [_share_read(program, each, fused) for each in parameters]


def _share_read(
  program: hlo.Program,
  value: hlo.Instruction,
  fused: dict[str, hlo.Instruction],
) -> float:
  """Returns the share of a value that a fusion reads."""
  share = 0.0
  for user in hlo.users(value, fused):
    if user.opcode in _PICKS and user.operands[0] == value.name:
      sizes = map(hlo.shape, (user.type, value.type))
      share += math.prod(next(sizes)) / math.prod(next(sizes))
    elif user.opcode == 'dynamic-update-slice':
      share += user.operands[0] != value.name  # updated where it is
    elif user.opcode in _ON_THE_WAY and not user.is_root:
      share += _share_read(program, user, fused)
    elif user.opcode == 'fusion':
      [inner] = hlo.callees(user)
      inside = _shares(program, inner)
      share += sum(
        of_operand
        for of_operand, name in zip(inside, user.operands, strict=False)
        if name == value.name
      )
    else:
      share += 1
  return min(share, 1.0)


def _written(program: hlo.Program, name: str, type_: str) -> int:
  """Returns the bytes of a fusion's results, of this type, that it writes."""
  fused = program.computations[name]
  root = next(each for each in fused.values() if each.is_root)
  results = [root]
  if root.opcode == 'tuple':
    results = [fused[name] for name in root.operands]
  arrays = hlo.stored(type_)
  if len(arrays) != len(results):
    return hlo.far_bytes(type_)
  return sum(
    0 if array.is_near else _bytes_written(result, fused, array)
    for result, array in zip(results, arrays, strict=True)
  )


def _bytes_written(
  result: hlo.Instruction, fused: dict[str, hlo.Instruction], array: hlo.Stored
) -> int:
  """Returns the bytes of a result; of an array that is updated, its update."""
  origin = result
  while origin.opcode in _ON_THE_WAY and origin.operands[0] in fused:
    origin = fused[origin.operands[0]]
  if origin.opcode != 'dynamic-update-slice':
    return array.num_bytes
  sizes = (hlo.shape(fused[origin.operands[1]].type), hlo.shape(origin.type))
  part, whole = map(math.prod, sizes)
  return array.num_bytes * part // whole
