"""Facts about devices, which decide what can be compiled for them."""

import re

import jax

# TPU v5e, beyond so many chips.
_LIMITED_KIND, _LIMITED_BEYOND = 'TPU v5 lite', 16


def limited_routing(device: jax.Device, count: int) -> bool:
  """Returns whether so many of a device are a slice of "limited ICI routing".

  For these libtpu 0.0.42 compiles no ragged all-to-all, and no other one that
  goes on beside computation. Several smaller slices count as one.
  """
  return device.device_kind == _LIMITED_KIND and count > _LIMITED_BEYOND


def capability(device: jax.Device) -> tuple[int, ...]:
  """Returns CUDA's compute capability.

  It is () of what has none, as AMD's 'gfx942'.
  """
  name = getattr(device, 'compute_capability', '')
  if not re.fullmatch(r'\d+(\.\d+)*', name):
    return ()
  return tuple(map(int, name.split('.')))
