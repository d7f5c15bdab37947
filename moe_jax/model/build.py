"""From a config to a `Decoder`: here, once, strings become objects."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import parameter
from moe_jax.config import head_dim, vocab_rows
from moe_jax.errors import choose
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.grouped_matmul import TunedMatmul
from moe_jax.experts.layer import (
  CoefficientMixing,
  DenseLayer,
  FixedMixing,
  Layer,
  Mixing,
  MoELayer,
  Norm,
  PostNormChain,
  PreNormChain,
  SumMixing,
)
from moe_jax.experts.mlp import (
  ReLUExperts,
  ReLUMLP,
  SwiGLU,
  SwiGLUExperts,
)
from moe_jax.model import implementations
from moe_jax.model.attention import Attend, Attention
from moe_jax.model.block import Block, Period, PostNormBlock, PreNormBlock
from moe_jax.model.layers import LayerNorm, RMSNorm
from moe_jax.parameter import EMBED, VOCAB, param
from moe_jax.routing import recurrent
from moe_jax.routing.cells import CELLS, Cell
from moe_jax.routing.gates import GATES, GateOptions
from moe_jax.routing.router import Features, Router
from moe_jax.routing.selection import (
  SCALES,
  SELECTIONS,
  Select,
  SelectOptions,
)

NORMS = {'rms': RMSNorm, 'layer': LayerNorm}

# The root mean square of a recurrent state's entries before training, roughly:
# 0.15 to 0.3 with a GRU.
_STATE_RMS = 0.25

# The classes of the dense and shared feed-forward, and of the routed experts.
FEED_FORWARDS: dict[
  str,
  tuple[type[SwiGLU | ReLUMLP], type[SwiGLUExperts | ReLUExperts]],
] = {
  'swiglu': (SwiGLU, SwiGLUExperts),
  'relu': (ReLUMLP, ReLUExperts),
}

MIXINGS = {
  'sum': lambda config, rngs: SumMixing(),
  'fixed': lambda config, rngs: FixedMixing(
    config.moe.shared.routed_weight, config.moe.shared.shared_weight
  ),
  'coefficient': lambda config, rngs: CoefficientMixing(
    config.model.hidden_size, init_std=config.model.init_std, rngs=rngs
  ),
}


class Parts(NamedTuple):
  """What every block of a model is made of.

  Attributes:
    config: The whole config.
    vocab_size: V.
    dtype: The type of the arithmetic outside routers and norms.
    dispatch: The dispatch of all MoE layers.
    attend: The attention of all layers.
    multiply: The grouped matmul of all experts.
    disable_top: The number of experts left out of every choice; see `Select`.
  """

  config: ConfigDict
  vocab_size: int
  dtype: jnp.dtype
  dispatch: Dispatch
  attend: Attend
  multiply: TunedMatmul
  disable_top: int


def make_parts(
  config: ConfigDict,
  vocab_size: int,
  mesh: jax.sharding.Mesh | None,
  disable_top: int = 0,
  cached: bool = False,
) -> Parts:
  """Returns the parts of a validated config's blocks; see `Parts`.

  Raises:
    UserError: An implementation is asked for that cannot run on the mesh.
  """
  dtype = compute_dtype(config, mesh)
  return Parts(
    config,
    vocab_size,
    dtype,
    implementations.dispatch(config, mesh, dtype),
    implementations.attention(config, mesh, dtype, cached),
    implementations.grouped_matmul(config, mesh),
    disable_top,
  )


def reads_in_place(parts: Parts, mesh: jax.sharding.Mesh | None) -> bool:
  """Returns whether experts may run on the parameters of all layers at once.

  That is where their parameters are on one device, are neither cast nor
  quantized, and are multiplied by what loads the weights of groups that have
  rows alone.
  """
  one, multiply = mesh is None or mesh.size == 1, parts.multiply
  as_they_are = parts.dtype == jnp.float32 and not multiply.quantized
  return one and as_they_are and multiply.name == 'blocks'


def unrolled(
  config: ConfigDict, mesh: jax.sharding.Mesh | None, repeats: int
) -> int:
  """Returns how many periods a step of the scan over them has."""
  device = implementations.first_device(mesh)
  return implementations.unrolled(config.model.unroll, device, repeats)


def make_embedding(
  config: ConfigDict, vocab_size: int, rngs: nnx.Rngs
) -> nnx.Param:
  """Returns embed_VD, its padding 0."""
  init = nnx.initializers.normal(config.model.init_std)
  # Drawn without padding, which so changes no other parameter.
  drawn = init(rngs.params(), (vocab_size, config.model.hidden_size))
  return param(
    _padded(config, drawn, 0),
    (VOCAB, EMBED),
    decay=True,
    # It is looked up, and multiplies where it is the head as well.
    matmuls=int(config.model.tie_embeddings),
  )


def make_head(
  config: ConfigDict, vocab_size: int, rngs: nnx.Rngs
) -> nnx.Param | None:
  """Returns head_DV, its padding 0; None where the embedding is the head."""
  if config.model.tie_embeddings:
    return None
  init = nnx.initializers.normal(config.model.init_std)
  shape = config.model.hidden_size, vocab_size
  drawn = _padded(config, init(rngs.params(), shape), 1)
  return param(drawn, (EMBED, VOCAB), decay=True)


def _padded(config: ConfigDict, drawn: jax.Array, axis: int) -> jax.Array:
  """Returns what was drawn, with zeros up to `model.vocab_multiple`."""
  more = vocab_rows(config, drawn.shape[axis]) - drawn.shape[axis]
  widths = [(0, more if i == axis else 0) for i in range(drawn.ndim)]
  return jnp.pad(drawn, widths) if more else drawn


def make_periods(
  parts: Parts, pattern: Sequence[str], repeats: int, rngs: nnx.Rngs
) -> Period | None:
  """Returns P periods, stacked on a leading axis; None if there are none."""
  if not repeats:
    return None

  def make(rngs: nnx.Rngs) -> Period:
    blocks = make_period(parts, pattern, rngs)
    parameter.declare(blocks)  # while they have no axis of layers
    return blocks

  return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(repeats))


def make_period(parts: Parts, pattern: Sequence[str], rngs: nnx.Rngs) -> Period:
  """Returns a block for each of the kinds in the pattern."""
  return Period([make_block(parts, kind, rngs) for kind in pattern])


def repetition(kinds: Sequence[str], every: int) -> tuple[int, int]:
  """Returns where a pattern of layers begins to repeat, and its period.

  Args:
    kinds: The kind of every layer.
    every: The period, unless all layers are alike.

  Returns:
    The fewest leading layers without which the rest is whole repetitions.
  """
  period = every if len(set(kinds)) > 1 else 1

  def repeats(first: int) -> bool:
    rest = kinds[first:]
    return len(rest) % period == 0 and rest[period:] == rest[:-period]

  return next(f for f in range(len(kinds) + 1) if repeats(f)), period


def compute_dtype(
  config: ConfigDict, mesh: jax.sharding.Mesh | None
) -> jnp.dtype:
  """Returns the type of the arithmetic of a model on a mesh."""
  device = implementations.first_device(mesh)
  return implementations.compute_dtype(config, device)


def make_block(parts: Parts, kind: str, rngs: nnx.Rngs) -> Block:
  """Returns a layer of that kind, 'moe' or 'dense'."""
  config, model = parts.config, parts.config.model
  attention = Attention(
    model.hidden_size,
    model.num_heads,
    model.num_kv_heads,
    head_dim(config),
    attend=parts.attend,
    init_std=model.init_std,
    out_std=model.residual_std or None,
    rngs=rngs,
  )
  make = {'moe': make_moe_layers, 'dense': _dense_sub_layers}[kind]
  sub_layers = make(parts, rngs)
  norms = [make_norm(config) for _ in sub_layers]
  place = {'pre': _pre_norm, 'post': _post_norm}[model.norm_place]
  return place(config, attention, norms, sub_layers)


def make_norm(config: ConfigDict) -> Norm:
  """Returns a norm of the model's kind, over its hidden size."""
  return NORMS[config.model.norm](
    config.model.hidden_size, config.model.norm_epsilon
  )


