"""A small Cartesian MoE with the recurrent router: minutes on two CPU cores.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart

It trains on the source code of Python's standard library, which needs no
download. Variants leave parts of the method out, at equal expert parameters:

  configs/quickstart.py:linear      conventional MoE layers, linear router
  configs/quickstart.py:rmoe        conventional MoE layers, recurrent router
  configs/quickstart.py:cartesian   Cartesian product layers, linear router
"""

from ml_collections import ConfigDict

from configs import base, variants


def get_config(names: str = '') -> ConfigDict:
  """Returns the config; `names` are variants with commas between."""
  config = base.get_config()
  config.moe.factors = 2
  config.router.recurrent = 'gru'
  config.router.state_size = 64
  config.train.steps = 300
  return variants.build(names, config, {}, VARIANTS)


def linear(config: ConfigDict) -> None:
  """Neither."""
  config.moe.factors = 1
  config.router.recurrent = 'none'


def rmoe(config: ConfigDict) -> None:
  """Recurrent router only."""
  config.moe.factors = 1


def cartesian(config: ConfigDict) -> None:
  """Cartesian product layers only."""
  config.router.recurrent = 'none'


VARIANTS = {'linear': linear, 'rmoe': rmoe, 'cartesian': cartesian}
