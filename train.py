"""Trains a model.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart

The same command again resumes from the newest checkpoint.
"""

from typing import Any

from ml_collections import ConfigDict

from moe_jax import cli


def run(config: ConfigDict, workdir: str, **place: Any) -> None:
  """Trains `config` in `workdir`, from its newest checkpoint if it has one."""
  # jax must not be imported before the command line has set the allocator.
  from moe_jax.parallel import launch
  from moe_jax.training import loop

  launch.initialize(**place, preemption=True)
  loop.train(config, workdir)


if __name__ == '__main__':
  cli.main(run, cli.define_process_flags)
