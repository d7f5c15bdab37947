"""Trains a model.

  moe_jax train --config=quickstart --workdir=runs/quickstart

The same command again resumes from the newest checkpoint; --config may then be
left out. In a clone, `python train.py` is the same program.
"""

from typing import Any

from ml_collections import ConfigDict

from moe_jax import cli


def run(config: ConfigDict, workdir: str, **place: Any) -> None:
  """Trains `config` in `workdir`, from its newest checkpoint if it has one."""
  # jax must not be imported before the command line has set the allocator.
  from moe_jax.parallel import launch
  from moe_jax.training import loop

  with launch.joined(**place, preemption=True):
    loop.train(config, workdir)


def main() -> None:
  """Trains as the command line says, and exits."""
  cli.main(run, cli.define_process_flags)
