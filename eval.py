"""Evaluates a checkpoint of a run: the door of a clone to `moe_jax eval`.

python eval.py --workdir=runs/quickstart
"""

from moe_jax import exits


def main() -> None:
  """Imports the program, which a signal may end, and runs it."""
  from moe_jax.programs import eval

  eval.main()


if __name__ == '__main__':
  exits.exit_with(main)
