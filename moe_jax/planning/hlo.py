"""Reads the text of a compiled program (`compiled.as_text()`): XLA's HLO.

It reads only what counting needs: instructions by computation, the bytes of a
shape, which computation calls which, how often a loop runs, and the matmuls of
a GPU.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

# `%name = type opcode(operands), attributes`. Types hold parentheses too, but
# never a word directly before one.
_LINE = re.compile(
  r'\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?)'
  r' (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)'
)
# A layout has the axes from the last on, and on TPUs tiles and a memory space.
_STORED = re.compile(
  r'([a-z]+\d*\w*\[[\d,<=]*\])'
  r'(?:\{([\d,]*)(?::T\(([\d,]+)\))?[^}]*?(?:S\((\d+)\))?\})?'
)
_HEAD = re.compile(r'(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$')
_ARRAY = re.compile(r'([a-z]+)(\d*)\w*\[([\d,<=]*)\]')
_CALLEES = re.compile(
  r'(?:calls|to_apply|branch_computations|called_computations'
  r'|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)'
)
# Of a dot in several passes, as `dot_bf16_bf16_f32_x3`.
_ALGORITHM = re.compile(r'algorithm=dot_([a-z]+\d+)_\w+_x(\d)')
# Not reductions and sorts: what they apply is arithmetic on scalars.
_CALLING = ('fusion', 'call', 'custom-call', 'async-start', 'conditional')


class Instruction(NamedTuple):
  """One line of a program.

  Attributes:
    name: Its name, unique within its computation.
    opcode: Its kind, such as `all-gather-start`.
    type: The type of its result, as written.
    operands: The names that it reads; a constant reads none.
    attributes: The rest of the line.
    literal: What stood between the parentheses.
    is_root: Whether it is its computation's result.
  """

  name: str
  opcode: str
  type: str
  operands: tuple[str, ...]
  attributes: str
  literal: str
  is_root: bool


class Program(NamedTuple):
  """A program's computations.

  Attributes:
    computations: The instructions of each computation by name, in order.
    entry: The name of the computation that runs.
    num_devices: How many devices run it together.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str
  num_devices: int


def parse(text: str) -> Program:
  """Reads the text of a compiled program.

  Raises:
    ValueError: It has no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry = None
  lines = text.splitlines()
  for line in lines:
    if head := _HEAD.match(line):
      current = computations.setdefault(head['name'], {})
      entry = head['name'] if head['entry'] else entry
    elif match := _LINE.match(line):
      instruction = _instruction(match)
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError('no ENTRY computation: not the text of an HLO program')
  sizes = re.findall(r'(?:num_partitions|replica_count)=(\d+)', lines[0])
  return Program(computations, entry, math.prod(map(int, sizes)))


def num_bytes(type_: str) -> int:
  """Returns the bytes of a type, all arrays of a tuple, without padding."""
  bits = 0
  for kind, width, dimensions in _ARRAY.findall(type_):
    size = 8 if kind == 'pred' else int(width or 0)
    for dimension in filter(None, dimensions.split(',')):
      size *= int(dimension.lstrip('<='))
    bits += size
  return -(-bits // 8)


class Stored(NamedTuple):
  """An array where it lies.

  Attributes:
    num_bytes: With the padding of a TPU's tiles.
    is_near: Whether it is in a TPU's own memory, not in that beside it.
  """

  num_bytes: int
  is_near: bool


def stored(type_: str) -> list[Stored]:
  """Returns the arrays of a type, in order."""
  arrays = []
  for array, order, tile, space in _STORED.findall(type_):
    bytes_, sizes = num_bytes(array), shape(array)
    if tile and sizes and bytes_:
      sides = [int(side) for side in tile.split(',')]
      axes = [int(axis) for axis in order.split(',')]
      padded = list(sizes)
      for axis, side in zip(axes, reversed(sides), strict=False):
        padded[axis] = -(-sizes[axis] // side) * side
      bytes_ = bytes_ * math.prod(padded) // math.prod(sizes)
    arrays.append(Stored(bytes_, space not in ('', '0')))
  return arrays


def far_bytes(type_: str) -> int:
  """Returns the bytes of a type's arrays that are in the memory of a device."""
  return sum(each.num_bytes for each in stored(type_) if not each.is_near)


def callees(instruction: Instruction) -> list[str]:
  """Returns the computations that an instruction other than a loop runs once.

  A conditional runs one of those that are returned, its branches.
  """
  if instruction.opcode not in _CALLING:
    return []
  named = _CALLEES.findall(instruction.attributes)
  return [name for each in named for name in re.findall(r'%([\w.\-]+)', each)]


