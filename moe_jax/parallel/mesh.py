"""The mesh, and on which of its axes every parameter is split."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from moe_jax import parameter
from moe_jax.config import BATCH_AXES, MESH_AXES, TOKEN_AXES, mesh_shape
from moe_jax.errors import UserError
from moe_jax.parallel import slices
from moe_jax.parallel.devices import limited_routing
from moe_jax.parameter import Axes

DATA, FSDP, EXPERT, CONTEXT, TENSOR = MESH_AXES
# The axes that split tokens and along which most parameters are repeated.
REPEATED_AXES = tuple(axis for axis in TOKEN_AXES if axis != FSDP)
# The default differs by JAX's version.
_TYPES = (AxisType.Auto,) * len(MESH_AXES)

# The mesh axis that splits an axis of a parameter, by the name that the
# parameter declares for it; an axis of another name, or of none, is not split.
MESH_AXIS = {
  parameter.VOCAB: TENSOR,
  parameter.EMBED: FSDP,
  parameter.HEADS: TENSOR,
  parameter.KV_HEADS: TENSOR,
  parameter.MLP: TENSOR,
  parameter.EXPERT: EXPERT,
}
# A vocabulary is what it is: one that a mesh axis does not divide stays whole.
_OPTIONAL = (parameter.VOCAB,)

# Memory of a host that its devices read and write.
_PINNED = 'pinned_host'

_ROOMY_KINDS = ('TPU v5 lite', 'TPU v6 lite')  # v5e and v6e


def from_config(config: ConfigDict, devices: Sequence[jax.Device]) -> Mesh:
  """Returns the mesh that `mesh.*` makes of the devices.

  Raises:
    UserError: The axes do not multiply to the devices, or to their slices.
  """
  shape = mesh_shape(config, len(devices))
  return make_mesh(shape, devices, slices.slice_shape(config, shape, devices))


def make_mesh(
  shape: dict[str, int],
  devices: Sequence[jax.Device],
  dcn: dict[str, int] | None = None,
) -> Mesh:
  """Returns a mesh with the axes `MESH_AXES`, for the jit partitioner.

  Args:
    shape: The number of devices along each axis; they multiply to all devices.
    devices: The devices as jax lists them, or of a topology to compile for.
    dcn: The number of slices along each axis; None where there is one slice.
  """
  sizes = {axis: shape[axis] for axis in MESH_AXES}
  placed = slices.arrange(sizes, dcn or dict.fromkeys(MESH_AXES, 1), devices)
  return Mesh(placed, MESH_AXES, axis_types=_TYPES)


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
  """Returns the same mesh without devices, for shapes alone.

  Args:
    sizes: The number of devices along every axis.
  """
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=_TYPES)


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """Returns the options of XLA for this mesh, where libtpu's defaults are bad.

  Rows are exchanged while something else is computed, where that compiles. No
  matmul is cut into one per device, to be computed while the parts of a weight
  arrive: these are too small to compute well. And where a core has 128 MiB of
  VMEM a kernel may take 32 of them instead of 16: libtpu 0.0.42 tiles some
  grouped matmuls too large for its own limit.
  """
  device = next(iter(mesh.devices.flat))
  options = {}
  if device.device_kind in _ROOMY_KINDS:
    options['xla_tpu_scoped_vmem_limit_kib'] = '32768'
  if device.platform == 'tpu':
    options['xla_jf_spmd_threshold_for_windowed_einsum_mib'] = '1000000'
  if device.platform == 'tpu' and not limited_routing(device, mesh.size):
    options['xla_tpu_enable_async_all_to_all'] = 'true'
    options['xla_tpu_enable_async_ragged_all_to_all'] = 'true'
  return options


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batches, whose leading axis is B.

  Devices along `context` have whole sequences of it: it is small.
  """
  return NamedSharding(mesh, P(BATCH_AXES))


def memory_sharding(
  mesh: Mesh | AbstractMesh, behind: tuple[str, ...] = ()
) -> NamedSharding:
  """Returns the sharding of arrays [layers, B, ...], split as tokens are.

  Args:
    mesh: A mesh with the axes `MESH_AXES`.
    behind: The axes that split what comes behind B; the rest is not split.
  """
  return NamedSharding(mesh, P(None, TOKEN_AXES, *behind))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, P())


