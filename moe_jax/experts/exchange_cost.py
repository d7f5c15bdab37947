"""How many rows an exchange has room for, and how many bytes it sends.

U devices share the experts; each has T tokens with K slots and N / U experts.
Plain arithmetic on numbers, for plans and for the exchanges themselves.
"""

import math
from typing import NamedTuple


class ExchangeSizes(NamedTuple):
  """What devices along the expert axis exchange in one MoE sub-layer.

  Attributes:
    tokens: T of one device.
    slots: K of a token.
    num_experts: N of all devices.
    devices: U.
  """

  tokens: int
  slots: int
  num_experts: int
  devices: int


def block_rows(sizes: ExchangeSizes, factor: float) -> int:
  """Rows from one device to another: `factor` over the balanced T K / U.

  But no more than can be: a token's experts differ.
  """
  balanced = sizes.tokens * sizes.slots / sizes.devices
  return min(math.ceil(factor * balanced), _most_rows(sizes))


def buffer_rows(sizes: ExchangeSizes, factor: float) -> int:
  """Rows that one device receives of all: `factor` over the balanced T K."""
  balanced = sizes.tokens * sizes.slots
  return min(math.ceil(factor * balanced), sizes.devices * _most_rows(sizes))


def queue_rows(sizes: ExchangeSizes, factor: float) -> int:
  """Rows from one device to one expert: its capacity."""
  return math.ceil(factor * sizes.tokens * sizes.slots / sizes.num_experts)


def gather_bytes(sizes: ExchangeSizes, row_bytes: int) -> float:
  """Bytes that a device sends when every token goes to every device.

  There and, summed up, back. Of every slot its expert and its weight travel,
  4 bytes each.

  Args:
    sizes: of the exchange.
    row_bytes: of a hidden state.
  """
  others = sizes.devices - 1
  return others * sizes.tokens * (2 * row_bytes + 8 * sizes.slots)


def block_bytes(sizes: ExchangeSizes, row_bytes: int, factor: float) -> float:
  """Bytes that a device sends in blocks of one size to every other device."""
  return 2 * (sizes.devices - 1) * block_rows(sizes, factor) * row_bytes


def queue_bytes(sizes: ExchangeSizes, row_bytes: int, factor: float) -> float:
  """Bytes that a device sends in queues of one size to the others' experts."""
  others = sizes.num_experts * (sizes.devices - 1) / sizes.devices
  return 2 * others * queue_rows(sizes, factor) * row_bytes


def ragged_bytes(sizes: ExchangeSizes, row_bytes: int) -> float:
  """Bytes that a device sends when the used rows alone travel, balanced."""
  others = (sizes.devices - 1) / sizes.devices
  return 2 * others * sizes.tokens * sizes.slots * row_bytes


def _most_rows(sizes: ExchangeSizes) -> int:
  return sizes.tokens * min(sizes.slots, sizes.num_experts // sizes.devices)
