"""Counts the collectives of a compiled program and the bytes that they send.

  collectives(compiled.as_text())

They are read from the text of the program: what the compiler left, merged and
moved, not what the model asked for. Exchanges inside a kernel of ours or of a
library are not seen.
"""

import dataclasses
from collections.abc import Callable, Iterable

from moe_jax.planning import hlo
from moe_jax.planning.replica_groups import Group, groups

# Bytes that each of n devices sends, per byte of its operand, where the
# exchange is as cheap as it can be (rings). A ragged-all-to-all, whose sizes
# are data, counts as if all rows of its operand or, where that is smaller, of
# its result were sent, evenly spread: the other is a buffer with room to spare.
_SENT: dict[str, Callable[[int], float]] = {
  'all-gather': lambda n: n - 1,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'ragged-all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1.0,
  'collective-broadcast': lambda n: 1.0,
}
KINDS = tuple(_SENT)

# (the instruction that starts a collective, its computation) -> the seconds of
# what is computed while it travels.
Beside = Callable[[hlo.Instruction, dict[str, hlo.Instruction]], float]


@dataclasses.dataclass(frozen=True)
class Collective:
  """Equal collectives of a program.

  Attributes:
    kind: One of `KINDS`.
    sent_bytes: The bytes that each device (of a permutation, each that sends)
      sends at each of them.
    group: The first group of devices that exchange, by their place in the mesh;
      of a permutation, its first pair.
    count: How often they run in one run of the program.
    in_unknown_loop: Whether a loop around them may repeat `count`.
    beside_seconds: What is computed while each travels; None if unknown.
  """

  kind: str
  sent_bytes: int
  group: Group
  count: int
  in_unknown_loop: bool = False
  beside_seconds: float | None = None

  @property
  def total_bytes(self) -> int:
    """The bytes that a device sends in all of them."""
    return self.sent_bytes * self.count


def collectives(
  hlo_text: str,
  choose: Callable[..., list[Collective]] = max,
  beside: Callable[[hlo.Program], Beside] | None = None,
) -> list[Collective]:
  """Lists what a program sends, the most bytes first.

  Args:
    hlo_text: The `compiled.as_text()` of a program that jit partitioned.
    choose: Which branch of a conditional counts: `max`, the one that sends the
      most, or `min`.
    beside: Returns, of a program, what tells `beside_seconds`.

  Returns:
    Equal collectives together. A collective in a loop counts as often as the
    loop runs; where nothing says how often, once.
  """
  program = hlo.parse(hlo_text)
  fused = hlo.fused(program)
  of_computation: dict[str, list[Collective]] = {}
  seconds = beside(program) if beside else None

  def inside(name: str) -> list[Collective]:
    if name not in of_computation:
      computation = program.computations[name]
      listed: list[Collective] = []
      for instruction in computation.values():
        if _begins(instruction, computation):
          each = _read(instruction, program, computation, name in fused)
          if seconds:
            taken = seconds(instruction, computation)
            each = dataclasses.replace(each, beside_seconds=taken)
          listed.append(each)
        listed += below(instruction)
      of_computation[name] = _merged(listed)
    return of_computation[name]

  def below(instruction: hlo.Instruction) -> list[Collective]:
    if loop := hlo.loop(program, instruction):
      return [_repeated(each, loop[1]) for each in inside(loop[0])]
    called = [inside(name) for name in hlo.callees(instruction)]
    if instruction.opcode == 'conditional':
      return choose(called, key=total_bytes)
    return [each for listed in called for each in listed]

  # Those among the one device of a group send nothing.
  sending = [each for each in inside(program.entry) if each.sent_bytes]
  return sorted(sending, key=lambda each: -each.total_bytes)


def total_bytes(listed: Iterable[Collective]) -> int:
  """Returns the bytes that a device sends in all of them."""
  return sum(each.total_bytes for each in listed)


def _begins(
  instruction: hlo.Instruction, computation: dict[str, hlo.Instruction]
) -> bool:
  """Returns whether an instruction begins a collective.

  TPU programs repeat a collective in every fusion during which it goes on; the
  one in which it begins hands it to AsyncCollectiveStart.
  """
  if instruction.opcode.removesuffix('-start') not in _SENT:
    return False
  if '"async_collective_fusion_config"' not in instruction.attributes:
    return True
  users = hlo.users(instruction, computation)
  return any('AsyncCollectiveStart' in user.attributes for user in users)


def _read(
  instruction: hlo.Instruction,
  program: hlo.Program,
  computation: dict[str, hlo.Instruction],
  is_fused: bool,
) -> Collective:
  """Returns an instruction as a collective that runs once."""
  kind = instruction.opcode.removesuffix('-start')
  # How TPUs scatter a sum: in one fusion each device keeps a slice of it.
  if kind == 'all-reduce' and is_fused and _sliced(instruction, computation):
    kind = 'reduce-scatter'
  group = groups(instruction.attributes, program.num_devices)[0]
  sizes = [hlo.num_bytes(computation[x].type) for x in instruction.operands]
  # Of a ragged one the operand, the output, then offsets and counts.
  size = min(sizes[:2]) if kind == 'ragged-all-to-all' else sum(sizes)
  return Collective(kind, round(_SENT[kind](len(group)) * size), group, 1)


def _sliced(
  instruction: hlo.Instruction, computation: dict[str, hlo.Instruction]
) -> bool:
  """Returns whether slices are all that is read of a result, or its parts."""
  users = hlo.users(instruction, computation)  # none of a fusion's own result
  return bool(users) and all(
    user.opcode == 'dynamic-slice'
    or (user.opcode == 'get-tuple-element' and _sliced(user, computation))
    for user in users
  )


def _repeated(each: Collective, times: int | None) -> Collective:
  """Returns a collective as often as a loop repeats it, None if unknown."""
  if times is None:
    return dataclasses.replace(each, in_unknown_loop=True)
  return dataclasses.replace(each, count=each.count * times)


def _merged(listed: list[Collective]) -> list[Collective]:
  """Returns equal collectives together."""
  counts: dict[Collective, int] = {}
  for each in listed:
    key = dataclasses.replace(each, count=0)
    counts[key] = counts.get(key, 0) + each.count
  return [
    dataclasses.replace(key, count=count) for key, count in counts.items()
  ]
