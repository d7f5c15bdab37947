"""Evaluates a checkpoint of a run: the door of a clone to `moe_jax eval`.

python eval.py --workdir=runs/quickstart
"""

from moe_jax.programs import eval

if __name__ == '__main__':
  eval.main()
