"""Looking tokens up in a table that several devices share."""

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.parallel import mesh as mesh_lib


def look_up(
  table_VD: jax.Array, token_ids_BL: jax.Array, *, mesh: Mesh | None
) -> jax.Array:
  """Returns `table_VD[token_ids_BL]`, [B, L, D].

  Every device looks up its own tokens. It needs the whole table for that; the
  gradient is scattered over `fsdp` while it is summed. The partitioner would
  look up parts of D of all tokens, or, told to gather the table, sum its
  gradient up whole on every device.

  Args:
    table_VD: The table, split by D over `fsdp`.
    token_ids_BL: The indices, int32, split by B over the token axes.
    mesh: Where the arrays are; None for one device.
  """
  if mesh is None or mesh.size == 1:
    return table_VD[token_ids_BL]

  def local(table_VD: jax.Array, token_ids_BL: jax.Array) -> jax.Array:
    table_VD = lax.pcast(table_VD, mesh_lib.REPEATED_AXES, to='varying')
    if mesh.shape[mesh_lib.FSDP] > 1:
      table_VD = lax.all_gather(table_VD, mesh_lib.FSDP, axis=1, tiled=True)
    return table_VD[token_ids_BL]

  tokens = P(mesh_lib.TOKEN_AXES)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(P(None, mesh_lib.FSDP), tokens),
    out_specs=tokens,
    check_vma=True,
  )(table_VD, token_ids_BL)
