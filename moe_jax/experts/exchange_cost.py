"""How many rows an exchange has room for, and how many bytes it sends.

U devices share the experts; each has T tokens with K assignments each, and
N / U experts. This is plain arithmetic on numbers, for plans and for the
exchanges themselves.
"""

import math
from typing import NamedTuple


class ExchangeSizes(NamedTuple):
  """What devices along the expert axis exchange in one MoE sub-layer.

  Attributes:
    tokens: T, the tokens of one device.
    top_k: K, the assignments of a token.
    num_experts: N, the experts of all devices.
    devices: U, the devices along the expert axis.
  """

  tokens: int
  top_k: int
  num_experts: int
  devices: int


class Room(NamedTuple):
  """How many rows the buffers of an exchange hold.

  Attributes:
    rows: That a device receives from all.
    block: That it receives from one of them.
  """

  rows: int
  block: int


def blocks(sizes: ExchangeSizes, factor: float) -> Room:
  """Returns the room of an exchange in blocks.

  How many rows come from one device varies more than how many come from all,
  and those are computed and kept: of what blocks have to spare, `factor` - 1
  times the balanced share, a device has half for its rows.
  """
  block = block_rows(sizes, factor)
  rows = math.ceil((1 + factor) / 2 * sizes.tokens * sizes.top_k)
  return Room(min(rows, sizes.devices * block), block)


def buffer(sizes: ExchangeSizes, factor: float) -> Room:
  """Returns the room of an exchange into one buffer for all devices' rows."""
  rows = buffer_rows(sizes, factor)
  return Room(rows, rows)


def block_rows(sizes: ExchangeSizes, factor: float) -> int:
  """Returns the room for rows from one device to another.

  It is `factor` times the balanced share T K / U, but no more than can be: a
  token's experts differ.
  """
  balanced = sizes.tokens * sizes.top_k / sizes.devices
  return min(math.ceil(factor * balanced), _most_rows(sizes))


def buffer_rows(sizes: ExchangeSizes, factor: float) -> int:
  """Returns the room for rows that one device receives from all.

  It is `factor` times the balanced share T K, but no more than can be.
  """
  balanced = sizes.tokens * sizes.top_k
  return min(math.ceil(factor * balanced), sizes.devices * _most_rows(sizes))


def capacity_rows(sizes: ExchangeSizes, factor: float) -> int:
  """Returns the room for rows from one device to one expert: its capacity."""
  return math.ceil(factor * sizes.tokens * sizes.top_k / sizes.num_experts)


def all_gather_bytes(sizes: ExchangeSizes, row_bytes: int) -> float:
  """Returns the bytes that a device sends when all tokens go to all devices.

  The tokens go there and, summed up, back. Of every assignment its expert and
  its weight travel, 4 bytes each.

  Args:
    sizes: The sizes of the exchange.
    row_bytes: The bytes of a hidden state.
  """
  others = sizes.devices - 1
  return others * sizes.tokens * (2 * row_bytes + 8 * sizes.top_k)


def block_bytes(sizes: ExchangeSizes, row_bytes: int, factor: float) -> float:
  """Returns the bytes that a device sends in equal blocks to all others.

  Beside the rows, there and back, the numbers of rows for every expert travel.
  """
  block = 2 * block_rows(sizes, factor) * row_bytes
  return (sizes.devices - 1) * (block + 4 * sizes.num_experts)


def capacity_bytes(
  sizes: ExchangeSizes, row_bytes: int, factor: float
) -> float:
  """Returns the bytes that a device sends when every expert gets C rows."""
  others = sizes.num_experts * (sizes.devices - 1) / sizes.devices
  return 2 * others * capacity_rows(sizes, factor) * row_bytes


def ragged_bytes(sizes: ExchangeSizes, row_bytes: int) -> float:
  """Returns the bytes that a device sends when the used rows alone travel.

  It counts balanced experts.
  """
  others = (sizes.devices - 1) / sizes.devices
  return 2 * others * sizes.tokens * sizes.top_k * row_bytes


def _most_rows(sizes: ExchangeSizes) -> int:
  return sizes.tokens * min(sizes.top_k, sizes.num_experts // sizes.devices)
