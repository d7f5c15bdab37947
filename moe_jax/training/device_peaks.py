"""What devices can do at most, to say how much of it training achieves.

The figures are the vendors', for dense operands (NVIDIA prints those "with
sparsity", which are twice as high):

  TPU    https://cloud.google.com/tpu/docs/v4, and .../v5e, .../v5p, .../v6e,
         .../tpu7x; per chip, of which a TPU7x shows as two devices
  A100   https://www.nvidia.com/en-us/data-center/a100
  H100   https://www.nvidia.com/en-us/data-center/h100
  H200   https://www.nvidia.com/en-us/data-center/h200
  GH200  NVIDIA GH200 Grace Hopper Superchip datasheet
  B200   NVIDIA Blackwell datasheet, HGX B200 and GB200 (per GPU):
         https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703
"""

import re
from typing import NamedTuple

import jax


class _Peak(NamedTuple):
  """Dense matmuls of one jax device, 10^12 operations a second.

  Attributes:
    kind: The pattern of `jax.Device.device_kind`.
    bfloat16: The rate with operands of 16 bits.
    float32: The rate as JAX multiplies float32 by default: on NVIDIA's GPUs in
      TF32; 0 where no figure is published.
  """

  kind: str
  bfloat16: float
  float32: float = 0.0


# The first that matches counts; an H100 that says no other form is SXM.
_PEAKS = (
  _Peak(r'TPU v4', 275),
  _Peak(r'TPU v5( lite|e)', 197),
  _Peak(r'TPU v5p?', 459),
  _Peak(r'TPU v6( lite|e)', 918),
  _Peak(r'TPU ?(v7|7x).*', 2307 / 2),
  _Peak(r'NVIDIA A100.*', 312, 156),
  _Peak(r'NVIDIA H100 PCIe.*', 756, 378),
  _Peak(r'NVIDIA (H100|H200) NVL.*', 835.5, 417.5),
  _Peak(r'NVIDIA (H100|H200|GH200).*', 989.5, 494.5),
  _Peak(r'NVIDIA B200.*', 2250, 1100),
  _Peak(r'NVIDIA GB200.*', 2500, 1250),
)


def peak(device_kind: str, dtype: str) -> float | None:
  """Returns the operations a second of a device; None where nobody says.

  Args:
    device_kind: The `device_kind` of a jax device.
    dtype: The dtype of the arithmetic.
  """
  for known in _PEAKS:
    if re.fullmatch(known.kind, device_kind):
      return getattr(known, dtype, 0) * 1e12 or None
  return None


def utilisation(
  flops_per_second: float, devices: list[jax.Device], dtype: str
) -> dict[str, float]:
  """Returns what a model's operations come to, per device.

  Args:
    flops_per_second: The rate of all devices, counted as `model.sizes` does:
      what the model asks for, not what is computed again or in vain.
    devices: The devices that share them, all of a kind.
    dtype: The dtype of the arithmetic.

  Returns:
    The `tflops_per_second` of a device; and where its peak is known `mfu`, the
    share of it (model FLOPs utilisation, PaLM, arXiv 2204.02311, appendix B).
  """
  each = flops_per_second / len(devices)
  most = peak(devices[0].device_kind, dtype)
  share = {} if most is None else {'mfu': each / most}
  return {'tflops_per_second': each / 1e12} | share