def in_host_memory(sharding: Sharding) -> Sharding:
  """Returns the sharding that keeps the same arrays in the hosts' memory.

  It is pinned, so that devices read and write it themselves.
  """
  return sharding.with_memory_kind(_PINNED)


def has_host_memory(device: jax.Device) -> bool:
  """Returns whether a device can keep arrays in its host's memory."""
  return _PINNED in {each.kind for each in device.addressable_memories()}


def is_in_host_memory(sharding: Sharding) -> bool:
  """Returns whether arrays so sharded are in the memory of hosts."""
  return sharding.memory_kind == _PINNED


def in_device_memory(tree: Any) -> Any:
  """Returns arrays of a traced function in the memory of the devices."""
  return jax.device_put(tree, jax.memory.Space.Device)


def shard_tokens(
  x: jax.Array,
  mesh: Mesh | None,
  axis: int = 0,
  behind: tuple[str, ...] = (),
  axes: tuple[str, ...] = TOKEN_AXES,
) -> jax.Array:
  """Constrains the axis of B or T to axes of the mesh, if there is one.

  Args:
    x: The array.
    mesh: Where it is; None for one device.
    axis: The axis of B or T.
    behind: As in `memory_sharding`.
    axes: Those that split it, `BATCH_AXES` where rows are whole sequences.
  """
  if mesh is None or mesh.size == 1:
    return x
  spec = P(*(None,) * axis, axes, *behind)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def shardings(
  tree: Any, params: Any, declarations: Any, mesh: Mesh | AbstractMesh
) -> Any:
  """Returns the sharding of every leaf of a train state, or of a part of it.

  Args:
    tree: Leaves with a shape: parameters, or what is made of them, such as an
      optimizer's moments, and has the end of its path from a parameter. What is
      below a key 'memory' is [layers, B, W, D]. Anything else is held whole by
      every device.
    params: The model's parameters, or their shapes.
    declarations: What each parameter is, a tree like `params`.
    mesh: A mesh with the axes `MESH_AXES`.

  Raises:
    UserError: A mesh axis does not divide a dimension of a parameter.
  """
  declared, known = map(parameter.flatten, (declarations, params))

  def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    keys = parameter.keys(path)
    for end in (keys[start:] for start in range(len(keys))):
      if end in declared:
        axes = _axes_of(leaf.shape, declared[end].axes, known[end].shape)
        name = '/'.join(keys)
        return NamedSharding(mesh, spec(name, leaf.shape, axes, mesh))
    return memory_sharding(mesh) if 'memory' in keys else replicated(mesh)

  return jax.tree_util.tree_map_with_path(sharding, tree)


def spec(
  name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh | AbstractMesh
) -> P:
  """Returns how the mesh splits an array.

  Args:
    name: The array's name, for the error.
    shape: Its shape.
    axes: The names of its last axes, as parameters declare them.
    mesh: A mesh with the axes `MESH_AXES`.

  Raises:
    UserError: A mesh axis does not divide its dimension.
  """
  names = (None,) * (len(shape) - len(axes)) + axes
  split = []
  for axis, size in zip(names, shape, strict=True):
    mesh_axis = MESH_AXIS.get(axis) if axis else None
    count = mesh.shape[mesh_axis] if mesh_axis else 1
    if size % count == 0:
      split.append(mesh_axis)
    elif axis in _OPTIONAL:
      split.append(None)
    else:
      raise UserError(
        f'mesh.{mesh_axis} = {count} does not divide {size}, a dimension of'
        f' {name}; choose a mesh.{mesh_axis} that divides it'
      )
  return P(*split)


def _axes_of(
  shape: tuple[int, ...], axes: Axes, param_shape: tuple[int, ...]
) -> Axes:
  """Returns the names of the axes of what an optimizer keeps for a parameter.

  It has the parameter's shape, or that without one dimension, over which
  factored moments are sums; anything else is not split.
  """
  axes = (None,) * (len(param_shape) - len(axes)) + axes
  if shape == param_shape:
    return axes
  for i in range(len(param_shape)):
    if shape == param_shape[:i] + param_shape[i + 1 :]:
      return axes[:i] + axes[i + 1 :]
  return ()
