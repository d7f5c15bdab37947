"""Analyses the routing of runs, as the papers do.

  moe_jax analyze runs/a [runs/b ...]

Each run is analysed with its own config; --config.KEY=VALUE changes what may be
changed. The numbers go to DIR/analysis/STEP.json, with pictures beside them.
"""

from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.errors import UserError
from moe_jax.programs.eval import define_checkpoint_flags


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of evaluation, and how much is read."""
  define_checkpoint_flags(values)
  flags.DEFINE_integer(
    'tokens',
    1_000_000,
    'the most tokens to read',
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    'passage',
    2000,
    'the tokens from the beginning of the split whose routes are written out',
    lower_bound=0,
    flag_values=values,
  )


def run(
  configs: dict[str, ConfigDict],
  step: int | None,
  split: str | None,
  tokens: int,
  passage: int,
  **place: Any,
) -> None:
  """Analyses the checkpoint of `step` in every workdir."""
  # jax must not be imported before the command line has set the allocator.
  try:
    from moe_jax.analysis.analyze import analyze
  except ModuleNotFoundError as error:
    if error.name != 'matplotlib':
      raise
    raise UserError(
      'analyze draws with matplotlib, which is not installed: pip install'
      " 'moe_jax[eval]'"
    ) from error
  from moe_jax.parallel import launch

  with launch.joined(**place):
    for workdir, config in configs.items():
      analyze(
        config, workdir, step=step, split=split, tokens=tokens, passage=passage
      )


def main() -> None:
  """Analyses what the command line names, and exits."""
  cli.main_of_runs(run, define_flags)
