"""The mesh and the one table that says where every parameter lives."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from moe_jax.config import BATCH_AXES, MESH_AXES, mesh_shape
from moe_jax.errors import UserError
from moe_jax.parallel import slices
from moe_jax.parallel.devices import limited_routing

# Those along which parameters are repeated, not split.
REPEATED_AXES = tuple(axis for axis in BATCH_AXES if axis != 'fsdp')
_TYPES = (AxisType.Auto,) * len(
  MESH_AXES
)  # the default differs by JAX's version

# (pattern of a parameter's name, its spec). The first match counts; a name
# that matches none is an error. Stacked parameters get a leading None, and the
# optimizer's moments, which carry their parameters' names, the same spec.
RULES = (
  (r'embed_VD', P('tensor', 'fsdp')),
  (r'head_DV', P('fsdp', 'tensor')),
  (r'(query|key|value)_D[HG]A', P('fsdp', 'tensor', None)),
  (r'out_HAD', P('tensor', None, 'fsdp')),
  (r'gate_up_D2F', P('fsdp', None, 'tensor')),
  (r'down_FD', P('tensor', 'fsdp')),
  (r'gate_up_ND2F', P('expert', 'fsdp', None, 'tensor')),
  (r'up_DF', P('fsdp', 'tensor')),
  (r'up_NDF', P('expert', 'fsdp', 'tensor')),
  (r'down_NFD', P('expert', 'tensor', 'fsdp')),
  (r'up_bias_NF', P('expert', 'tensor')),
  (r'down_bias_ND', P('expert', 'fsdp')),
  # Small, and read by every token: a copy on every device.
  (r'projector_DR|coefficient_D2', P(None, None)),
  (r'(input|hidden)_[XR]R|(input|hidden)_bias_[34]R', P(None, None)),
  (r'(input|hidden)_[XR][34]R', P(None, None, None)),
  (r'(input|hidden|mlp)_bias_[RF]', P(None)),
  (r'(weight|mlp|reduction|embedding)_(XN|FN|XF|XE|NX|NE)', P(None, None)),
  (r'embedding_X|(choice_)?bias_N', P(None)),
  (r'log_temperature', P()),
  (r'fixed_(weight_XN|table_VN|up_XF|weights_bias_XN|bias_FN)', P(None, None)),
  (r'fixed_weights_FXN', P(None, None, None)),
  (r'fixed_(up_bias_F|bias_bias_N)', P(None)),
  (r'key_pe_AW', P(None, None)),
  (r'scale_D|shift_D|bias_D|bias_2', P(None)),
  (r'up_bias_F|down_bias_D|head_bias_V', P(None)),
  # Of a run: hidden states of every layer, with the sequences they came from.
  (r'memory', P(None, BATCH_AXES, None, None)),
  (r'key', P(None)),
  (r'count|step', P()),
)

_ROOMY_KINDS = ('TPU v5 lite', 'TPU v6 lite')  # v5e and v6e


def from_config(config: ConfigDict, devices: Sequence[jax.Device]) -> Mesh:
  """The mesh that `mesh.*` makes of the devices: `make_mesh` of its sizes.

  Raises:
    UserError: the devices, or their slices, are not what the axes multiply to.
  """
  shape = mesh_shape(config, len(devices))
  return make_mesh(shape, devices, slices.slice_shape(config, shape, devices))


def make_mesh(
  shape: dict[str, int],
  devices: Sequence[jax.Device],
  dcn: dict[str, int] | None = None,
) -> Mesh:
  """A mesh with the axes `MESH_AXES`, sharded by the jit partitioner.

  Args:
    shape: devices along each axis; their product is len(devices).
    devices: as jax lists them, or a topology to compile for.
    dcn: slices along each axis; None: there is one.
  """
  sizes = {axis: shape[axis] for axis in MESH_AXES}
  placed = slices.arrange(sizes, dcn or dict.fromkeys(MESH_AXES, 1), devices)
  return Mesh(placed, MESH_AXES, axis_types=_TYPES)


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
  """The same of devices that need not be anywhere, for shapes alone.

  Args:
    sizes: devices along every axis.
  """
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=_TYPES)


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """What XLA is told of programs for this mesh: on TPUs, not libtpu's defaults.

  Slots are exchanged while something else is computed, where that compiles. And
  where a core has 128 MiB of VMEM a kernel may take 32 of them instead of 16:
  libtpu 0.0.42 tiles some grouped matmuls too large for its own limit.
  """
  device = next(iter(mesh.devices.flat))
  options = {}
  if device.device_kind in _ROOMY_KINDS:
    options['xla_tpu_scoped_vmem_limit_kib'] = '32768'
  if device.platform == 'tpu' and not limited_routing(device, mesh.size):
    options['xla_tpu_enable_async_all_to_all'] = 'true'
    options['xla_tpu_enable_async_ragged_all_to_all'] = 'true'
  return options


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of arrays whose leading axis is the batch or its tokens."""
  return NamedSharding(mesh, P(BATCH_AXES))


def memory_sharding(mesh: Mesh) -> NamedSharding:
  """Of arrays [layers, B, W, D]: split as the batch they belong to."""
  return NamedSharding(mesh, P(None, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Of arrays that every device holds whole."""
  return NamedSharding(mesh, P())


def shard_tokens(x: jax.Array, mesh: Mesh | None, axis: int = 0) -> jax.Array:
  """Constrains the axis of B or T to the token axes of the mesh, if any."""
  if mesh is None or mesh.size == 1:
    return x
  spec = P(*(None,) * axis, BATCH_AXES)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def shardings(tree: Any, mesh: Mesh) -> Any:
  """The sharding of every leaf of a tree of parameters or optimizer state.

  Args:
    tree: leaves with a shape; the last key of a leaf's path is its name.
    mesh: with the axes `MESH_AXES`.

  Raises:
    UserError: an axis does not divide its dimension.
    KeyError: no rule knows the name; `RULES` needs a line.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, _spec(path, leaf.shape, mesh)),
    tree,
  )


def _spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
  names = [str(getattr(k, 'key', getattr(k, 'name', k))) for k in path]
  spec = _rule(names[-1])
  if 'periods' in names:
    spec = P(None, *spec)
  if len(spec) != len(shape):
    raise ValueError(f'{"/".join(names)} of shape {shape} has the rule {spec}')
  axes = []
  for axis, size in zip(spec, shape, strict=True):
    named = (axis,) if isinstance(axis, str) else axis or ()
    count = math.prod(mesh.shape[name] for name in named)
    if size % count == 0:
      axes.append(axis)
    elif names[-1] in ('embed_VD', 'head_DV'):
      axes.append(None)  # a vocabulary is what it is: keep it whole
    else:
      raise UserError(
        f'mesh.{axis} = {count} does not divide {size}, a dimension of'
        f' {"/".join(names)}; choose a mesh.{axis} that divides it'
      )
  return P(*axes)


def _rule(name: str) -> P:
  for pattern, spec in RULES:
    if re.fullmatch(pattern, name):
      return spec
  raise KeyError(f'no sharding rule for the parameter {name!r}')
