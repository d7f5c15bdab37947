"""The optimizer's moments in the memory of the hosts, but while they are used.

They come to the devices group by group, those of a few parameters at a time.
What keeps a compiler from fetching all of them early is that each group has a
conditional of its own: these run one after another, and what is inside of one
waits for it to begin.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from moe_jax import parameter
from moe_jax.errors import UserError
from moe_jax.parallel import mesh as mesh_lib

# As in `moe_jax.training.state`, which imports this.
TrainState = dict[str, Any]

# The group of what belongs to no parameter.
_SHARED = -1


def shardings(opt_state: Any, params: Any, on_devices: Any, mesh: Mesh) -> Any:
  """Returns the shardings of an optimizer's state with moments on the hosts.

  What belongs to no parameter, such as the count of steps, stays on devices.

  Args:
    opt_state: The state, or its shapes.
    params: The parameters, or their shapes.
    on_devices: The shardings of all of the state on the devices.
    mesh: The mesh.

  Raises:
    UserError: The mesh's devices cannot do that.
  """
  if reason := _obstacle(next(iter(mesh.devices.flat))):
    raise UserError(f'optimizer.offload = True {reason}: set False')
  leaves, treedef = jax.tree.flatten(on_devices)
  owners = _owners(opt_state, params)
  placed = [
    sharding if owner is None else mesh_lib.in_host_memory(sharding)
    for sharding, owner in zip(leaves, owners, strict=True)
  ]
  return jax.tree.unflatten(treedef, placed)


def _obstacle(device: jax.Device) -> str | None:
  """Returns why moments cannot come and go on a device, or None."""
  if device.platform == 'gpu':
    # INTERNAL, of the copy's start, with jax 0.10.2.
    return (
      'copies moments from the host inside of conditionals, on which'
      " XLA's compiler for GPUs fails"
    )
  if not mesh_lib.has_host_memory(device):
    return (
      'keeps moments in pinned memory of the hosts, which'
      f' {device.device_kind} does not offer'
    )
  return None


def update(
  tx: optax.GradientTransformation,
  finite: jax.Array,
  grads: Any,
  state: TrainState,
) -> TrainState:
  """Returns the next parameters and optimizer state, each where it was.

  All of the optimizer's update stands in the conditional of every group, and
  compilers remove what is not of the group. Parameters and moments of other
  groups are not a number there, so an optimizer that mixes them shows.

  Args:
    tx: The optimizer.
    finite: Whether there is an update; otherwise all remains as it was.
    grads: The gradients.
    state: A state whose `opt_state` lies as `shardings` says.
  """
  params, params_def = jax.tree.flatten(state['params'])
  opt_state, state_def = jax.tree.flatten(state['opt_state'])
  groups = _groups(params)
  owners = _owners(state['opt_state'], state['params'])
  groups_of_state = [
    _SHARED if owner is None else groups[owner] for owner in owners
  ]
  shared = _of(_SHARED, groups_of_state, opt_state)

  def updated(
    group: int, moments: list[jax.Array], own: list[jax.Array]
  ) -> tuple[list[jax.Array], ...]:
    filled = _put(_SHARED, groups_of_state, _not_numbers(opt_state), shared)
    moments = [mesh_lib.in_device_memory(leaf) for leaf in moments]
    filled = _put(group, groups_of_state, filled, moments)
    all_params = _put(group, groups, _not_numbers(params), own)
    all_params = jax.tree.unflatten(params_def, all_params)
    updates, after = tx.update(
      grads, jax.tree.unflatten(state_def, filled), all_params
    )
    changed = optax.apply_updates(all_params, updates)
    return (
      _on_hosts(_of(group, groups_of_state, jax.tree.leaves(after))),
      _of(group, groups, jax.tree.leaves(changed)),
      _of(_SHARED, groups_of_state, jax.tree.leaves(after)),
    )

  for group in sorted(set(groups)):
    moments, own, new_shared = lax.cond(
      finite,
      functools.partial(updated, group),
      lambda moments, own: (_on_hosts(moments), own, shared),
      _of(group, groups_of_state, opt_state),
      _of(group, groups, params),
    )
    opt_state = _put(group, groups_of_state, opt_state, moments)
    params = _put(group, groups, params, own)
  opt_state = _put(_SHARED, groups_of_state, opt_state, new_shared)
  return {
    'params': jax.tree.unflatten(params_def, params),
    'opt_state': jax.tree.unflatten(state_def, opt_state),
  }


def largest_share(params: Any) -> float:
  """Returns the largest group's share of all parameters, or of their shapes."""
  leaves = jax.tree.leaves(params)
  sums: dict[int, int] = {}
  for leaf, group in zip(leaves, _groups(leaves), strict=True):
    sums[group] = sums.get(group, 0) + leaf.size
  return max(sums.values()) / sum(sums.values())


def _groups(params_leaves: list[Any]) -> list[int]:
  """Returns each parameter's group: few, none larger than the largest one."""
  most = max(leaf.size for leaf in params_leaves)
  groups, group, filled = [], 0, 0
  for leaf in params_leaves:
    if filled + leaf.size > most:
      group, filled = group + 1, 0
    filled += leaf.size
    groups.append(group)
  return groups


def _owners(opt_state: Any, params: Any) -> list[int | None]:
  """Returns which parameter each leaf of a state belongs to, None for all."""
  known = {path: i for i, path in enumerate(parameter.flatten(params))}

  def owner(path: tuple[str, ...]) -> int | None:
    ends = (path[start:] for start in range(len(path)))
    return next((known[end] for end in ends if end in known), None)

  paths, _ = jax.tree_util.tree_flatten_with_path(opt_state)
  return [owner(parameter.keys(path)) for path, _ in paths]


def _of(group: int, groups: list[int], leaves: list[Any]) -> list[Any]:
  """Returns the leaves of a group."""
  return [leaf for leaf, of in zip(leaves, groups, strict=True) if of == group]


def _put(
  group: int, groups: list[int], leaves: list[Any], own: list[Any]
) -> list[Any]:
  """Returns leaves with those of a group in the place of its own."""
  rest = iter(own)
  return [
    next(rest) if of == group else leaf
    for leaf, of in zip(leaves, groups, strict=True)
  ]


def _not_numbers(leaves: list[jax.Array]) -> list[jax.Array]:
  """Returns leaves with all floats replaced."""
  return [
    jnp.full(leaf.shape, jnp.nan, leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
    else leaf
    for leaf in leaves
  ]


def _on_hosts(leaves: list[jax.Array]) -> list[jax.Array]:
  return [jax.device_put(leaf, jax.memory.Space.Host) for leaf in leaves]
