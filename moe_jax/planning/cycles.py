"""How long a TPU computes, as its compiler estimates it.

Programs for TPUs carry an estimate of the cycles of every fusion. Kernels
(grouped matmuls, attention), collectives and copies have none, and what the
hardware does beside the tensor core is not in it: it is a lower bound.
"""

import re

from moe_jax.planning import hlo

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 1 << 60  # what is no less is a mark, not a number


def estimate(hlo_text: str) -> int | None:
  """The cycles of all fusions, as often as their loops repeat them.

  Of a conditional the dearest branch counts. None: the program carries none,
  as those of other devices.
  """
  program = hlo.parse(hlo_text)

  def of(name: str) -> int:
    return sum(map(of_instruction, program.computations[name].values()))

  def of_instruction(instruction: hlo.Instruction) -> int:
    if loop := hlo.loop(program, instruction):
      return of(loop[0]) * (loop[1] or 1)
    if stated := _CYCLES.search(instruction.attributes):
      return int(stated[1]) if int(stated[1]) < _UNKNOWN else 0
    called = [of(name) for name in hlo.callees(instruction)]
    if instruction.opcode == 'conditional':
      return max(called)
    return sum(called)

  return of(program.entry) or None
