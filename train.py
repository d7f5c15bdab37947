"""Trains a model: the door of a clone to `moe_jax train`.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from moe_jax import exits


def main() -> None:
  """Imports the program, which a signal may end, and runs it."""
  from moe_jax.programs import train

  train.main()


if __name__ == '__main__':
  exits.exit_with(main)