def _pre_norm(
  config: ConfigDict,
  attention: Attention,
  norms: Sequence[Norm],
  sub_layers: Sequence[Layer],
) -> Block:
  chain = PreNormChain(norms, sub_layers)
  return PreNormBlock(make_norm(config), attention, chain)


def _post_norm(
  config: ConfigDict,
  attention: Attention,
  norms: Sequence[Norm],
  sub_layers: Sequence[Layer],
) -> Block:
  chain = PostNormChain(norms, sub_layers)
  return PostNormBlock(make_norm(config), attention, chain, make_norm(config))


def _dense_sub_layers(parts: Parts, rngs: nnx.Rngs) -> list[Layer]:
  model = parts.config.model
  feed_forward, _ = FEED_FORWARDS[model.activation]
  dense = feed_forward(
    model.hidden_size,
    model.ffn_width,
    init_std=model.init_std,
    out_std=model.residual_std or None,
    rngs=rngs,
    dropout=model.dropout,
  )
  return [DenseLayer(dense, model.dropout)]


def make_moe_layers(parts: Parts, rngs: nnx.Rngs) -> list[Layer]:
  """Returns an MoE layer per factor; all together cost what one would."""
  config, moe, model = parts.config, parts.config.moe, parts.config.model

  def sub_layer(place: int) -> MoELayer:
    _, make_experts = FEED_FORWARDS[model.activation]
    experts = make_experts(
      moe.num_experts,
      model.hidden_size,
      moe.expert_width // moe.factors,
      init_std=model.init_std,
      out_std=model.residual_std or None,
      rngs=rngs,
      dropout=model.dropout,
      multiply=parts.multiply,
    )
    shared, mixing = _shared(config, rngs)
    bias_D = param(jnp.zeros((model.hidden_size,))) if moe.bias else None
    select = make_select(config, parts.disable_top)
    return MoELayer(
      make_router(
        config, parts.vocab_size, place, select.num_logits, rngs=rngs
      ),
      select,
      parts.dispatch,
      experts,
      shared=shared,
      shared_parts=moe.shared.parts,
      mixing=mixing,
      bias_D=bias_D,
      dropout=model.dropout,
    )

  return [sub_layer(place) for place in range(moe.factors)]


