"""Trains a model: the door of a clone to `moe_jax train`.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from moe_jax.programs import train

if __name__ == '__main__':
  train.main()
