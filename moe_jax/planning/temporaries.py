"""The memory of a training step beside its state, from shapes alone.

Nothing here repeats the model: the model itself is traced, forward and the
start of its backward pass, and what it keeps is added up. As that grows by the
same bytes with every sequence, two traces of one and of two sequences tell it
for any number, and tell activations from copies of weights, which do not grow.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe_jax.config import BATCH_AXES, MESH_AXES, layer_kinds, vocab_rows
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.layer import MoELayer
from moe_jax.model import attention_blocks, implementations, loss
from moe_jax.model.attention_span import BLOCK
from moe_jax.model.build import compute_dtype, make_select, repetition
from moe_jax.model.decoder import Decoder
from moe_jax.parallel import mesh as mesh_lib

_Shape = jax.ShapeDtypeStruct


class Temporaries(NamedTuple):
  """Bytes of one device while it computes the gradient of a micro-batch.

  Attributes:
    activations: What the backward pass needs of the layers, as `model.remat`
      leaves it, and the working set of one period of layers.
    dispatch: The part of both that brings tokens to experts and back: rows of
      tokens, what experts compute of them, and their order.
    logits: The logits of the tokens whose loss is computed together, and their
      gradient.
    weight_copies: Weights in the dtype of the arithmetic that backward keeps.
  """

  activations: int
  dispatch: int
  logits: int
  weight_copies: int


def temporaries(
  config: ConfigDict,
  vocab_size: int,
  mesh: dict[str, int],
  device: jax.Device,
) -> Temporaries:
  """Estimates the `Temporaries`; compilers also share, fuse and copy buffers.

  Args:
    config: A validated config.
    vocab_size: V.
    mesh: The number of devices along every axis; they need not be there.
    device: A device of their kind, which need not be there either.
  """
  alike = mesh_lib.make_mesh(dict.fromkeys(MESH_AXES, 1), [device])
  shards = math.prod(mesh[axis] for axis in BATCH_AXES)
  rows = config.train.batch_size // config.train.accumulation // shards
  one = _one_device(config, mesh[mesh_lib.TENSOR])
  kept, copies = _kept(one, vocab_size, alike)
  whole = kept
  if config.model.remat != 'none':
    light = _changed(one, {'model.remat': 'none'})
    whole, _ = _kept(light, vocab_size, alike)
  alone, dispatch = _dispatches(one, mesh[mesh_lib.EXPERT], alike)
  # The traces are of one device: take its dispatch out, put the mesh's in.
  period, held = _period(config), _kept_layers(config)
  kept -= held * alone
  whole -= layer_kinds(config).count('moe') * alone
  working = whole * len(period) // config.model.num_layers
  held += period.count('moe')
  context = mesh[mesh_lib.CONTEXT]
  # Of attention that axis splits the heads.
  scores = _scores(_one_device(config, mesh[mesh_lib.TENSOR] * context), alike)
  tokens = rows * config.data.seq_len // context
  together = min(tokens, loss.chunk_of(device.platform))
  return Temporaries(
    activations=rows * ((kept + working) // context + scores),
    dispatch=rows * held * dispatch // context,
    logits=together * _logits_of_token(vocab_rows(config, vocab_size), mesh),
    # Of experts, which the expert axis splits, backward keeps no copies.
    weight_copies=copies // mesh[mesh_lib.FSDP],
  )


def _logits_of_token(rows: int, mesh: dict[str, int]) -> int:
  """Returns the bytes of a token's float32 logits, and of their gradient."""
  tensor = mesh[mesh_lib.TENSOR]
  split = tensor if rows % tensor == 0 else 1
  return 2 * 4 * rows // split


def _scores(config: ConfigDict, mesh: jax.sharding.Mesh) -> int:
  """Returns the bytes per sequence that backward needs within one attention.

  They are float32 arrays of the scores of the queries computed together. With a
  span there are four, their gradients, shifted and not; and where blocks of
  queries are recomputed one at a time, so that none is among what is kept, as
  many again. The fours are what compiled programs come to. Rotary attention in
  blocks has scores, weights and the gradients of both; cuDNN's has the mask of
  packed rows, in 16 bits; other implementations have nothing that is not among
  what is kept.
  """
  model, length = config.model, config.data.seq_len
  if model.positions != 'span':
    parts = implementations.resolved(config, mesh.shape, mesh.devices.flat[0])
    if parts['attention'] == 'cudnn' and config.data.order == 'packed':
      return 2 * length**2
    if parts['attention'] != 'blocks':
      return 0
    return (
      4 * 4 * model.num_heads * min(length, attention_blocks.BLOCK) * length
    )
  queries, arrays = (length, 4) if length <= BLOCK else (BLOCK, 8)
  return arrays * 4 * model.num_heads * queries * (model.span + queries)


def _dispatches(
  config: ConfigDict, expert: int, mesh: jax.sharding.Mesh
) -> tuple[int, int]:
  """Returns bytes per sequence and MoE layer, on one device and on so many.

  Each sub-layer has its own dispatch.
  """
  if 'moe' not in layer_kinds(config):
    return 0, 0
  alone = config.moe.factors * _dispatch(config, 1, mesh)
  if expert == 1:
    return alone, alone
  return alone, config.moe.factors * _dispatch(config, expert, mesh)


def _kept_layers(config: ConfigDict) -> int:
  """Returns of how many MoE layers backward keeps all that is computed."""
  kinds = layer_kinds(config)
  if config.model.remat != 'none':
    kinds = kinds[: repetition(kinds, config.moe.every)[0]]
  return kinds.count('moe')


