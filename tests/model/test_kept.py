"""What the backward pass keeps of layers, beside the parameters themselves."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from ml_collections import ConfigDict

from moe_jax.config import MESH_AXES
from moe_jax.model.decoder import Decoder
from moe_jax.parallel import mesh as mesh_lib
from tests.helpers import tiny


def kept(
  config: ConfigDict, axes: dict[str, int], rows: int = 8
) -> Iterator[Any]:
  """The residuals of a decoder, that are not parameters as they are stored."""
  mesh = None
  if axes:
    shape = dict.fromkeys(MESH_AXES, 1) | axes
    mesh = mesh_lib.make_mesh(shape, jax.devices())
  graphdef, params = nnx.split(
    nnx.eval_shape(
      lambda: Decoder(config, tiny.VOCAB, mesh, rngs=nnx.Rngs(params=0))
    )
  )
  ids_BL = jnp.zeros((rows, config.data.seq_len), jnp.int32)

  def run(params: nnx.State) -> jax.Array:
    return nnx.merge(graphdef, params).hidden(ids_BL, ids_BL == 0).x_BLD

  residuals = jax.eval_shape(lambda params: jax.vjp(run, params)[1], params)
  left = [(a.shape, a.dtype) for a in jax.tree.leaves(params)]
  for array in jax.tree.leaves(residuals):
    if (array.shape, array.dtype) in left:
      left.remove((array.shape, array.dtype))
    else:
      yield array


def elements(arrays: Iterator[Any]) -> int:
  return sum(
    array.size for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)
  )


ACROSS = {'fsdp': 2, 'expert': 4}
# So large that a copy of their weights is larger than all else.
LARGE = {'moe.expert_width': 512, 'moe.num_experts': 8, 'model.ffn_width': 512}


@pytest.mark.parametrize(
  'axes, dispatch, activation',
  [
    ({}, 'dropless', 'swiglu'),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ({}, 'dropless', 'relu'),
        ({}, 'capacity', 'relu'),
        (ACROSS, 'dropless', 'relu'),
        ({}, 'capacity', 'swiglu'),
        (ACROSS, 'dropless', 'swiglu'),
        (ACROSS, 'capacity', 'swiglu'),
        (ACROSS, 'capacity', 'relu'),
      )
    ),
  ],
)
def test_no_weights_are_kept_but_as_they_are_stored(
  axes: dict[str, int], dispatch: str, activation: str
) -> None:
  config = tiny.config(
    **LARGE,
    **{
      'model.dtype': 'bfloat16',
      'model.activation': activation,
      'moe.dispatch': dispatch,
      'moe.every': 2,
    },
  )
  eight, sixteen = (elements(kept(config, axes, rows)) for rows in (8, 16))
  fixed = eight - (sixteen - eight)
  experts = 2 * 8 * 512 * 32  # of the smaller kind of experts
  assert fixed < experts / 4


def test_of_a_layer_only_what_products_need_is_kept() -> None:
  config = tiny.config(**{'model.num_layers': 1})
  batch, width = 8, config.model.hidden_size
  tokens = batch * config.data.seq_len
  # What is as wide as a token is the rest of it: no scores or tables.
  wide = [a.size for a in kept(config, {}, batch) if a.size >= tokens * width]
  assignments, hidden = config.moe.top_k, config.moe.expert_width
  experts = assignments * (width + 2 * hidden)  # in, gate and up
  attention = 4 * width  # queries, keys, values, and what they come to
  norms = 2 * 2 * width  # in and out
  last = width  # what the last norm reads
  assert sum(wide) == tokens * (experts + attention + norms + last)