def _shared(
  config: ConfigDict, rngs: nnx.Rngs
) -> tuple[SwiGLU | ReLUMLP | None, Mixing | None]:
  """Returns the shared expert and what joins it with the routed ones."""
  shared = config.moe.shared
  if not shared.width:
    return None, None
  feed_forward, _ = FEED_FORWARDS[config.model.activation]
  expert = feed_forward(
    config.model.hidden_size,
    shared.width // config.moe.factors,
    init_std=config.model.init_std,
    out_std=config.model.residual_std or None,
    rngs=rngs,
    dropout=config.model.dropout,
  )
  name = choose('moe.shared.mixing', shared.mixing, MIXINGS)
  return expert, MIXINGS[name](config, rngs)


def make_cell(config: ConfigDict, rngs: nnx.Rngs) -> Cell:
  """Returns the cell of all routers; without recurrence, `Memoryless`."""
  router = config.router
  shared = router.projector == 'shared'
  input_size = config.model.hidden_size if shared else router.state_size
  make = CELLS[router.recurrent]
  cell = make(input_size, router.state_size, rngs=rngs)
  parameter.declare(cell, part=parameter.CELL)
  return cell


def num_residual_logits(config: ConfigDict) -> int:
  """Returns how many logits each MoE sub-layer hands to the next."""
  return make_select(config, 0).num_logits if config.router.residual else 0


def make_router(
  config: ConfigDict,
  vocab_size: int,
  place: int,
  num_logits: int,
  rngs: nnx.Rngs,
) -> Router:
  """Returns the router of the sub-layer at `place` in its layer."""
  keys = config.router
  features, num_features = _features(config, rngs)
  options = GateOptions(
    num_features=num_features,
    num_experts=num_logits,
    vocab_size=vocab_size,
    width=keys.mlp_width,
    reduced_size=keys.reduced_size,
    bias=keys.bias,
    salt=place,
    init_std=config.model.init_std,
    feature_std=keys.gate_std or _feature_std(config, num_features),
  )
  return Router(
    features,
    GATES[keys.score](options, rngs=rngs),
    residual=keys.residual,
    detached=keys.residual_detached,
    jitter=keys.jitter,
  )


def _feature_std(config: ConfigDict, num_features: int) -> float:
  """Returns what gives first logits the same spread with any features.

  A normalised hidden state and weights of `model.init_std` make logits of
  deviation `init_std sqrt(D)`. A recurrent state has other numbers of entries,
  and smaller ones.
  """
  model = config.model
  if config.router.recurrent == 'none':
    return model.init_std
  return model.init_std * (model.hidden_size / num_features) ** 0.5 / _STATE_RMS


def make_select(config: ConfigDict, disable_top: int) -> Select:
  """Returns the selection of one MoE layer; `disable_top` as in `Select`."""
  router = config.router
  options = SelectOptions(
    num_experts=config.moe.num_experts,
    top_k=config.moe.top_k,
    top_p=router.top_p,
    weights=choose('router.weights', router.weights, SCALES),
    renormalize=config.moe.renormalize,
    groups=router.groups,
    top_groups=router.top_groups,
    disable_top=disable_top,
    biased=config.loss.bias_rate > 0,
    masked=GATES[router.score].masks,
  )
  return SELECTIONS[router.selection](options)


def _features(config: ConfigDict, rngs: nnx.Rngs) -> tuple[Features, int]:
  """Returns what makes the features that a gate reads, and their width."""
  router, hidden_size = config.router, config.model.hidden_size
  if router.recurrent == 'none':
    return recurrent.HiddenFeatures(), hidden_size
  project = recurrent.identity
  if router.projector == 'layerwise':
    project = recurrent.Projector(
      hidden_size,
      router.state_size,
      init_std=router.projector_std or config.model.init_std,
      rngs=rngs,
    )
  features = recurrent.RecurrentFeatures(project, router.passing)
  return features, router.state_size