def _period(config: ConfigDict) -> tuple[str, ...]:
  """Returns the kinds of the layers that the scan computes together."""
  kinds = layer_kinds(config)
  first, period = repetition(kinds, config.moe.every)
  return kinds[first : first + period] or kinds[:1]


def _one_device(config: ConfigDict, tensor: int) -> ConfigDict:
  """Returns the model with what the tensor axis splits already split."""
  model, moe = config.model, config.moe
  return _changed(
    config,
    {
      'model.head_dim': model.head_dim or model.hidden_size // model.num_heads,
      'model.num_heads': model.num_heads // tensor,
      'model.num_kv_heads': model.num_kv_heads // tensor,
      'model.ffn_width': model.ffn_width // tensor,
      'moe.expert_width': moe.expert_width // tensor,
      'moe.shared.width': moe.shared.width // tensor,
    },
  )


def _changed(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
  changed = copy.deepcopy(config)
  changed.update_from_flattened_dict(values)
  return changed


def _kept(
  config: ConfigDict, vocab_size: int, mesh: jax.sharding.Mesh
) -> tuple[int, int]:
  """Returns bytes kept per sequence, and of weights in another dtype."""

  def create() -> Any:
    return Decoder(config, vocab_size, mesh, rngs=nnx.Rngs(params=0))

  graphdef = nnx.graphdef(nnx.eval_shape(create))
  params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(create())))

  def residuals(rows: int) -> list[_Shape]:
    ids_BL = jnp.zeros((rows, config.data.seq_len), jnp.int32)

    def run(params: Any) -> Any:
      decoder = nnx.merge(graphdef, params)
      output = decoder.hidden(ids_BL, ids_BL == 0, rng=jax.random.key(0))
      return output.x_BLD, output.aux

    return _residuals(run, params)

  return _growth(residuals, compute_dtype(config, mesh))


def _dispatch(config: ConfigDict, devices: int, mesh: jax.sharding.Mesh) -> int:
  """Returns the bytes that backward keeps per sequence of one dispatch.

  They are those of one device where so many share the experts; the mesh has
  one device of their kind.
  """
  dtype = compute_dtype(config, mesh)
  num_logits = nnx.eval_shape(lambda: make_select(config, 0)).num_logits

  def residuals(rows: int) -> list[_Shape]:
    def run(x_TD: jax.Array, logits_TN: jax.Array) -> Any:
      layer = _moe_layer(config, mesh)
      move = layer.dispatch
      if devices > 1:
        move = _across(config, devices, dtype, mesh.devices.flat[0])
      graphdef, params = nnx.split(layer.experts)

      def dispatch(x_TD: jax.Array, logits_TN: jax.Array, params: Any) -> Any:
        experts = nnx.merge(graphdef, params)
        routing = layer.select(logits_TN).among(experts.num_experts)
        return move(x_TD, routing, experts).y_TD

      return jax.vjp(dispatch, x_TD, logits_TN, params)[1]

    tokens = rows * config.data.seq_len * devices
    x_TD = _Shape((tokens, config.model.hidden_size), dtype)
    logits_TN = _Shape((tokens, num_logits), jnp.float32)
    return jax.tree.leaves(jax.eval_shape(run, x_TD, logits_TN))

  return _growth(residuals, dtype)[0] // devices


def _moe_layer(config: ConfigDict, mesh: jax.sharding.Mesh) -> MoELayer:
  """Returns the first sub-layer of a model with one layer, on one device."""
  one_layer = {
    'model.num_layers': 1,
    'moe.every': 1,
    'moe.offset': 0,
    'moe.first_dense': 0,
  }
  decoder = Decoder(
    _changed(config, one_layer), 1, mesh, rngs=nnx.Rngs(params=0)
  )
  assert decoder.periods is not None  # its one layer
  graphdef, params = nnx.split(decoder.periods)
  period = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], params))
  return cast(MoELayer, period.blocks[0].chain.sub_layers[0])


def _across(
  config: ConfigDict, devices: int, dtype: jnp.dtype, device: jax.Device
) -> Dispatch:
  """Returns the dispatch on so many devices of this kind, real or not."""
  mesh = dict.fromkeys(MESH_AXES, 1) | {mesh_lib.EXPERT: devices}
  exchange = implementations.exchange_name(config, mesh, dtype, device)
  abstract = mesh_lib.abstract_mesh(mesh)
  return implementations.across(config, abstract, exchange)


def _residuals(run: Callable[[Any], Any], params: Any) -> list[_Shape]:
  """Returns the shapes of what the backward pass of `run` keeps."""
  return jax.tree.leaves(
    jax.eval_shape(lambda params: jax.vjp(run, params)[1], params)
  )


def _growth(
  residuals: Callable[[int], list[_Shape]], dtype: jnp.dtype
) -> tuple[int, int]:
  """Returns the bytes per sequence, and those of `dtype` that do not grow.

  What does not grow in float32 is not counted: these are the weights.
  """
  one, two = residuals(1), residuals(2)
  fixed = [a for a, b in zip(one, two, strict=True) if a.shape == b.shape]
  copies = [a for a in fixed if a.dtype == dtype != jnp.float32]
  return _bytes(two) - _bytes(one), _bytes(copies)


def _bytes(arrays: list[_Shape]) -> int:
  return sum(a.size * a.dtype.itemsize for a in arrays)
