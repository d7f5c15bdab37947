"""What a config will build and cost, before anything runs.

  python -m moe_jax.plan --config=configs/cartesian_moe.py:large --devices=16

Everything follows from shapes: no array is made, whatever the model's size.
With --json it prints one JSON object instead of a table.
"""

import json as json_lib
import math
from typing import Any

import jax
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax import config as config_lib
from moe_jax.data import tokenizers
from moe_jax.distributed import mesh as mesh_lib
from moe_jax.errors import UserError
from moe_jax.model import build, sizes
from moe_jax.training import state


def define_flags(values: flags.FlagValues) -> None:
  """The flags that train.py does not have."""
  flags.DEFINE_boolean(
    'json', False, 'print one JSON object', flag_values=values
  )
  flags.DEFINE_integer(
    'devices',
    None,
    'of all hosts together; those of this machine if left out',
    flag_values=values,
  )


def run(config: ConfigDict, json: bool, devices: int | None) -> None:
  """Prints the plan of `config` on that many devices."""
  plan = make(config, devices)
  print(json_lib.dumps(plan) if json else table(plan))


def make(config: ConfigDict, num_devices: int | None = None) -> dict[str, Any]:
  """Returns the plan of a config, a dictionary that JSON can hold.

  Args:
    config: see configs/base.py.
    num_devices: of all hosts together; they need not be there. None: those
      that jax finds.

  Returns:
    `parameters` (total, active, router) and `flops_per_token`, as
    `moe_jax.model.sizes` counts them; `memory_bytes_per_device` and its
    `memory_parts_per_device` (parameters, gradients and optimizer; not the
    activations and other temporaries, nor the batch); `tokens_per_step`; and
    the `strategy` that the config's choices come to.

  Raises:
    UserError: anything wrong with the config or the number of devices.
  """
  if num_devices is None:
    num_devices = jax.device_count()
  if num_devices < 1:
    raise UserError(f'--devices = {num_devices} must be at least 1')
  config_lib.validate(config, num_devices)
  of_tokenizer = tokenizers.vocab_size(config.data, config.model.vocab_size)
  vocab_size = config_lib.vocab_size(config, of_tokenizer)
  # Shapes are the same on any mesh; one of a single device is always there.
  one = mesh_lib.make_mesh(dict.fromkeys(mesh_lib.AXES, 1), jax.devices()[:1])
  setup = state.setup(config, vocab_size, one)
  params = setup.abstract['params']
  mesh = config_lib.mesh_shape(config, num_devices)
  parts = _memory_parts(setup.abstract, mesh)
  return {
    'parameters': sizes.count_parameters(config, params)._asdict(),
    'flops_per_token': sizes.flops_per_token(config, params),
    'memory_bytes_per_device': sum(parts.values()),
    'memory_parts_per_device': parts,
    'tokens_per_step': config.train.batch_size * config.data.seq_len,
    'strategy': _strategy(config, mesh),
  }


def table(plan: dict[str, Any]) -> str:
  """The plan as plain text."""
  parameters, strategy = plan['parameters'], plan['strategy']
  parts = plan['memory_parts_per_device']
  memory = ', '.join(f'{name} {_bytes(size)}' for name, size in parts.items())
  mesh = ' x '.join(f'{axis} {n}' for axis, n in strategy['mesh'].items())
  layers = strategy['layers']
  repeated = f'{layers["repeats"]} x ({", ".join(layers["period"])})'
  pattern = [*layers['prefix'], *([repeated] if layers['repeats'] else [])]
  rows = {
    'parameters': f'{parameters["total"]:,}',
    '  active': f'{parameters["active"]:,} per token',
    '  router': f'{parameters["router"]:,}',
    'compute': f'{plan["flops_per_token"]:,} FLOPs per token,'
    ' forward and backward matmuls',
    'memory': f'{_bytes(plan["memory_bytes_per_device"])} per device'
    ' without activations',
    '  of which': memory,
    'batch': f'{plan["tokens_per_step"]:,} tokens per step',
    'layers': ', '.join(pattern),
    'mesh': mesh,
    'dispatch': f'{strategy["dispatch"]}, expert parallelism'
    f' {strategy["expert_parallelism"]}',
    'router': f'score {strategy["score"]}, recurrent {strategy["recurrent"]}',
    'dtype': f'{strategy["dtype"]} on {strategy["platform"]}',
    'remat': strategy['remat'],
  }
  return '\n'.join(f'{name:12}{value}' for name, value in rows.items())


def _memory_parts(
  abstract: dict[str, Any], mesh_shape: dict[str, int]
) -> dict[str, int]:
  """Bytes that one device of the mesh keeps through a training step."""
  mesh = AbstractMesh(tuple(mesh_shape.values()), tuple(mesh_shape))

  def on_device(part: Any) -> int:
    bytes_ = jax.tree.map(
      lambda leaf, sharding: (
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      ),
      part,
      mesh_lib.shardings(part, mesh),
    )
    return sum(jax.tree.leaves(bytes_))

  parameters = on_device(abstract['params'])
  parts = {
    'parameters': parameters,
    'gradients': parameters,  # of the same shapes, dtypes and shardings
    'optimizer': on_device(abstract['opt_state']),
  }
  if 'memory' in abstract:
    parts['memory'] = on_device({'memory': abstract['memory']})
  return parts


def _strategy(config: ConfigDict, mesh: dict[str, int]) -> dict[str, Any]:
  """What the config's choices come to, after every `auto` and `-1`."""
  kinds = config_lib.layer_kinds(config)
  first, period = build.repetition(kinds, config.moe.every)
  routed = 'moe' in kinds
  split = routed and mesh['expert'] > 1
  return {
    'layers': {
      'prefix': list(kinds[:first]),
      'period': list(kinds[first : first + period]),
      'repeats': (len(kinds) - first) // period,
    },
    'mesh': mesh,
    'dispatch': config.moe.dispatch if routed else 'none',
    'expert_parallelism': 'gather' if split else 'none',
    'score': config.router.score if routed else 'none',
    'recurrent': config.router.recurrent if routed else 'none',
    'platform': jax.devices()[0].platform,
    'dtype': str(build.compute_dtype(config, None)),
    'remat': config.model.remat,
  }


def _bytes(number: float) -> str:
  """`512 B`, `1.5 GiB`."""
  for power, unit in ((30, 'GiB'), (20, 'MiB'), (10, 'KiB')):
    if number >= 1 << power:
      return f'{number / (1 << power):.2f} {unit}'
  return f'{number} B'


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
