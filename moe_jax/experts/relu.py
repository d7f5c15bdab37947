"""ReLU networks with biases: one, or a bank of them.

What the enwik8 and WikiText-103 settings of RMoE (arXiv 2408.06793) use in the
place of SwiGLU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax.experts.dropout import dropout
from moe_jax.experts.feed_forward import HIDDEN, StackedExperts
from moe_jax.experts.grouped_matmul import Chosen, Multiply
from moe_jax.experts.recomputed import recomputed

_BY_PLATFORM = Chosen()  # needs no package

# x [..., D] times a bank of weights [N, D, F], every row with its expert's.
_Multiply = Callable[[jax.Array, jax.Array], jax.Array]
# A bank of biases [N, F] -> [..., F], every row's expert's.
_Spread = Callable[[jax.Array], jax.Array]


class ReluFeedForward(nnx.Module):
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
    self.up_DF = nnx.Param(
      init(rngs.params(), (hidden_size, width), jnp.float32)
    )
    self.up_bias_F = nnx.Param(jnp.zeros((width,), jnp.float32))
    self.down_FD = nnx.Param(
      init(rngs.params(), (width, hidden_size), jnp.float32)
    )
    self.down_bias_D = nnx.Param(jnp.zeros((hidden_size,), jnp.float32))
    self.dropout = dropout

  @recomputed(HIDDEN)
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


class ReluExpertBank(StackedExperts):
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
    multiply: Multiply = _BY_PLATFORM,
  ):
    super().__init__(width, dropout, multiply)
    init = nnx.initializers.normal(init_std)
    self.up_NDF = nnx.Param(
      init(rngs.params(), (num_experts, hidden_size, width), jnp.float32)
    )
    self.up_bias_NF = nnx.Param(jnp.zeros((num_experts, width), jnp.float32))
    self.down_NFD = nnx.Param(
      init(rngs.params(), (num_experts, width, hidden_size), jnp.float32)
    )
    self.down_bias_ND = nnx.Param(
      jnp.zeros((num_experts, hidden_size), jnp.float32)
    )

  @recomputed(HIDDEN)
  def grouped(
    self,
    rows_MD: jax.Array,
    sizes_N: jax.Array,
    seeds_M: jax.Array | None = None,
    first_unit: jax.Array | int = 0,
  ) -> jax.Array:
    """As `ExpertBank.grouped`."""
    ends_N = jnp.cumsum(sizes_N)
    row_M1 = jnp.arange(len(rows_MD))[:, None]
    member_MN = (row_M1 >= ends_N - sizes_N) & (row_M1 < ends_N)
    member_MN = member_MN.astype(rows_MD.dtype)
    return self._apply(
      rows_MD,
      lambda x, bank_NDF: self.multiply(x, bank_NDF, sizes_N),
      # A matmul, because the gradient of a look-up would be a scatter.
      lambda bias_NF: member_MN @ bias_NF,
      seeds_M,
      first_unit,
    )

  @recomputed(HIDDEN)
  def batched(
    self,
    rows_NCD: jax.Array,
    seeds_NC: jax.Array | None = None,
    first_unit: jax.Array | int = 0,
  ) -> jax.Array:
    """As `ExpertBank.batched`."""
    return self._apply(
      rows_NCD,
      lambda x, bank_NDF: jnp.einsum('NCD,NDF->NCF', x, bank_NDF),
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
