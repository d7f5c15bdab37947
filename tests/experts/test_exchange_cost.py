"""Bytes that exchanges send and memory that they take, in compiled programs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.experts.mlp import SwiGLUExperts
from moe_jax.model import implementations
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning.collectives import collectives, total_bytes
from moe_jax.routing.selection import Routing
from tests.helpers import tiny
from tests.helpers.exchanges import across

# Tokens of one device; assignments, sizes, experts; devices that share these.
T, K, D, F, N, U = 128, 2, 64, 128, 16, 8
FACTOR, CAPACITY = 1.5, 1.25


@functools.cache
def compiled(
  dispatch: str, exchange: str, backward: bool = False
) -> jax.stages.Compiled:
  axes = {'expert': U}
  made = across(
    axes,
    exchange,
    N,
    dispatch=dispatch,
    buffer_factor=FACTOR,
    capacity_factor=CAPACITY,
  )
  graphdef, params = nnx.split(
    nnx.eval_shape(
      lambda: SwiGLUExperts(N, D, F, init_std=1.0, rngs=nnx.Rngs(params=0))
    )
  )

  def forward(x: Any, weights: Any, choice: Any, params: Any) -> jax.Array:
    logits = jnp.zeros((U * T, N))
    routing = Routing(weights, choice, logits, logits)
    return made(x, routing, nnx.merge(graphdef, params)).y_TD

  def gradient(x: Any, weights: Any, choice: Any, params: Any) -> Any:
    def loss(x: Any, weights: Any, params: Any) -> jax.Array:
      return (forward(x, weights, choice, params) ** 2).sum()

    return jax.grad(loss, (0, 1, 2))(x, weights, params)

  def shape(sharding: P, dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(made.mesh, sharding)
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

  tokens, experts = P(mesh_lib.BATCH_AXES), P('expert')
  return (
    jax.jit(gradient if backward else forward)
    .lower(
      shape(tokens, jnp.float32, U * T, D),
      shape(tokens, jnp.float32, U * T, K),
      shape(tokens, jnp.int32, U * T, K),
      jax.tree.map(lambda a: shape(experts, a.dtype, *a.shape), params),
    )
    .compile()
  )


def estimates(dispatch: str) -> dict[str, int]:
  """What the plan says of the same sizes."""
  config = tiny.config(
    **{
      'model.hidden_size': D,
      'data.seq_len': T,
      'train.batch_size': U,
      'moe.num_experts': N,
      'moe.top_k': K,
      'moe.dispatch': dispatch,
      'moe.buffer_factor': FACTOR,
      'moe.capacity_factor': CAPACITY,
    }
  )
  mesh = dict.fromkeys(mesh_lib.MESH_AXES, 1) | {'expert': U}
  return implementations.exchange_bytes(config, mesh, jnp.float32)


@pytest.mark.parametrize(
  'dispatch, exchange',
  [
    ('dropless', 'gather'),
    ('dropless', 'all_to_all'),
    ('capacity', 'all_to_all'),
  ],
)
def test_estimates_are_what_compiled_programs_send(
  dispatch: str, exchange: str
) -> None:
  text = compiled(dispatch, exchange).as_text()
  # Where there is a choice, the branch that sends less: nothing overflows.
  sent = total_bytes(collectives(text, min))
  # Numbers of rows per expert and counts of assignments come on top.
  assert estimates(dispatch)[exchange] == pytest.approx(sent, rel=0.01)
  if (dispatch, exchange) == ('dropless', 'all_to_all'):
    with_gather = total_bytes(collectives(text, max))
    estimate = estimates(dispatch)['gather']
    assert with_gather - sent == pytest.approx(estimate, rel=0.01)


def test_the_estimate_of_ragged_is_of_the_rows_that_leave() -> None:
  """Balanced, all but a share 1 / U of T K assignments, there and back."""
  leaving = T * K * (U - 1) // U
  assert estimates('dropless')['ragged'] == 2 * leaving * D * 4


@pytest.mark.slow
def test_bounded_buffers_need_less_memory_than_the_worst_case() -> None:
  """Though the program holds the slow way too, which it may never go."""
  gather, blocks, ragged = (
    compiled('dropless', exchange, backward=True)
    .memory_analysis()
    .temp_size_in_bytes
    for exchange in ('gather', 'all_to_all', 'ragged')
  )
  # The rows that experts see: 8 T K against 1.5 T K, and T K on the slow way.
  # (The emulation of ragged exchanges holds all devices' rows once more.)
  assert blocks < gather / 2
  assert ragged < gather
