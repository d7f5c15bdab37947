"""What experts compute: one SwiGLU network, or a bank of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax.experts.dropout import dropout, dropout_rows
from moe_jax.experts.grouped_matmul import GroupedMatmul, TunedMatmul
from moe_jax.experts.remat import remat_method
from moe_jax.parameter import EMBED, EXPERT, MLP, param

_BY_PLATFORM = TunedMatmul()  # needs no package

# Name of what backward keeps of a feed-forward: before the activation for
# SwiGLU, after it for ReLU.
HIDDEN = 'feed_forward_hidden'


class SwiGLU(nnx.Module):
  """`down(silu(gate(x)) * up(x))`, without biases.

  Attributes:
    gate_up_D2F: float32, the gate and the up projection.
    down_FD: float32, the projection back.
  """

  def __init__(
    self,
    hidden_size: int,
    width: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
    dropout: float = 0.0,
  ):
    init = nnx.initializers.normal(init_std)
    self.gate_up_D2F = param(
      init(rngs.params(), (hidden_size, 2, width), jnp.float32),
      (EMBED, None, MLP),
      decay=True,
    )
    self.down_FD = param(
      init(rngs.params(), (width, hidden_size), jnp.float32),
      (MLP, EMBED),
      decay=True,
    )
    self.dropout = dropout

  @remat_method(HIDDEN)
  def __call__(
    self, x_TD: jax.Array, key: jax.Array | None = None
  ) -> jax.Array:
    gate_up_D2F = self.gate_up_D2F[...].astype(x_TD.dtype)
    # One matmul each: joined, the product would be sliced, and the gradient of
    # a slice of activations costs more than the second matmul saves.
    gate_TF = checkpoint_name(x_TD @ gate_up_D2F[:, 0], HIDDEN)
    up_TF = checkpoint_name(x_TD @ gate_up_D2F[:, 1], HIDDEN)
    hidden_TF = dropout(jax.nn.silu(gate_TF) * up_TF, self.dropout, key)
    return hidden_TF @ self.down_FD[...].astype(x_TD.dtype)


class ExpertsBase(nnx.Module):
  """What all banks of N experts have in common.

  Attributes:
    num_units: F of a whole expert; a shard may hold a part.
    dropout: of hidden units.
    multiply: the grouped matmul.
  """

  def __init__(self, num_units: int, dropout: float, multiply: GroupedMatmul):
    self.num_units = num_units
    self.dropout = dropout
    self.multiply = multiply

  @property
  def num_experts(self) -> int:
    """Experts in this bank; on a shard, those that live there."""
    return self.down_NFD.shape[0]

  def _drop(
    self,
    hidden: jax.Array,
    seeds: jax.Array | None,
    first_unit: jax.Array | int,
  ) -> jax.Array:
    return dropout_rows(
      hidden,
      self.dropout,
      seeds,
      num_units=self.num_units,
      first_unit=first_unit,
    )


class SwiGLUExperts(ExpertsBase):
  """N SwiGLU experts, stacked.

  Attributes:
    gate_up_ND2F: float32, the gate and up projections of every expert.
    down_NFD: float32, the projections back.
  """

  def __init__(
    self,
    num_experts: int,
    hidden_size: int,
    width: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
    dropout: float = 0.0,
    multiply: GroupedMatmul = _BY_PLATFORM,
  ):
    super().__init__(width, dropout, multiply)
    init = nnx.initializers.normal(init_std)
    self.gate_up_ND2F = param(
      init(rngs.params(), (num_experts, hidden_size, 2, width), jnp.float32),
      (EXPERT, EMBED, None, MLP),
      decay=True,
    )
    self.down_NFD = param(
      init(rngs.params(), (num_experts, width, hidden_size), jnp.float32),
      (EXPERT, MLP, EMBED),
      decay=True,
    )

  @remat_method(HIDDEN)
  def grouped(
    self,
    rows_MD: jax.Array,
    sizes_N: jax.Array,
    seeds_M: jax.Array | None = None,
    first_unit: jax.Array | int = 0,
  ) -> jax.Array:
    """Rows sorted by expert, `sizes_N` of them each; see `grouped_matmul`.

    Args:
      rows_MD: sorted.
      sizes_N: int32.
      seeds_M: of every row's dropout; None for none.
      first_unit: see `dropout_rows`.
    """
    gate_up_ND2F = self.gate_up_ND2F[...].astype(rows_MD.dtype)
    num_experts, hidden_size, _, width = gate_up_ND2F.shape
    flat_NDF = gate_up_ND2F.reshape(num_experts, hidden_size, 2 * width)
    gate_up_MF = self.multiply(rows_MD, flat_NDF, sizes_N)
    gate_up_MF = checkpoint_name(gate_up_MF, HIDDEN)
    gate_MF, up_MF = jnp.split(gate_up_MF, 2, axis=-1)
    hidden_MF = self._drop(jax.nn.silu(gate_MF) * up_MF, seeds_M, first_unit)
    down_NFD = self.down_NFD[...].astype(rows_MD.dtype)
    return self.multiply(hidden_MF, down_NFD, sizes_N)

  @remat_method(HIDDEN)
  def batched(
    self,
    rows_NCD: jax.Array,
    seeds_NC: jax.Array | None = None,
    first_unit: jax.Array | int = 0,
  ) -> jax.Array:
    """C rows for every expert, padded or not, as one batched matmul."""
    gate_up_ND2F = self.gate_up_ND2F[...].astype(rows_NCD.dtype)
    gate_up_2NCF = jnp.einsum('NCD,NDgF->gNCF', rows_NCD, gate_up_ND2F)
    gate_NCF, up_NCF = checkpoint_name(gate_up_2NCF, HIDDEN)
    hidden_NCF = self._drop(
      jax.nn.silu(gate_NCF) * up_NCF, seeds_NC, first_unit
    )
    down_NFD = self.down_NFD[...].astype(rows_NCD.dtype)
    return jnp.einsum('NCF,NFD->NCD', hidden_NCF, down_NFD)


# x [..., D] times a bank of weights [N, D, F], every row with its expert's.
_Multiply = Callable[[jax.Array, jax.Array], jax.Array]
# A bank of biases [N, F] -> [..., F], every row's expert's.
_Spread = Callable[[jax.Array], jax.Array]


class ReLUMLP(nnx.Module):
  """`relu(x up + up_bias) down + down_bias`.

  Attributes:
    up_DF, up_bias_F: float32, into the hidden units.
    down_FD, down_bias_D: float32, back.
  """

  def __init__(
    self,
    hidden_size: int,
    width: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
    dropout: float = 0.0,
  ):
    init = nnx.initializers.normal(init_std)
    self.up_DF = param(
      init(rngs.params(), (hidden_size, width), jnp.float32),
      (EMBED, MLP),
      decay=True,
    )
    self.up_bias_F = param(jnp.zeros((width,), jnp.float32))
    self.down_FD = param(
      init(rngs.params(), (width, hidden_size), jnp.float32),
      (MLP, EMBED),
      decay=True,
    )
    self.down_bias_D = param(jnp.zeros((hidden_size,), jnp.float32))
    self.dropout = dropout

  @remat_method(HIDDEN)
  def __call__(
    self, x_TD: jax.Array, key: jax.Array | None = None
  ) -> jax.Array:
    up_DF, up_bias_F, down_FD, down_bias_D = (
      param[...].astype(x_TD.dtype)
      for param in (self.up_DF, self.up_bias_F, self.down_FD, self.down_bias_D)
    )
    hidden_TF = jax.nn.relu(x_TD @ up_DF + up_bias_F)
    hidden_TF = checkpoint_name(hidden_TF, HIDDEN)
    return dropout(hidden_TF, self.dropout, key) @ down_FD + down_bias_D


class ReLUExperts(ExpertsBase):
  """N ReLU experts, stacked.

  Attributes:
    up_NDF, up_bias_NF: float32, into every expert's hidden units.
    down_NFD, down_bias_ND: float32, back.
  """

  def __init__(
    self,
    num_experts: int,
    hidden_size: int,
    width: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
    dropout: float = 0.0,
    multiply: GroupedMatmul = _BY_PLATFORM,
  ):
    super().__init__(width, dropout, multiply)
    init = nnx.initializers.normal(init_std)
    self.up_NDF = param(
      init(rngs.params(), (num_experts, hidden_size, width), jnp.float32),
      (EXPERT, EMBED, MLP),
      decay=True,
    )
    self.up_bias_NF = param(
      jnp.zeros((num_experts, width), jnp.float32),
      (EXPERT, MLP),
    )
    self.down_NFD = param(
      init(rngs.params(), (num_experts, width, hidden_size), jnp.float32),
      (EXPERT, MLP, EMBED),
      decay=True,
    )
    self.down_bias_ND = param(
      jnp.zeros((num_experts, hidden_size), jnp.float32),
      (EXPERT, EMBED),
    )

  @remat_method(HIDDEN)
  def grouped(
    self,
    rows_MD: jax.Array,
    sizes_N: jax.Array,
    seeds_M: jax.Array | None = None,
    first_unit: jax.Array | int = 0,
  ) -> jax.Array:
    """As `SwiGLUExperts.grouped`."""
    ends_N = jnp.cumsum(sizes_N)
    row_M1 = jnp.arange(len(rows_MD))[:, None]
    member_MN = (row_M1 >= ends_N - sizes_N) & (row_M1 < ends_N)
    member_MN = member_MN.astype(rows_MD.dtype)
    return self._apply(
      rows_MD,
      lambda x, weights_NDF: self.multiply(x, weights_NDF, sizes_N),
      # A matmul, because the gradient of a look-up would be a scatter.
      lambda bias_NF: member_MN @ bias_NF,
      seeds_M,
      first_unit,
    )

  @remat_method(HIDDEN)
  def batched(
    self,
    rows_NCD: jax.Array,
    seeds_NC: jax.Array | None = None,
    first_unit: jax.Array | int = 0,
  ) -> jax.Array:
    """As `SwiGLUExperts.batched`."""
    return self._apply(
      rows_NCD,
      lambda x, weights_NDF: jnp.einsum('NCD,NDF->NCF', x, weights_NDF),
      lambda bias_NF: bias_NF[:, None],
      seeds_NC,
      first_unit,
    )

  def _apply(
    self,
    x: jax.Array,
    multiply: _Multiply,
    spread: _Spread,
    seeds: jax.Array | None,
    first_unit: jax.Array | int,
  ) -> jax.Array:
    up_NDF, up_bias_NF, down_NFD, down_bias_ND = (
      param[...].astype(x.dtype)
      for param in (
        self.up_NDF,
        self.up_bias_NF,
        self.down_NFD,
        self.down_bias_ND,
      )
    )
    hidden = jax.nn.relu(multiply(x, up_NDF) + spread(up_bias_NF))
    hidden = checkpoint_name(hidden, HIDDEN)
    hidden = self._drop(hidden, seeds, first_unit)
    return multiply(hidden, down_NFD) + spread(down_bias_ND)
