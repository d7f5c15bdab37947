"""Looking tokens up in a table that eight devices share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.model import embedding
from moe_jax.parallel import mesh as mesh_lib


@pytest.mark.parametrize(
  'axes',
  [
    {'fsdp': 8},
    {'expert': 8},
    {'data': 2, 'fsdp': 2, 'context': 2},
    {'fsdp': 2, 'expert': 2, 'tensor': 2},
  ],
)
def test_rows_and_gradients_on_eight_devices(axes: dict[str, int]) -> None:
  shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | axes
  mesh = mesh_lib.make_mesh(shape, jax.devices())
  rng = np.random.default_rng(0)
  table_VD = rng.normal(size=(10, 16)).astype(np.float32)
  ids_BL = rng.integers(10, size=(8, 3))
  weights_BLD = rng.normal(size=(8, 3, 16)).astype(np.float32)

  def weighted(table_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BLD = embedding.look_up(table_VD, jnp.asarray(ids_BL), mesh=mesh)
    return (x_BLD * weights_BLD).sum(), x_BLD

  stored = jax.device_put(table_VD, NamedSharding(mesh, P(None, 'fsdp')))
  grad_VD, x_BLD = jax.jit(jax.grad(weighted, has_aux=True))(stored)
  np.testing.assert_array_equal(x_BLD, table_VD[ids_BL])
  expected_VD = np.zeros((10, 16))
  np.add.at(expected_VD, ids_BL, weights_BLD)
  np.testing.assert_allclose(grad_VD, expected_VD, rtol=1e-5, atol=1e-6)
