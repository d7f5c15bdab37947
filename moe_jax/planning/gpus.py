"""GPUs by name, and the text by which XLA's compiler knows one that is absent.

Without the device XLA wants its properties, those that CUDA would tell: a text
of its message `GpuTargetConfigProto`. It is made here of published figures:

  A100  https://www.nvidia.com/en-us/data-center/a100, and NVIDIA A100 Tensor
        Core GPU Architecture (white paper)
  H100  https://www.nvidia.com/en-us/data-center/h100, and NVIDIA H100 Tensor
        Core GPU Architecture (white paper)
  H200  https://www.nvidia.com/en-us/data-center/h200
  B200  NVIDIA Blackwell datasheet, HGX B200

Sizes of shared memory, blocks and registers go with the compute capability:
CUDA C++ Programming Guide, "Compute Capabilities".
"""

import os
from typing import Any, NamedTuple

from moe_jax import runtime
from moe_jax.errors import UserError

# The oldest that JAX's wheels take; newer ones only choose more.
_CUDA, _CUDNN = (13, 0, 0), (9, 12, 0)

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
# Numbers of XLA's element types, by the operations that a tensor core does in
# the time of one of 16 bits.
_TENSOR_TYPES = {
  'eight bits': ((2, 6, 19, 20), 2.0),  # s8, u8, f8e5m2, f8e4m3fn
  'sixteen bits': ((10, 16), 1.0),  # f16, bf16
  'TF32': ((11,), 0.5),  # f32
}
_FLOAT64 = 12
# Of the vector units: s32, u32, f16, f32, bf16.
_VECTOR_TYPES = (4, 8, 10, 11, 16)


class Gpu(NamedTuple):
  """A kind of GPU, in the form with NVLink (SXM).

  Attributes:
    kind: The `device_kind` that JAX gives it.
    capability: Its compute capability.
    multiprocessors: How many it has.
    hertz: Their boost clock.
    memory_bytes: Its memory as CUDA tells it: less than is advertised, by what
      the driver keeps.
    bytes_per_second: The bandwidth of that memory.
    l2_bytes: The size of its L2 cache.
    shared_bytes: The shared memory of a multiprocessor, of which a block may
      have all but 1 KiB.
    fused_16: Fused multiply-adds of 16 bits that a multiprocessor's tensor
      cores do in a cycle.
    fused_64: The same of float64.
    vector_64: Float64 units of a multiprocessor.
    links: The number of its NVLinks.
  """

  kind: str
  capability: tuple[int, int]
  multiprocessors: int
  hertz: float
  memory_bytes: int
  bytes_per_second: float
  l2_bytes: int
  shared_bytes: int
  fused_16: int
  fused_64: int
  vector_64: int
  links: int

  @property
  def lanes(self) -> int:
    """The float32 units of a multiprocessor."""
    return 64 if self.capability == (8, 0) else 128

  @property
  def link_bytes_per_second(self) -> float:
    """What it sends over all its NVLinks together."""
    return self.links * (50e9 if self.capability >= (10, 0) else 25e9)

  def flops_per_second(self, precision: str) -> float:
    """Returns the peak of matmuls in a precision, as `hlo.Matmul` names it."""
    if precision == 'float32':
      return 2 * self.lanes * self.multiprocessors * self.hertz
    sixteen = 2 * self.fused_16 * self.multiprocessors * self.hertz
    return sixteen / 2 if precision == 'tf32' else sixteen


_H100 = Gpu(
  'NVIDIA H100 80GB HBM3',
  (9, 0),
  multiprocessors=132,
  hertz=1.98e9,
  memory_bytes=int(79.10 * _GIB),
  bytes_per_second=3.35e12,
  l2_bytes=50 * _MIB,
  shared_bytes=228 * _KIB,
  fused_16=2048,
  fused_64=128,
  vector_64=64,
  links=18,
)

GPUS = {
  'a100': Gpu(
    'NVIDIA A100-SXM4-80GB',
    (8, 0),
    multiprocessors=108,
    hertz=1.41e9,
    memory_bytes=int(79.15 * _GIB),
    bytes_per_second=2.039e12,
    l2_bytes=40 * _MIB,
    shared_bytes=164 * _KIB,
    fused_16=1024,
    fused_64=64,
    vector_64=32,
    links=12,
  ),
  'h100': _H100,
  # The same chip with more memory.
  'h200': _H100._replace(
    kind='NVIDIA H200',
    memory_bytes=int(139.80 * _GIB),
    bytes_per_second=4.8e12,
  ),
  'b200': Gpu(
    'NVIDIA B200',
    (10, 0),
    multiprocessors=148,
    hertz=1.965e9,
    memory_bytes=int(178.35 * _GIB),
    bytes_per_second=8e12,
    l2_bytes=126 * _MIB,
    shared_bytes=228 * _KIB,
    fused_16=4096,
    fused_64=64,
    vector_64=64,
    links=18,
  ),
}


