"""What a config will build and cost, before anything runs.

  python -m moe_jax.plan --config=configs/cartesian_moe.py:large --devices=16

Everything follows from shapes: no array is made, whatever the model's size.
With --json it prints one JSON object instead of a table.

  python -m moe_jax.plan --config=... --compile --topology=v5e:16x16 --slices=2

also compiles the training step, for TPUs that need not be here, and tells what
their compiler says; without --topology, for the devices of this machine.
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
from moe_jax.distributed import mesh as mesh_lib
from moe_jax.errors import UserError
from moe_jax.model import build, build_exchange, memory, sizes
from moe_jax.planning import compiled, setups, table_of_compiled, topologies
from moe_jax.planning.units import in_bytes
from moe_jax.training import state

# Rows of the table.
_STATE = ('parameters', 'gradients', 'optimizer', 'segments')
_ROUTER = (
  'score',
  'recurrent',
  'projector',
  'passing',
  'residual',
  'selection',
  'weights',
)


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
  flags.DEFINE_string(
    'topology',
    None,
    'plan for a slice of TPUs, such as v5e:16x16; it need not be here',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'slices', 1, 'of that topology, on a slower network', flag_values=values
  )
  flags.DEFINE_boolean(
    'compile', False, 'compile the training step', flag_values=values
  )


def run(
  config: ConfigDict,
  json: bool,
  devices: int | None,
  topology: str | None,
  slices: int,
  compile: bool,
) -> None:
  """Prints the plan of `config` on such devices."""
  target = _target(topology, slices)
  count = len(target.devices)
  if devices not in (None, count) and (topology or compile):
    raise UserError(
      f'--devices = {devices}, but {"--topology" if topology else "here"} has'
      f' {count}; leave --devices out'
    )
  plan = make(config, devices or count, target.devices[0])
  if compile:
    # Or the seconds would tell of the cache.
    jax.config.update('jax_enable_compilation_cache', False)
    plan['compiled'] = compiled.plan(config, target)
  print(json_lib.dumps(plan) if json else table(plan))


def _target(topology: str | None, slices: int) -> topologies.Target:
  if topology:
    return topologies.target(topology, slices)
  if slices != 1:
    raise UserError(f'--slices = {slices} is of a --topology, which is missing')
  return topologies.here()


def make(
  config: ConfigDict,
  num_devices: int | None = None,
  device: jax.Device | None = None,
) -> dict[str, Any]:
  """Returns the plan of a config, a dictionary that JSON can hold.

  Args:
    config: see configs/base.py.
    num_devices: of all hosts together; they need not be there. None: those
      that jax finds.
    device: of their kind; None: the first that jax finds.

  Returns:
    `parameters` (total, active, router, idle), `flops_per_token` of training
    and `flops_per_token_forward`, as `moe_jax.model.sizes` counts them;
    `memory_bytes_per_device` and its `memory_parts_per_device`, the state's
    exactly and the rest as `moe_jax.model.memory` estimates it;
    `tokens_per_step`; and the `strategy` that the config's choices come to.

  Raises:
    UserError: anything wrong with the config or the number of devices.
  """
  if num_devices is None:
    num_devices = jax.device_count()
  if num_devices < 1:
    raise UserError(f'--devices = {num_devices} must be at least 1')
  config_lib.validate(config, num_devices)
  setup = setups.shapes(config, device)
  params = setup.abstract['params']
  mesh = config_lib.mesh_shape(config, num_devices)
  parts = _memory_parts(setup, mesh)
  return {
    'parameters': sizes.count_parameters(config, params)._asdict(),
    'flops_per_token': sizes.flops_per_token(config, params),
    'flops_per_token_forward': sizes.flops_per_token_forward(config, params),
    'memory_bytes_per_device': sum(parts.values()),
    'memory_parts_per_device': parts,
    'tokens_per_step': config.train.batch_size * config.data.seq_len,
    'strategy': _strategy(setup, mesh),
  }


def table(plan: dict[str, Any]) -> str:
  """The plan as plain text."""
  parameters, strategy = plan['parameters'], plan['strategy']
  parts = plan['memory_parts_per_device']
  mesh = ' x '.join(f'{axis} {n}' for axis, n in strategy['mesh'].items())
  layers = strategy['layers']
  repeated = f'{layers["repeats"]} x ({", ".join(layers["period"])})'
  pattern = [*layers['prefix'], *([repeated] if layers['repeats'] else [])]
  rows = {
    'parameters': f'{parameters["total"]:,}',
    '  active': f'{parameters["active"]:,} per token',
    '  router': f'{parameters["router"]:,}',
    '  idle': f'{parameters["idle"]:,} counted, never built',
    'compute': f'{plan["flops_per_token"]:,} FLOPs per token in training,'
    f' {plan["flops_per_token_forward"]:,} forward',
    'memory': f'{in_bytes(plan["memory_bytes_per_device"])} per device',
    '  state': _listed(parts, *_STATE),
    '  step': _listed(parts, *memory.Temporaries._fields),
    'batch': f'{plan["tokens_per_step"]:,} tokens per step',
    'layers': ', '.join(pattern),
    'mesh': mesh,
    'dispatch': f'{strategy["dispatch"]}, expert parallelism'
    f' {strategy["expert_parallelism"]}',
    '  exchange': ', '.join(
      f'{name} {in_bytes(sent)}'
      for name, sent in strategy.get('exchange_bytes', {}).items()
    )
    + ' sent per device, sub-layer and forward pass',
    'router': ', '.join(
      f'{name} {strategy[name]}' for name in _ROUTER if name in strategy
    ),
    'dtype': f'{strategy["dtype"]} on {strategy["platform"]}',
    'remat': strategy['remat'],
  }
  if not parameters['idle']:
    del rows['  idle']
  if 'exchange_bytes' not in strategy:
    del rows['  exchange']
  if 'compiled' in plan:
    rows |= table_of_compiled.rows(plan['compiled'], plan['tokens_per_step'])
  return '\n'.join(f'{name:11} {value}' for name, value in rows.items())


def _listed(parts: dict[str, int], *names: str) -> str:
  """`a 1.5 GiB, b 3.0 GiB`."""
  shown = [f'{name} {in_bytes(parts[name])}' for name in names if parts[name]]
  return ', '.join(shown)


def _memory_parts(setup: state.Setup, mesh: dict[str, int]) -> dict[str, int]:
  """Bytes that one device of the mesh needs for a training step."""
  abstract_mesh = AbstractMesh(tuple(mesh.values()), tuple(mesh))

  def on_device(part: Any) -> int:
    bytes_ = jax.tree.map(
      lambda leaf, sharding: (
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      ),
      part,
      mesh_lib.shardings(part, abstract_mesh),
    )
    return sum(jax.tree.leaves(bytes_))

  config, abstract = setup.config, setup.abstract
  parameters = on_device(abstract['params'])
  # Of the parameters' shapes, dtypes and shardings; and with micro-batches
  # the sum of those done.
  copies = 1 if config.train.accumulation == 1 else 2
  segments = {name: abstract[name] for name in ('memory',) if name in abstract}
  resolved = setups.resolved(setup, mesh)
  temporaries = memory.temporaries(resolved, setup.vocab_size, mesh)
  return {
    'parameters': parameters,
    'gradients': copies * parameters,
    'optimizer': on_device(abstract['opt_state']),
    'segments': on_device(segments),  # hidden states that a span reaches back
    **temporaries._asdict(),
  }


def _strategy(setup: state.Setup, mesh: dict[str, int]) -> dict[str, Any]:
  """What the config's choices come to, after every `auto` and `-1`."""
  config = setups.resolved(setup, mesh)
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
    **_exchange(config, mesh, split),
    **_router(config, routed),
    'platform': setup.mesh.devices.flat[0].platform,
    'dtype': config.model.dtype,
    'remat': config.model.remat,
  }


def _exchange(
  config: ConfigDict, mesh: dict[str, int], split: bool
) -> dict[str, Any]:
  """How tokens get to experts on other devices, and what each way sends."""
  if not split:
    return {'expert_parallelism': 'none'}
  sent = build_exchange.exchange_bytes(config, mesh, config.model.dtype)
  return {'expert_parallelism': config.moe.exchange, 'exchange_bytes': sent}


def _router(config: ConfigDict, routed: bool) -> dict[str, str]:
  """How experts are chosen: only what has a meaning for this router."""
  router = config.router
  if not routed:
    return {'score': 'none', 'recurrent': 'none'}
  chosen = {'score': router.score, 'recurrent': router.recurrent}
  if router.recurrent != 'none':
    chosen |= {'projector': router.projector, 'passing': router.passing}
  if router.residual:
    chosen['residual'] = str(router.residual)
  limit = {
    'top_k': f'top_k {config.moe.top_k} of {config.moe.num_experts}',
    'top_p': f'top_p {router.top_p} of {config.moe.num_experts}',
  }
  chosen['selection'] = limit[router.selection]
  chosen['weights'] = router.weights
  return chosen


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
