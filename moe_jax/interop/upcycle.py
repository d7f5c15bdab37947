"""Begins a Mixture-of-Experts model from a trained dense one.

  python -m moe_jax.interop.upcycle --dense=DIR --config=FILE --workdir=DIR

--dense is the workdir of a dense run, or the folder of a Llama in safetensors.
The workdir gets a checkpoint of step 0, from which train.py goes on. It says
whether the start is exactly the dense model, and by how much logits differ.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
  """The flags that train.py does not have."""
  flags.DEFINE_string(
    'dense',
    '',
    'the dense model: a workdir or a checkpoint',
    flag_values=values,
  )


def run(config: ConfigDict, workdir: str, dense: str) -> None:
  """Writes a checkpoint of step 0 into `workdir`."""
  # jax must not be imported before the command line has set the allocator.
  from moe_jax.interop import programs

  if not dense:
    raise UserError('--dense is missing: a workdir or the folder of a Llama')
  print(programs.upcycle(Path(dense), config, Path(workdir)))


if __name__ == '__main__':
  cli.main(run, define_flags)
