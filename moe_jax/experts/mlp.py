"""What experts compute: SwiGLU or ReLU networks, one alone or N stacked.

SwiGLU is the published models' choice. The enwik8 and WikiText-103 settings of
RMoE (arXiv 2408.06793) have ReLU networks with biases in its place.
"""

import dataclasses
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.experts.dispatch import Experts
from moe_jax.experts.dropout import dropout, dropout_rows
from moe_jax.experts.grouped_matmul import GroupedMatmul, TunedMatmul
from moe_jax.experts.permute import weighed
from moe_jax.experts.remat import remat_method
from moe_jax.parameter import EMBED, EXPERT, MLP, param

_BY_PLATFORM = TunedMatmul()  # needs no package

# What backward keeps of a feed-forward goes by this name: hidden units before
# the activation for SwiGLU, after it for ReLU.
HIDDEN = 'feed_forward_hidden'

# (x [..., D], weights_NDF) -> [..., F]: every row times its expert's weights.
_Multiply = Callable[[jax.Array, jax.Array], jax.Array]
# bias_NF -> [..., F]: every row's expert's bias.
_Spread = Callable[[jax.Array], jax.Array]


class SwiGLU(nnx.Module):
  """`down(silu(gate(x)) * up(x))`, without biases.

  Attributes:
    gate_up_D2F: float32, the gate and the up projection.
    down_FD: float32, the down projection.
    dropout: The dropout rate of hidden units.
  """

  def __init__(
    self,
    hidden_size: int,
    width: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
    out_std: float | None = None,
    dropout: float = 0.0,
  ):
    init = nnx.initializers.normal(init_std)
    out_init = init if out_std is None else nnx.initializers.normal(out_std)
    self.gate_up_D2F = param(
      init(rngs.params(), (hidden_size, 2, width), jnp.float32),
      (EMBED, None, MLP),
      decay=True,
    )
    self.down_FD = param(
      out_init(rngs.params(), (width, hidden_size), jnp.float32),
      (MLP, EMBED),
      decay=True,
    )
    self.dropout = dropout

  @remat_method(HIDDEN)
  def __call__(
    self, x_TD: jax.Array, rng: jax.Array | None = None
  ) -> jax.Array:
    gate_up_D2F = self.gate_up_D2F[...].astype(x_TD.dtype)
    # One matmul each: joined, the product would be sliced, and the gradient of
    # a slice of activations costs more than the second matmul saves.
    gate_TF = checkpoint_name(x_TD @ gate_up_D2F[:, 0], HIDDEN)
    up_TF = checkpoint_name(x_TD @ gate_up_D2F[:, 1], HIDDEN)
    hidden_TF = dropout(jax.nn.silu(gate_TF) * up_TF, self.dropout, rng)
    return hidden_TF @ self.down_FD[...].astype(x_TD.dtype)