def loop(
  program: Program, instruction: Instruction
) -> tuple[str, int | None] | None:
  """Returns the body of a while loop and how often it runs, None if unknown.

  It returns None for any other instruction. A count that XLA does not state is
  the constant with which the condition compares, as loops of `lax.scan` count
  up from 0.
  """
  if instruction.opcode != 'while':
    return None
  attributes = instruction.attributes
  body = _named('body', attributes)
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', attributes):
    return body, int(known[1])
  condition = program.computations[_named('condition', attributes)]
  return body, _bound(condition)


def users(
  instruction: Instruction, computation: dict[str, Instruction]
) -> list[Instruction]:
  """Returns the instructions of a computation that read one's result."""
  name = instruction.name
  return [each for each in computation.values() if name in each.operands]


def fused(program: Program) -> set[str]:
  """Returns the names of the computations that fusions are made of."""
  return {
    name
    for computation in program.computations.values()
    for instruction in computation.values()
    if instruction.opcode == 'fusion'
    for name in callees(instruction)
  }


class Matmul(NamedTuple):
  """A matmul of a GPU.

  Attributes:
    flops: Its operations, two per product.
    precision: Of its operands: '16' bits or fewer, 'tf32', or 'float32', which
      tensor cores have not.
    passes: How often it multiplies parts of its operands, which together are
      more precise.
  """

  flops: int
  precision: str
  passes: int = 1


def matmul_flops(hlo_text: str) -> int | None:
  """Returns the operations of a GPU's matmuls, as often as loops repeat them.

  Counted are dots, tokamax's grouped matmuls with all rows of their buffers,
  and cuDNN's attention, causal and so half of a square. Of a conditional the
  branch with the fewest counts. None stands for a program without any, as those
  of TPUs, which have convolutions.
  """

  def own(
    instruction: Instruction, computation: dict[str, Instruction]
  ) -> int | None:
    matmul = _matmul(instruction, computation)
    return matmul.flops if matmul else None

  return total(hlo_text, own, min) or None


def total(
  hlo_text: str,
  own: Callable[[Instruction, dict[str, Instruction]], int | None],
  choose: Callable[[Iterable[int]], int],
) -> int:
  """Adds something up over a program, as often as its loops repeat it.

  Args:
    hlo_text: The program.
    own: Returns what an instruction has, by its computation; None for what the
      computations have that it calls.
    choose: Chooses among the branches of a conditional.
  """
  program = parse(hlo_text)

  def of(name: str) -> int:
    computation = program.computations[name]
    return sum(of_instruction(x, computation) for x in computation.values())

  def of_instruction(
    instruction: Instruction, computation: dict[str, Instruction]
  ) -> int:
    if repeated := loop(program, instruction):
      return of(repeated[0]) * (repeated[1] or 1)
    found = own(instruction, computation)
    if found is not None:
      return found
    called = [of(name) for name in callees(instruction)]
    return (
      choose(called) if instruction.opcode == 'conditional' else sum(called)
    )

  return of(program.entry)


# Pallas' kernels of GPUs, the second with a version behind its name.
_TRITON, _MOSAIC = '"__gpu$xla.gpu.triton"', '"mosaic_gpu'


def matmuls(
  program: Program,
  instruction: Instruction,
  computation: dict[str, Instruction],
) -> list[Matmul]:
  """Returns the matmuls of one kernel: of an instruction and what it fuses."""
  own = _matmul(instruction, computation)
  inside = [
    each
    for name in callees(instruction)
    for within in program.computations[name].values()
    for each in matmuls(program, within, program.computations[name])
  ]
  return [own, *inside] if own else inside


