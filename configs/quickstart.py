"""A small Cartesian MoE with the recurrent router: minutes on two CPU cores.

  moe_jax train --config=quickstart --workdir=runs/quickstart

It trains on the source code of Python's standard library, which needs no
download. Variants leave parts of the method out, at equal expert parameters:

  quickstart:linear      conventional MoE layers, linear router
  quickstart:rmoe        conventional MoE layers, recurrent router
  quickstart:cartesian   Cartesian product layers, linear router
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


VARIANTS = {'linear': linear, 'rmoe': rmoe, 'cartesian': cartesian}
