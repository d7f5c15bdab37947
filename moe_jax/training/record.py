"""What a run consists of, told before its first step."""

import jax

from moe_jax.data.pipeline import TokenSequences
from moe_jax.model import sizes
from moe_jax.parallel import multihost
from moe_jax.training.state import Setup


def describe(setup: Setup, sequences: TokenSequences) -> str:
  """Model, devices and data of a run, one line each."""
  config, mesh = setup.config, setup.mesh
  counts = sizes.count_parameters(
    config, setup.abstract['params'], setup.declarations
  )
  device = next(iter(mesh.devices.flat))
  axes = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  processes = (
    ''
    if multihost.is_single_process()
    else f', {jax.process_count()} processes'
  )
  epochs = config.train.steps * config.train.batch_size / len(sequences)
  return (
    f'model    {counts.total:,} parameters,'
    f' {counts.active:,} active per token\n'
    f'devices  {mesh.size} {device.device_kind} ({axes}){processes}\n'
    f'data     {config.data.name}: {sequences.num_tokens:,} tokens,'
    f' {epochs:.2f} epochs in {config.train.steps} steps'
  )
