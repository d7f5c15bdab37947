"""Dispatches across eight devices, made as a model makes them."""

from typing import Any

import jax

from moe_jax.model import implementations
from moe_jax.parallel import mesh as mesh_lib
from tests.helpers import tiny

N = 8
MESHES = {
  'expert 8': {'expert': 8},
  'data 2, expert 4': {'data': 2, 'expert': 4},
  'fsdp 2, expert 2, context 2': {'fsdp': 2, 'expert': 2, 'context': 2},
  'fsdp 2, expert 2, tensor 2': {'fsdp': 2, 'expert': 2, 'tensor': 2},
  'expert 2, tensor 4': {'expert': 2, 'tensor': 4},
}


def across(
  axes: dict[str, int], exchange: str, num_experts: int = N, **moe: Any
) -> Any:
  """The dispatch on a mesh, from the same registry as a model's."""
  shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | axes
  mesh = mesh_lib.make_mesh(shape, jax.devices())
  # With so much capacity nothing is dropped.
  settings = {'num_experts': num_experts, 'capacity_factor': float(num_experts)}
  config = tiny.config(
    **{f'moe.{key}': value for key, value in (settings | moe).items()}
  )
  return implementations.across(config, mesh, exchange)
