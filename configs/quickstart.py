"""A small Cartesian MoE with the recurrent router: minutes on two CPU cores.

  moe_jax train --config=quickstart --workdir=runs/quickstart

It trains on the source code of Python's standard library, which needs no
download. Variants are changes to it, and can be compared side by side:

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
  """Returns the config; `names` are variants with commas between."""
  config = config_lib.get_config()
  config.moe.factors = 2
  config.router.recurrent = 'gru'
  # Wide and shallow, short sequences and small batches: what learns most in
  # minutes on two cores, where a step costs what its arithmetic costs.
  config.model.num_layers = 2
  config.model.hidden_size = 256
  config.model.init_std = 0.05
  config.moe.num_experts = 8
  config.moe.expert_width = 512
  config.router.state_size = 64
  config.data.seq_len = 128
  config.train.batch_size = 8
  config.train.steps = 800
  config.train.log_every = 20
  config.optimizer.learning_rate = 1.5e-3
  config.optimizer.warmup_steps = 60
  config.optimizer.final_fraction = 0.05
  config.checkpoint.every = 200
  config.eval.every = 200
  # The whole split takes minutes to evaluate.
  config.eval.split = 'validation[:30%]'
  config.eval.batches = 8
  config.eval.batch_size = 64
  return presets.build(names, config, {}, VARIANTS)


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
}
