"""Reads the text of a compiled program (`compiled.as_text()`): XLA's HLO.

Only what counting needs: instructions by computation, the bytes of a shape,
which computation calls which, and how often a loop runs.
"""

import itertools
import math
import re
from typing import NamedTuple

# `%name = type opcode(operands), attributes`. Types hold parentheses too, but
# never a word directly before one.
_LINE = re.compile(
  r'\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?)'
  r' (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)'
)
_HEAD = re.compile(r'(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$')
_ARRAY = re.compile(r'([a-z]+)(\d*)\w*\[([\d,<=]*)\]')
_CALLEES = re.compile(
  r'(?:calls|to_apply|branch_computations|called_computations'
  r'|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)'
)
# Not reductions and sorts: what they apply is arithmetic on scalars.
_CALLING = ('fusion', 'call', 'custom-call', 'async-start', 'conditional')


class Instruction(NamedTuple):
  """One line of a program.

  Attributes:
    name: unique within its computation.
    opcode: such as `all-gather-start`.
    type: of its result, as written.
    operands: the names that it reads; or, of a constant, nothing.
    attributes: the rest of the line.
    literal: what stood between the parentheses.
    is_root: whether it is its computation's result.
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
    computations: by name; the instructions of each by name, in order.
    entry: the name of the one that runs.
    num_devices: that run it together.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str
  num_devices: int


def parse(text: str) -> Program:
  """Reads the text of a compiled program.

  Raises:
    ValueError: it has no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry = None
  lines = text.splitlines()
  for line in lines:
    if head := _HEAD.match(line):
      current = computations.setdefault(head['name'], {})
      entry = head['name'] if head['entry'] else entry
    elif found := _LINE.match(line):
      instruction = _instruction(found)
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError('no ENTRY computation: not the text of an HLO program')
  sizes = re.findall(r'(?:num_partitions|replica_count)=(\d+)', lines[0])
  return Program(computations, entry, math.prod(map(int, sizes)))


def num_bytes(type_: str) -> int:
  """The bytes of a type, of all arrays of a tuple, without any padding."""
  bits = 0
  for kind, width, dimensions in _ARRAY.findall(type_):
    size = 8 if kind == 'pred' else int(width or 0)
    for dimension in filter(None, dimensions.split(',')):
      size *= int(dimension.lstrip('<='))
    bits += size
  return -(-bits // 8)


def callees(instruction: Instruction) -> list[str]:
  """The computations that an instruction other than a loop runs once.

  Of a conditional those of its branches, one of which runs.
  """
  if instruction.opcode not in _CALLING:
    return []
  named = _CALLEES.findall(instruction.attributes)
  return [name for each in named for name in re.findall(r'%([\w.\-]+)', each)]


def loop(
  program: Program, instruction: Instruction
) -> tuple[str, int | None] | None:
  """The body of a while loop and how often it runs, None if unknown.

  None for any other instruction. A count that XLA does not state is the
  constant with which the condition compares, as loops of `lax.scan` count up
  from 0.
  """
  if instruction.opcode != 'while':
    return None
  attributes = instruction.attributes
  body = re.search(r'body=%?([\w.\-]+)', attributes)[1]
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', attributes):
    return body, int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', attributes)[1]
  return body, _bound(program.computations[condition])


def users(
  instruction: Instruction, computation: dict[str, Instruction]
) -> list[Instruction]:
  """The instructions of a computation that read another one's result."""
  name = instruction.name
  return [each for each in computation.values() if name in each.operands]


def fused(program: Program) -> set[str]:
  """The computations that fusions are made of."""
  return {
    name
    for computation in program.computations.values()
    for instruction in computation.values()
    if instruction.opcode == 'fusion'
    for name in callees(instruction)
  }


def _bound(condition: dict[str, Instruction]) -> int | None:
  """N of a condition that is `i < N`."""
  root = next(each for each in condition.values() if each.is_root)
  if root.opcode != 'compare' or 'direction=LT' not in root.attributes:
    return None
  bound = condition[root.operands[-1]]
  return int(bound.literal) if bound.opcode == 'constant' else None


def _instruction(found: re.Match[str]) -> Instruction:
  rest = found['rest']
  depths = itertools.accumulate(
    ((letter == '(') - (letter == ')') for letter in rest), initial=1
  )
  end = list(depths).index(0) - 1
  inside = rest[:end]
  return Instruction(
    found['name'],
    found['opcode'],
    found['type'],
    tuple(re.findall(r'%([\w.\-]+)', inside)),
    rest[end + 1 :],
    inside,
    bool(found['root']),
  )