def _matmul(
  instruction: Instruction, computation: dict[str, Instruction]
) -> Matmul | None:
  """Returns what an instruction itself multiplies, None if nothing."""
  is_dot = instruction.opcode == 'dot'
  if instruction.opcode not in ('dot', 'custom-call', 'convolution'):
    return None
  attributes, out = instruction.attributes, shape(instruction.type)
  if instruction.opcode == 'convolution':
    left, right = (computation[name].type for name in instruction.operands)
    flops = _convolution_flops(out, shape(left), shape(right), attributes)
    return Matmul(flops, '16', _PASSES.get(_precision(attributes), 1))
  if '"__cudnn$fmha' in attributes:  # [B, H, L, A]
    # Two products of a square forward; backward five, one of them again.
    products = 5 if 'Backward"' in attributes else 2
    return Matmul(products * math.prod(out) * out[2], '16')
  if not instruction.operands:
    return None
  # Mosaic's kernels have sizes and offsets of groups first, others the rows.
  rows = instruction.operands[-2 if _MOSAIC in attributes else 0]
  type_ = computation[rows].type
  first, precision = shape(type_), 'tf32' if type_.startswith('f32') else '16'
  if is_dot:
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', attributes)
    axes = filter(None, contracted[1].split(',')) if contracted else ()
    products = math.prod(out) * math.prod(first[int(axis)] for axis in axes)
    if algorithm := _ALGORITHM.search(attributes):
      precision = 'tf32' if algorithm[1] == 'tf32' else '16'
      return Matmul(2 * products, precision, int(algorithm[2]))
    if precision == 'tf32' and 'operand_precision={highest' in attributes:
      precision = 'float32'
    return Matmul(2 * products, precision)
  if is_grouped_matmul(instruction):
    # Rows [M, K] by weights to [M, F], or by rows [M, F] to [N, K, F]; Mosaic's
    # are transposed for that.
    return Matmul(2 * math.prod(first) * out[-1], precision)
  return None


# Of bfloat16, which a TPU multiplies, by the precision that is asked for.
_PASSES = {'high': 3, 'highest': 6}


def _precision(attributes: str) -> str:
  match = re.search(r'operand_precision=\{(\w+)', attributes)
  return match[1] if match else 'default'


def _convolution_flops(
  out: list[int], rows: list[int], weights: list[int], attributes: str
) -> int:
  """Returns the operations of a convolution, as which TPUs have matmuls.

  An axis of heads may be one of its windows, with padding all around: what is
  multiplied with padding does not count.
  """
  match = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes)
  assert match, 'a convolution says what its axes are'
  of_rows, of_weights, of_out = match.groups()
  window = dict(re.findall(r'(\w+)=([\dx_\-]+)', _window(attributes)))
  products = 2 * out[of_out.index('b')] * out[of_out.index('f')]
  products *= weights[of_weights.index('i')]
  spatial = [label for label in of_rows if label.isdigit()]
  for axis, label in enumerate(sorted(spatial)):

    def option(name: str, default: str, axis: int = axis) -> list[int]:
      values = window[name].split('x')[axis] if name in window else default
      return [int(value) for value in values.split('_')]

    [stride], [spread] = option('stride', '1'), option('lhs_dilate', '1')
    [dilation], low = option('rhs_dilate', '1'), option('pad', '0_0')[0]
    size = rows[of_rows.index(label)]
    places = (
      at * stride + step * dilation - low
      for at in range(out[of_out.index(label)])
      for step in range(weights[of_weights.index(label)])
    )
    products *= sum(
      place % spread == 0 and 0 <= place // spread < size for place in places
    )
  return products


def _window(attributes: str) -> str:
  match = re.search(r'window=\{([^}]*)\}', attributes)
  return match[1] if match else ''


def is_grouped_matmul(instruction: Instruction) -> bool:
  """Returns whether an instruction is a kernel of tokamax's `ragged_dot`."""
  attributes = instruction.attributes
  by_kernel = _TRITON in attributes or _MOSAIC in attributes
  return by_kernel and 'RaggedDot' in attributes


def shape(type_: str) -> list[int]:
  """Returns the sizes of a type's first array."""
  match = _ARRAY.search(type_)
  return [int(size) for size in match[3].split(',') if size] if match else []


def _named(attribute: str, attributes: str) -> str:
  """Returns the computation that an attribute of an instruction names."""
  match = re.search(rf'\b{attribute}=%?([\w.\-]+)', attributes)
  if match is None:
    raise ValueError(f'no attribute {attribute!r} in {attributes!r}')
  return match[1]


def _bound(condition: dict[str, Instruction]) -> int | None:
  """Returns N of a condition that is `i < N`, None of another one."""
  root = next(each for each in condition.values() if each.is_root)
  if root.opcode != 'compare' or 'direction=LT' not in root.attributes:
    return None
  bound = condition[root.operands[-1]]
  return int(bound.literal) if bound.opcode == 'constant' else None


def _instruction(match: re.Match[str]) -> Instruction:
  rest = match['rest']
  depths = itertools.accumulate(
    ((letter == '(') - (letter == ')') for letter in rest), initial=1
  )
  end = list(depths).index(0) - 1
  inside = rest[:end]
  return Instruction(
    match['name'],
    match['opcode'],
    match['type'],
    tuple(re.findall(r'%([\w.\-]+)', inside)),
    rest[end + 1 :],
    inside,
    bool(match['root']),
  )
