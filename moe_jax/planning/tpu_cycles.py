"""For how long a TPU computes a compiled program, as its compiler says it.

Programs for TPUs carry an estimate of the cycles of every fusion, and of most
kernels the operations that their authors state. Of a conditional one branch
counts: by default the cheaper, as the exchanges of experts compute what found
no room only where something found none.
"""

import math
import re
from collections.abc import Callable, Iterable

from moe_jax.planning import hlo

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN_CYCLES = 1 << 60  # what is no less is a mark, not a number
_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
# A grouped product of sorted rows: a mask says which rows are of which group,
# and a window of rows is computed for the groups alone that begin or lie in it.
_SKIPS = '"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_GROUP_STARTS"'
_BOUNDS = re.compile(r'"iteration_bounds":\[([\d",]*)\]')
_MASKED = re.compile(r'"mask_dim_to_iteration_index":\[([\d",]+)\]')
# The products of a square, of which half is computed, in splash attention.
_SPLASH = re.compile(r'splash_\w+?_(fwd|dq|dkv)')
_SPLASH_PRODUCTS = {'fwd': 2, 'dq': 3, 'dkv': 4}

Choose = Callable[[Iterable[int]], int]


def estimated_cycles(hlo_text: str, choose: Choose = min) -> int | None:
  """Returns the cycles of all fusions, as often as their loops repeat them.

  Kernels, gathers and collectives have no estimate, and what the hardware does
  beside the tensor core is not in it. An estimate of a grouped product is of
  all groups with all rows; what is skipped of it when it runs does not count.

  Args:
    hlo_text: The `compiled.as_text()` of a program.
    choose: Which branch of a conditional counts: `min` or `max`.

  Returns:
    The cycles; None for a program that carries no estimates, as those of other
    devices.
  """

  def own(
    instruction: hlo.Instruction, computation: dict[str, hlo.Instruction]
  ) -> int | None:
    del computation
    stated = _CYCLES.search(instruction.attributes)
    if stated is None:
      return None
    cycles = int(stated[1])
    if cycles >= _UNKNOWN_CYCLES:
      return 0
    return round(cycles * _share_computed(instruction.attributes))

  return hlo.total(hlo_text, own, choose) or None


def kernel_flops(hlo_text: str, choose: Choose = min) -> int:
  """Returns the operations of all kernels, as often as loops repeat them.

  They are what a kernel states: of grouped matmuls those of all rows of their
  buffers. Of splash attention, which states nothing, they are its products of
  half a square.

  Args:
    hlo_text: The `compiled.as_text()` of a program for TPUs.
    choose: Which branch of a conditional counts: `min` or `max`.
  """

  def own(
    instruction: hlo.Instruction, computation: dict[str, hlo.Instruction]
  ) -> int | None:
    if not is_kernel(instruction):
      return None
    return flops_of_kernel(instruction, computation)

  return hlo.total(hlo_text, own, choose)


def is_kernel(instruction: hlo.Instruction) -> bool:
  """Returns whether an instruction is a kernel, of Pallas or of libtpu."""
  return '"tpu_custom_call"' in instruction.attributes


def is_attention(instruction: hlo.Instruction) -> bool:
  """Returns whether a kernel is one of splash attention."""
  return _SPLASH.match(instruction.name) is not None


def flops_of_kernel(
  instruction: hlo.Instruction, computation: dict[str, hlo.Instruction]
) -> int:
  """Returns the operations of a kernel, as `kernel_flops` counts them."""
  if stated := _FLOPS.search(instruction.attributes):
    return int(stated[1])
  return _splash_flops(instruction, computation)


def _share_computed(attributes: str) -> float:
  """Returns the share of a fusion's iterations that are not skipped, at most.

  Of W windows of rows and G groups, of which none begins twice, no more than
  W + G - 1 pairs meet.
  """
  masked = _MASKED.search(attributes)
  if _SKIPS not in attributes or not masked:
    return 1
  bounds = _numbers(_BOUNDS.search(attributes))
  groups, windows = (bounds[dimension] for dimension in _numbers(masked))
  return (windows + groups - 1) / (windows * groups)


def _numbers(match: re.Match[str] | None) -> list[int]:
  assert match, 'a fusion that skips iterations says how many it has'
  return [int(number) for number in re.findall(r'\d+', match[1])]


def _splash_flops(
  instruction: hlo.Instruction, computation: dict[str, hlo.Instruction]
) -> int:
  """Returns the operations of splash attention, 0 of another kernel."""
  kernel = _SPLASH.match(instruction.name)
  if kernel is None:
    return 0
  shapes = [
    hlo.shape(computation[name].type)
    for name in instruction.operands
    if computation[name].type.startswith(('bf16', 'f32'))
  ]
  query, key = shapes[:2]  # [..., H, L, A]
  products = _SPLASH_PRODUCTS[kernel[1]]
  # A backward pass in one kernel has the gradient of queries too.
  products += kernel[1] == 'dkv' and len(_arrays(instruction, len(query))) > 2
  return products * math.prod(query) * key[-2]


def _arrays(instruction: hlo.Instruction, rank: int) -> list[str]:
  """Returns those of an instruction's results that have a rank or more."""
  types = re.findall(r'\w+\[[\d,]*\]', instruction.type)
  return [each for each in types if len(hlo.shape(each)) >= rank]
