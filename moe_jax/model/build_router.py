"""From a config to the routers of a model, and to the cell they share."""

from flax import nnx
from ml_collections import ConfigDict

from moe_jax.errors import choose
from moe_jax.routing import recurrent
from moe_jax.routing.cells import CELLS, Cell
from moe_jax.routing.router import Features, Router
from moe_jax.routing.scores import SCORES, ScoreOptions
from moe_jax.routing.selection import SCALES, SELECTIONS, Select


def cell(config: ConfigDict, rngs: nnx.Rngs) -> Cell:
  """The recurrent cell of all routers; without recurrence, `Memoryless`."""
  router = config.router
  shared = router.projector == 'shared'
  input_size = config.model.hidden_size if shared else router.state_size
  make = CELLS[choose('router.recurrent', router.recurrent, CELLS)]
  return make(input_size, router.state_size, rngs=rngs)


def num_residual_logits(config: ConfigDict) -> int:
  """How many logits each MoE sub-layer hands to the next."""
  return config.moe.num_experts if config.router.residual else 0


def router(
  config: ConfigDict, vocab_size: int, place: int, rngs: nnx.Rngs
) -> Router:
  """The router of the sub-layer at `place` in its layer."""
  keys = config.router
  features, num_features = _features(config, rngs)
  options = ScoreOptions(
    num_features=num_features,
    num_experts=config.moe.num_experts,
    vocab_size=vocab_size,
    width=keys.mlp_width,
    reduced_size=keys.reduced_size,
    bias=keys.bias,
    salt=place,
    init_std=config.model.init_std,
  )
  score = SCORES[choose('router.score', keys.score, SCORES)]
  return Router(
    features,
    score(options, rngs=rngs),
    residual=keys.residual,
    detached=keys.residual_detached,
    jitter=keys.jitter,
  )


def select(config: ConfigDict, disable_top: int) -> Select:
  """Of one sub-layer; `disable_top` as in `Select`."""
  router = config.router
  pick = choose('router.selection', router.selection, SELECTIONS)
  return Select(
    config.moe.num_experts,
    SELECTIONS[pick](config),
    weights=choose('router.weights', router.weights, SCALES),
    renormalize=config.moe.renormalize,
    groups=router.groups,
    top_groups=router.top_groups,
    disable_top=disable_top,
    biased=config.loss.bias_rate > 0,
  )


def _features(config: ConfigDict, rngs: nnx.Rngs) -> tuple[Features, int]:
  """What the score reads, and its width."""
  router, hidden_size = config.router, config.model.hidden_size
  if router.recurrent == 'none':
    return recurrent.HiddenFeatures(), hidden_size
  project = recurrent.whole
  if router.projector == 'layerwise':
    project = recurrent.Projector(
      hidden_size,
      router.state_size,
      init_std=config.model.init_std,
      rngs=rngs,
    )
  features = recurrent.RecurrentFeatures(project, router.passing)
  return features, router.state_size