def of_kind(device_kind: str) -> Gpu | None:
  """Returns the GPU that JAX gives this `device_kind`, None if not known."""
  return next((gpu for gpu in GPUS.values() if gpu.kind == device_kind), None)


def usable_bytes(gpu: Gpu) -> int:
  """Returns the bytes that JAX takes of a GPU's memory for our programs.

  The share is that of `runtime.configure_gpu`.

  Raises:
    UserError: The variable does not hold a share.
  """
  variable = runtime.gpu_memory_variable()
  text = os.environ.get(variable) or runtime.GPU_MEMORY_SHARE
  try:
    fraction = float(text)
  except ValueError as error:
    raise UserError(
      f"{variable} = {text!r} is no number: it is the share of a GPU's memory"
      ' that JAX takes, such as 0.9'
    ) from error
  return int(fraction * gpu.memory_bytes)


def target_config(gpu: Gpu) -> str:
  """Returns the text of XLA's `GpuTargetConfigProto` that describes a GPU."""
  major, minor = gpu.capability
  capability: dict[str, Any] = {'major': major, 'minor': minor}
  if major >= 9:  # wgmma and what came later
    capability['feature_extension'] = _Name('ACCELERATED_FEATURES')
  cuda, cudnn = ('.'.join(map(str, version)) for version in (_CUDA, _CUDNN))
  device = {
    'threads_per_block_limit': 1024,
    'threads_per_warp': 32,
    'shared_memory_per_block': 48 * _KIB,
    'shared_memory_per_core': gpu.shared_bytes,
    'shared_memory_per_block_optin': gpu.shared_bytes - _KIB,
    'threads_per_core_limit': 2048,
    'core_count': gpu.multiprocessors,
    'fpus_per_core': gpu.lanes,
    'block_dim_limit_x': (1 << 31) - 1,
    'block_dim_limit_y': (1 << 16) - 1,
    'block_dim_limit_z': (1 << 16) - 1,
    'thread_dim_limit_x': 1024,
    'thread_dim_limit_y': 1024,
    'thread_dim_limit_z': 64,
    'registers_per_core_limit': 1 << 16,
    'registers_per_block_limit': 1 << 16,
    'memory_bandwidth': int(gpu.bytes_per_second),
    'l2_cache_size': gpu.l2_bytes,
    'clock_rate_ghz': gpu.hertz / 1e9,
    'device_memory_size': gpu.memory_bytes,
    'cuda_compute_capability': capability,
    'scalar_unit_description': _rates(gpu, _vector_rates(gpu)),
    'matrix_unit_description': _rates(gpu, _tensor_rates(gpu)),
    'device_vendor': 'NVIDIA Corporation',
    'platform_version': f'Compute Capability {major}.{minor}',
    'device_address_bits': 64,
    'ecc_enabled': _Name('true'),
    'name': gpu.kind,
    'driver_version': cuda,
    'runtime_version': cuda,
    'compile_time_toolkit_version': cuda,
    'dnn_version': cudnn,
    'device_interconnect_info': {'active_links': gpu.links},
  }
  return _text(
    {
      'gpu_device_info': device,
      'platform_name': 'CUDA',
      'dnn_version_info': dict(
        zip(('major', 'minor', 'patch'), _CUDNN, strict=True)
      ),
      'device_description_str': gpu.kind,
    }
  )


class _Name(str):
  """A word of the text that is no string: of an enumeration, or a truth."""


def _vector_rates(gpu: Gpu) -> dict[int, tuple[int, int]]:
  """Returns units and operations a cycle by element type; see `_rates`."""
  rates = dict.fromkeys(_VECTOR_TYPES, (gpu.lanes, 1))
  return rates | {_FLOAT64: (gpu.vector_64, 1)}


def _tensor_rates(gpu: Gpu) -> dict[int, tuple[int, int]]:
  # Every multiprocessor has four tensor cores.
  rates = {
    number: (4, int(gpu.fused_16 * share) // 4)
    for numbers, share in _TENSOR_TYPES.values()
    for number in numbers
  }
  return rates | {_FLOAT64: (4, gpu.fused_64 // 4)}


def _rates(gpu: Gpu, by_type: dict[int, tuple[int, int]]) -> dict[str, list]:
  return {
    'rate_infos': [
      {
        'key': number,
        'value': {
          'clock_rate_ghz': gpu.hertz / 1e9,
          'units_per_core': units,
          'ops_per_clock': operations,
        },
      }
      for number, (units, operations) in by_type.items()
    ]
  }


def _text(message: dict) -> str:
  """Returns a message in protobuf's text format."""
  fields = []
  for name, value in message.items():
    for each in value if isinstance(value, list) else [value]:
      if isinstance(each, dict):
        fields.append(f'{name} {{ {_text(each)} }}')
      elif isinstance(each, str) and not isinstance(each, _Name):
        fields.append(f'{name}: "{each}"')
      else:
        fields.append(f'{name}: {each}')
  return ' '.join(fields)
