"""How fast a GPU could run a compiled program: the roofline of its kernels.

  kernels(compiled.as_text(), gpu)

Every kernel takes as long as its bytes take to be read and written, or its
matmuls to be computed, whichever is longer: each at a share of the device's
rate that good kernels attain. Nothing overlaps, and collectives are left out.
So it is what the step would take if every kernel were good, and tells where the
time goes before there is a device.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from moe_jax.planning import hlo
from moe_jax.planning.gpus import Gpu

# Of the memory's bandwidth and of the peak of matmuls.
BANDWIDTH_SHARE, PEAK_SHARE = 0.8, 0.7

# What is no kernel, or only travels.
_FREE = {
  *'parameter constant get-tuple-element tuple bitcast after-all'.split(),
  *'iota partition-id replica-id opt-barrier'.split(),
}
_TRAVELS = (
  r'(ragged-)?all-(gather|reduce|to-all)|reduce-scatter|collective-.*|.*-done'
)
# What reads of its first operand no more than it returns.
_PICKS = ('dynamic-slice', 'gather', 'slice')
# What a fusion does on the way to a slice, element by element.
_ON_THE_WAY = ('bitcast', 'convert', 'copy', 'reshape', 'transpose')


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


def kernels(hlo_text: str, gpu: Gpu) -> list[Kernel]:
  """Lists the kernels of a program for a GPU, in order.

  Those of a loop count as often as it runs; of a conditional the branch that
  takes the least.
  """
  program = hlo.parse(hlo_text)
  return _inside(program, program.entry, 1, gpu)


def _inside(
  program: hlo.Program, name: str, count: int, gpu: Gpu
) -> list[Kernel]:
  """Returns the kernels of a computation that runs so often."""
  computation = program.computations[name]
  return [
    kernel
    for instruction in computation.values()
    for kernel in _below(program, instruction, computation, count, gpu)
  ]


def _below(
  program: hlo.Program,
  instruction: hlo.Instruction,
  computation: dict[str, hlo.Instruction],
  count: int,
  gpu: Gpu,
) -> list[Kernel]:
  """Returns the kernels of an instruction that runs so often."""
  if loop := hlo.loop(program, instruction):
    return _inside(program, loop[0], count * (loop[1] or 1), gpu)
  opcode = instruction.opcode
  if opcode in _FREE or re.fullmatch(_TRAVELS, opcode.removesuffix('-start')):
    return []
  if opcode == 'conditional':
    names = hlo.callees(instruction)
    branches = [_inside(program, name, count, gpu) for name in names]
    return min(branches, key=total_seconds)
  if opcode == 'call':
    [called] = hlo.callees(instruction)
    return _inside(program, called, count, gpu)
  return [_kernel(program, instruction, computation, count, gpu)]


def beside(
  program: hlo.Program, gpu: Gpu
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
      lambda each: not _ends(each, start), itertools.islice(after, 1, None)
    )
    return sum(of(each, computation) for each in meanwhile)

  def of(
    each: hlo.Instruction, computation: dict[str, hlo.Instruction]
  ) -> float:
    if id(each) not in taken:
      listed = _below(program, each, computation, 1, gpu)
      taken[id(each)] = total_seconds(listed)
    return taken[id(each)]

  return seconds


def _ends(each: hlo.Instruction, start: hlo.Instruction) -> bool:
  return each.opcode.endswith('-done') and start.name in each.operands


def total_seconds(listed: Iterable[Kernel]) -> float:
  """Returns what kernels take one after the other."""
  return sum(each.total_seconds for each in listed)


def report(hlo_text: str, gpu: Gpu) -> dict[str, Any]:
  """Returns the roofline of a program for JSON.

  It has the `seconds`, `num_bytes` and `launches` of all kernels, and of the
  same, by kind of kernel and by part of the step, those of `kinds` and `parts`,
  the longest first.
  """
  listed = kernels(hlo_text, gpu)
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
  gpu: Gpu,
) -> Kernel:
  matmuls = hlo.matmuls(program, instruction, computation)
  num_bytes = _num_bytes(program, instruction, computation)
  computing = sum(
    each.passes * each.flops / gpu.flops_per_second(each.precision)
    for each in matmuls
  )
  moving = num_bytes / gpu.bytes_per_second
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


def _kind(instruction: hlo.Instruction, flops: int) -> str:
  if '"__cudnn$fmha' in instruction.attributes:
    return 'attention'
  if hlo.is_grouped_matmul(instruction):
    return 'grouped matmul'
  return 'matmul' if flops else instruction.opcode


def _part(instruction: hlo.Instruction, kind: str) -> str:
  """Returns a part of the step, by the scopes that the model names."""
  if kind in ('attention', 'grouped matmul'):
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
  if instruction.opcode == 'fusion':
    [name] = hlo.callees(instruction)
    fused = program.computations[name]
    read = sum(
      _share_read(each, fused) * hlo.num_bytes(each.type)
      for each in fused.values()
      if each.opcode == 'parameter'
    )
    return round(read) + _written(fused)
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * hlo.num_bytes(computation[instruction.operands[1]].type)
  written = hlo.num_bytes(instruction.type)
  if instruction.opcode == 'dynamic-slice':
    return 2 * written
  return written + sum(
    hlo.num_bytes(computation[name].type)
    for name in instruction.operands
    if name in computation
  )


def _share_read(
  value: hlo.Instruction, fused: dict[str, hlo.Instruction]
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
      share += _share_read(user, fused)
    else:
      share += 1
  return min(share, 1.0)


def _written(fused: dict[str, hlo.Instruction]) -> int:
  """Returns the bytes of a fusion's results that it writes."""
  root = next(each for each in fused.values() if each.is_root)
  results = [root]
  if root.opcode == 'tuple':
    results = [fused[name] for name in root.operands]
  written = 0
  for result in results:
    origin = result
    while origin.opcode in _ON_THE_WAY and origin.operands[0] in fused:
      origin = fused[origin.operands[0]]
    if origin.opcode == 'dynamic-update-slice':
      result = fused[origin.operands[1]]
    written += hlo.num_bytes(result.type)
  return written
