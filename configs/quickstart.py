"""A small Cartesian MoE with the recurrent router: minutes on two CPU cores.

  moe_jax train --config=quickstart --workdir=runs/quickstart

It trains on the source code of Python's standard library, which needs no
download. Presets:

  small   what is meant if none is named
  tiny    a quarter of it, for comparisons of many: docs/evidence.md

Variants are changes to them, and can be compared side by side:

  moe_jax compare --config=quickstart --variants=linear,rmoe,cartesian,both \
    --seeds=3 --workdir=runs/compare

  layers      linear, rmoe, cartesian, both; fine_grained, three_factors, dense
  gates       mlp, random, cosine, xmoe, hyper, hash, without recurrence;
              xmoe_gru with it
  recurrence  np, detach, r0.5, s_proj, rnn, lstm
  choice      top_p, sigmoid, expert_bias
  experts     shared

A variant changes what its line says and nothing else, so they can be combined:
xmoe is that gate in Cartesian layers, as those of the base are, linear,xmoe in
conventional ones. All experts together have equally many parameters, but for
dense, three_factors and shared, and so have those that a token has, but for
three_factors and top_p.
"""

from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import presets


def get_config(names: str = '') -> ConfigDict:
  """Returns the config; `names` are a preset and variants."""
  return presets.build(names, config_lib.get_config(), PRESETS, VARIANTS)


def small(config: ConfigDict) -> None:
  """6 layers of width 128: minutes on two cores."""
  config.moe.factors = 2
  config.router.recurrent = 'gru'
  # Short sequences and small batches: what learns most in minutes on two cores,
  # where a step costs what its arithmetic costs.
  config.model.num_layers = 6
  config.model.hidden_size = 128
  config.model.init_std = 0.05
  config.moe.num_experts = 8
  config.moe.expert_width = 256
  config.router.state_size = 64
  config.data.seq_len = 128
  config.train.batch_size = 8
  config.train.steps = 1200
  config.train.log_every = 20
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 60
  config.optimizer.router_rate = 0.3
  config.optimizer.final_fraction = 0.05
  config.checkpoint.every = 300
  config.eval.every = 300
  # The whole split takes minutes to evaluate.
  config.eval.split = 'validation[:30%]'
  config.eval.batches = 8
  config.eval.batch_size = 64


def tiny(config: ConfigDict) -> None:
  """Half as wide, a minute or two on one core: for comparisons of many."""
  small(config)
  config.model.hidden_size = 64
  config.model.init_std = 0.1
  config.moe.expert_width = 128
  config.router.state_size = 32
  config.train.steps = 1000
  config.train.log_every = 50
  config.optimizer.learning_rate = 4e-3
  config.checkpoint.every = 1000
  config.eval.every = 0
  config.eval.split = 'validation[:10%]'


def linear(config: ConfigDict) -> None:
  """Conventional MoE layers with a linear router: neither."""
  config.moe.factors = 1
  config.router.recurrent = 'none'


def rmoe(config: ConfigDict) -> None:
  """Conventional MoE layers with the recurrent router."""
  config.moe.factors = 1


def cartesian(config: ConfigDict) -> None:
  """Cartesian product layers with a linear router."""
  config.router.recurrent = 'none'


def fine_grained(config: ConfigDict) -> None:
  """Conventional layers: twice as many experts, half as wide, twice top_k."""
  config.moe.factors = 1
  config.moe.num_experts *= 2
  config.moe.top_k *= 2
  config.moe.expert_width //= 2


def three_factors(config: ConfigDict) -> None:
  """A x B x C; three have to divide the width, so it may change a little."""
  config.moe.factors = 3
  config.moe.expert_width = 24 * round(config.moe.expert_width / 24)


def dense(config: ConfigDict) -> None:
  """Dense layers as wide as the experts that a token chooses together."""
  config.model.ffn_width = config.moe.top_k * config.moe.expert_width
  config.moe.num_experts = 0
  config.router.recurrent = 'none'


def shared(config: ConfigDict) -> None:
  """One expert more, which all tokens share, and one fewer to choose."""
  config.moe.top_k -= 1
  config.moe.shared.width = config.moe.expert_width
  config.moe.shared.mixing = 'coefficient'


def _gate(score: str, about: str) -> presets.Change:
  """Returns the change to a gate without recurrence."""
  return presets.sets(
    {'router.score': score, 'router.recurrent': 'none'}, about
  )


PRESETS = {'small': small, 'tiny': tiny}

VARIANTS = {
  'linear': linear,
  'rmoe': rmoe,
  'cartesian': cartesian,
  'both': presets.sets({}, 'Cartesian product layers, recurrent router: all.'),
  'fine_grained': fine_grained,
  'three_factors': three_factors,
  'dense': dense,
  'mlp': _gate('mlp', 'A gate of two layers, as SMoE-MLP has.'),
  'random': _gate('random', 'A fixed random linear gate.'),
  'cosine': _gate('cosine', 'A gate by the cosine of token and expert.'),
  'xmoe': _gate('xmoe', 'A cosine gate in few dimensions, as XMoE has.'),
  'hyper': _gate('hyper', "A gate that a fixed network makes: HyperMoE's."),
  'hash': _gate('hash', "A fixed random table of the token's id: Hash Layer."),
  'xmoe_gru': presets.sets(
    {'router.score': 'xmoe', 'router.recurrent': 'gru'},
    "XMoE's gate on the recurrent state.",
  ),
  'np': presets.sets(
    {'router.passing': 'none'}, 'The recurrent state is not passed on.'
  ),
  'detach': presets.sets(
    {'router.passing': 'detached'},
    'The recurrent state is passed on without its gradient.',
  ),
  'r0.5': presets.sets(
    {'router.residual': 0.5},
    "Half of the sub-layer before's logits is added.",
  ),
  's_proj': presets.sets(
    {'router.projector': 'shared'}, 'One projector for all layers.'
  ),
  'rnn': presets.sets(
    {'router.recurrent': 'rnn'}, 'A plain recurrent cell instead of a GRU.'
  ),
  'lstm': presets.sets(
    {'router.recurrent': 'lstm'}, 'An LSTM instead of a GRU.'
  ),
  'top_p': presets.sets(
    {'router.selection': 'top_p', 'moe.renormalize': False},
    'The best experts until their probabilities exceed router.top_p.',
  ),
  'sigmoid': presets.sets(
    {'router.weights': 'sigmoid'}, 'Weights are sigmoids, renormalised.'
  ),
  'expert_bias': presets.sets(
    {'loss.bias_rate': 0.001, 'loss.balance_weight': 0.0},
    'A bias on the choice balances the experts instead of a loss.',
  ),
  'shared': shared,
  'int8': presets.sets(
    {'moe.quantization': 'int8'}, "Experts' products in int8."
  ),
  'fp8': presets.sets({'moe.quantization': 'fp8'}, "Experts' products in fp8."),
}