class ExpertsBase(nnx.Module):
  """N stacked experts; see `moe_jax.experts.dispatch.Experts`.

  Attributes:
    down_NFD: float32, the down projections, which all kinds of experts have.
    num_units: F of a whole expert; one device may hold a part of it.
    dropout: The dropout rate of hidden units.
    multiply: The grouped matmul.
  """

  down_NFD: nnx.Param

  def __init__(self, num_units: int, dropout: float, multiply: GroupedMatmul):
    self.num_units = num_units
    self.dropout = dropout
    self.multiply = multiply

  @property
  def num_experts(self) -> int:
    """N, or on one device of several the number of experts there."""
    return self.down_NFD.shape[0]

  def unshard(self, dtype: jnp.dtype) -> Self:
    """Returns the experts as they are: nothing has to be gathered."""
    del dtype
    return self

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
    down_NFD: float32, their down projections.
  """

  def __init__(
    self,
    num_experts: int,
    hidden_size: int,
    width: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
    out_std: float | None = None,
    dropout: float = 0.0,
    multiply: GroupedMatmul = _BY_PLATFORM,
  ):
    super().__init__(width, dropout, multiply)
    init = nnx.initializers.normal(init_std)
    out_init = init if out_std is None else nnx.initializers.normal(out_std)
    self.gate_up_ND2F = param(
      init(rngs.params(), (num_experts, hidden_size, 2, width), jnp.float32),
      (EXPERT, EMBED, None, MLP),
      decay=True,
    )
    self.down_NFD = param(
      out_init(rngs.params(), (num_experts, width, hidden_size), jnp.float32),
      (EXPERT, MLP, EMBED),
      decay=True,
    )

  @remat_method(HIDDEN)
  def grouped(
    self,
    rows_MD: jax.Array,
    sizes_N: jax.Array,
    seeds_M: jax.Array | None = None,
    weights_M: jax.Array | None = None,
    first_unit: jax.Array | int = 0,
  ) -> jax.Array:
    """Computes rows sorted by expert, `sizes_N` of them each; see `Experts`.

    Args:
      rows_MD: The rows, in the dtype of the arithmetic.
      sizes_N: int32, the number of rows of each expert.
      seeds_M: uint32, the seed of each row's dropout; None for no dropout.
      weights_M: float32, what each row's output is multiplied by; None for 1.
      first_unit: The number of the first hidden unit on this device.
    """
    gate_up_ND2F = self.gate_up_ND2F[...].astype(rows_MD.dtype)
    num_experts, hidden_size, _, width = gate_up_ND2F.shape
    flat_NDF = gate_up_ND2F.reshape(num_experts, hidden_size, 2 * width)
    gate_up_MF = self.multiply(rows_MD, flat_NDF, sizes_N)
    gate_up_MF = checkpoint_name(gate_up_MF, HIDDEN)
    gate_MF, up_MF = jnp.split(gate_up_MF, 2, axis=-1)
    hidden_MF = self._drop(jax.nn.silu(gate_MF) * up_MF, seeds_M, first_unit)
    hidden_MF = weighed(hidden_MF, weights_M)
    down_NFD = self.down_NFD[...].astype(rows_MD.dtype)
    return self.multiply(hidden_MF, down_NFD, sizes_N)

  @remat_method(HIDDEN)
  def batched(
    self,
    rows_NCD: jax.Array,
    seeds_NC: jax.Array | None = None,
    first_unit: jax.Array | int = 0,
  ) -> jax.Array:
    """Computes C rows for every expert, by one batched matmul each way."""
    gate_up_ND2F = self.gate_up_ND2F[...].astype(rows_NCD.dtype)
    gate_up_2NCF = jnp.einsum('NCD,NDgF->gNCF', rows_NCD, gate_up_ND2F)
    gate_NCF, up_NCF = checkpoint_name(gate_up_2NCF, HIDDEN)
    hidden_NCF = self._drop(
      jax.nn.silu(gate_NCF) * up_NCF, seeds_NC, first_unit
    )
    down_NFD = self.down_NFD[...].astype(rows_NCD.dtype)
    return jnp.einsum('NCF,NFD->NCD', hidden_NCF, down_NFD)


class ReLUMLP(nnx.Module):
  """`relu(x up + up_bias) down + down_bias`.

  Attributes:
    up_DF: float32, the up projection.
    up_bias_F: float32, its bias.
    down_FD: float32, the down projection.
    down_bias_D: float32, its bias.
    dropout: The dropout rate of hidden units.
  """

  def __init__(
    self,
    hidden_size: int,
    width: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
    out_std: float | None = None,
    dropout: float = 0.0,
  ):
    init = nnx.initializers.normal(init_std)
    out_init = init if out_std is None else nnx.initializers.normal(out_std)
    self.up_DF = param(
      init(rngs.params(), (hidden_size, width), jnp.float32),
      (EMBED, MLP),
      decay=True,
    )
    self.up_bias_F = param(jnp.zeros((width,), jnp.float32))
    self.down_FD = param(
      out_init(rngs.params(), (width, hidden_size), jnp.float32),
      (MLP, EMBED),
      decay=True,
    )
    self.down_bias_D = param(jnp.zeros((hidden_size,), jnp.float32))
    self.dropout = dropout

  @remat_method(HIDDEN)
  def __call__(
    self, x_TD: jax.Array, rng: jax.Array | None = None
  ) -> jax.Array:
    up_DF, up_bias_F, down_FD, down_bias_D = (
      weight[...].astype(x_TD.dtype)
      for weight in (self.up_DF, self.up_bias_F, self.down_FD, self.down_bias_D)
    )
    hidden_TF = jax.nn.relu(x_TD @ up_DF + up_bias_F)
    hidden_TF = checkpoint_name(hidden_TF, HIDDEN)
    return dropout(hidden_TF, self.dropout, rng) @ down_FD + down_bias_D


class ReLUExperts(ExpertsBase):
  """N ReLU experts, stacked.

  Attributes:
    up_NDF: float32, the up projection of every expert.
    up_bias_NF: float32, its bias.
    down_NFD: float32, the down projection of every expert.
    down_bias_ND: float32, its bias.
  """

  def __init__(
    self,
    num_experts: int,
    hidden_size: int,
    width: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
    out_std: float | None = None,
    dropout: float = 0.0,
    multiply: GroupedMatmul = _BY_PLATFORM,
  ):
    super().__init__(width, dropout, multiply)
    init = nnx.initializers.normal(init_std)
    out_init = init if out_std is None else nnx.initializers.normal(out_std)
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
      out_init(rngs.params(), (num_experts, width, hidden_size), jnp.float32),
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
    weights_M: jax.Array | None = None,
    first_unit: jax.Array | int = 0,
  ) -> jax.Array:
    """Computes rows sorted by expert; see `SwiGLUExperts.grouped`."""
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
      weights_M,
    )

  @remat_method(HIDDEN)
  def batched(
    self,
    rows_NCD: jax.Array,
    seeds_NC: jax.Array | None = None,
    first_unit: jax.Array | int = 0,
  ) -> jax.Array:
    """Computes C rows for every expert; see `SwiGLUExperts.batched`."""
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
    weights_M: jax.Array | None = None,
  ) -> jax.Array:
    up_NDF, up_bias_NF, down_NFD, down_bias_ND = (
      weight[...].astype(x.dtype)
      for weight in (
        self.up_NDF,
        self.up_bias_NF,
        self.down_NFD,
        self.down_bias_ND,
      )
    )
    hidden = jax.nn.relu(multiply(x, up_NDF) + spread(up_bias_NF))
    hidden = checkpoint_name(hidden, HIDDEN)
    hidden = self._drop(hidden, seeds, first_unit)
    bias = weighed(spread(down_bias_ND), weights_M)
    return multiply(weighed(hidden, weights_M), down_NFD) + bias


@dataclasses.dataclass(frozen=True)
class ExpertsInPlace:
  """The N experts of one period among those of P, whose weights stay there.

  The P N experts of all periods are one grouped matmul of as many groups, all
  but N of them empty. One that loads the weights of groups with rows alone so
  needs no copy of a period's, which for few rows is most of the work.

  Attributes:
    stacked: The experts, every parameter with a leading axis [P].
    period: Which period's are meant, int32.
  """

  stacked: Experts
  period: jax.Array

  @property
  def num_experts(self) -> int:
    """N."""
    return jax.tree.leaves(nnx.split(self.stacked)[1])[0].shape[1]

  def grouped(
    self,
    rows_MD: jax.Array,
    sizes_N: jax.Array,
    seeds_M: jax.Array | None,
    weights_M: jax.Array | None = None,
  ) -> jax.Array:
    """Computes sorted rows; see `moe_jax.experts.dispatch.Experts`."""
    joined = self._with(lambda a: a.reshape(-1, *a.shape[2:]))
    none = jnp.zeros(joined.num_experts, sizes_N.dtype)
    first = self.period * self.num_experts
    sizes = lax.dynamic_update_slice_in_dim(none, sizes_N, first, 0)
    return joined.grouped(rows_MD, sizes, seeds_M, weights_M)

  def batched(
    self, rows_NCD: jax.Array, seeds_NC: jax.Array | None
  ) -> jax.Array:
    """Computes C rows for every expert, from a copy of their weights."""
    own = self._with(lambda a: a[self.period])
    return own.batched(rows_NCD, seeds_NC)

  def unshard(self, dtype: jnp.dtype) -> 'ExpertsInPlace':
    """Returns the experts as they are: one device has them all."""
    del dtype
    return self

  def _with(self, change: Callable[[jax.Array], jax.Array]) -> Experts:
    """Returns the experts with every parameter changed."""
    graphdef, params = nnx.split(self.stacked)
    return nnx.merge(graphdef, jax.tree.map(change, params))
