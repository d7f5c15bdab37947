"""The plan of a config: what it will build and cost, before anything runs."""

from typing import Any

import jax
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax import strict_json
from moe_jax.config.schema import KEYS
from moe_jax.errors import UserError
from moe_jax.model import build, implementations, sizes
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning import (
  abstract_setup,
  batch_search,
  compiled,
  memory,
  topologies,
)
from moe_jax.planning.table import report_trial, table
from moe_jax.training import state


def run(
  config: ConfigDict,
  json: bool,
  devices: int | None,
  topology: str | None,
  slices: int,
  compile: bool,
  fit: bool,
) -> None:
  """Prints the plan of `config` on such devices."""
  target = _target(topology, slices)
  count = len(target.devices)
  named = topology is not None
  if devices not in (None, count) and (named or compile or fit):
    raise UserError(
      f'--devices = {devices}, but {"--topology" if named else "here"} has'
      f' {count}; leave --devices out'
    )
  if compile or fit:
    # Or the seconds would be those of the cache.
    jax.config.update('jax_enable_compilation_cache', False)
  largest = batch_search.find(config, target, report_trial) if fit else {}
  if fit:
    config.update_from_flattened_dict(largest['overrides'])
  plan = make(config, count if devices is None else devices, target.devices[0])
  if named:
    abstract_setup.check_slices(config, target.devices)
  if compile:
    plan['compiled'] = _compiled(config, target)
  if fit:
    plan['fit'] = largest
  print(strict_json.dumps(plan) if json else table(plan))


def _compiled(config: ConfigDict, target: topologies.Target) -> dict[str, Any]:
  try:
    return compiled.compile_and_report(config, target)
  except compiled.DoesNotFitError as refused:
    advice = batch_search.advice(config, target, refused)
    raise UserError(f'{refused}; {advice}') from refused


def _target(topology: str | None, slices: int) -> topologies.Target:
  if topology is not None:
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
    config: The config.
    num_devices: The number of devices of all hosts together, which need not be
      there. None stands for those that jax finds.
    device: A device of their kind; None stands for the first that jax finds.

  Returns:
    `parameters` (total, active, router, idle); `vocabulary`, the `ids` and the
    `rows` that they have with their padding; `flops_per_token` of training
    and `flops_per_token_forward`, as `moe_jax.model.sizes` counts them;
    `memory_bytes_per_device` and its `memory_parts_per_device`, the state's
    exactly and the rest as `moe_jax.planning.temporaries` estimates it;
    `host_memory_bytes_per_device`, what `optimizer.offload` keeps on the hosts;
    `tokens_per_step`; and the `strategy` that the config's choices come to.

  Raises:
    UserError: Something is wrong with the config or the number of devices.
  """
  if num_devices is None:
    num_devices = jax.device_count()
  if num_devices < 1:
    raise UserError(f'--devices = {num_devices} must be at least 1')
  config_lib.validate(config, num_devices)
  setup = abstract_setup.on_one_device(config, device)
  counted = config, setup.abstract['params'], setup.declarations
  mesh = config_lib.mesh_shape(config, num_devices)
  parts = memory.parts(setup, mesh)
  return {
    'parameters': sizes.count_parameters(*counted)._asdict(),
    'vocabulary': {
      'ids': setup.vocab_size,
      'rows': config_lib.vocab_rows(config, setup.vocab_size),
    },
    'flops_per_token': sizes.flops_per_token(*counted),
    'flops_per_token_forward': sizes.flops_per_token_forward(*counted),
    'memory_bytes_per_device': sum(parts.values()),
    'memory_parts_per_device': parts,
    'host_memory_bytes_per_device': memory.host_bytes(setup, mesh),
    'tokens_per_step': config.train.batch_size * config.data.seq_len,
    'strategy': _strategy(setup, mesh),
  }


def _strategy(setup: state.Setup, mesh: dict[str, int]) -> dict[str, Any]:
  """Returns what the config's choices come to, after every `auto` and `-1`."""
  config = abstract_setup.resolved(setup, mesh)
  kinds = config_lib.layer_kinds(config)
  first, period = build.repetition(kinds, config.moe.every)
  routed = 'moe' in kinds
  split = routed and mesh[mesh_lib.EXPERT] > 1
  device = setup.mesh.devices.flat[0]
  runs = implementations.resolved(setup.config, mesh, device)
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
    'attention': runs['attention'],
    'grouped_matmul': runs.get('grouped_matmul', 'none'),
    'platform': device.platform,
    'dtype': config.model.dtype,
    'remat': config.model.remat,
  }


def _exchange(
  config: ConfigDict, mesh: dict[str, int], split: bool
) -> dict[str, Any]:
  """Returns how tokens get to experts elsewhere, and what each way sends."""
  if not split:
    return {'expert_parallelism': 'none'}
  sent = implementations.exchange_bytes(config, mesh, config.model.dtype)
  return {'expert_parallelism': config.moe.exchange, 'exchange_bytes': sent}


def _router(config: ConfigDict, routed: bool) -> dict[str, str]:
  """Returns how experts are chosen: what has a meaning for this router."""
  if not routed:
    return {'score': 'none', 'recurrent': 'none'}
  router = config.router
  chosen = {
    name.removeprefix('router.'): str(config_lib.get(config, name))
    for name, key in KEYS.items()
    if name.startswith('router.')
    if key.choices and config_lib.is_read(config, name)
  }
  if router.residual:
    chosen['residual'] = str(router.residual)
  limit = {
    'top_k': f'top_k {config.moe.top_k} of {config.moe.num_experts}',
    'top_p': f'top_p {router.top_p} of {config.moe.num_experts}',
  }
  chosen['selection'] = limit.get(router.selection, router.selection)
  return chosen
