"""Causal attention by the libraries' fused kernels, on GPU and TPU.

None of them keeps a square of positions. They are programs for one device, so
on several each computes its own sequences and heads in a `shard_map`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from moe_jax.model.attention import ATTENDED, ATTENTIONS, Case, CausalAttention
from moe_jax.model.attention_blocks import same_segment
from moe_jax.parallel import context
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.devices import capability

_LANES = 128  # of a TPU's vector registers, which fill its blocks
# Of queries and keys that a TPU core brings in at a time, and of keys that it
# multiplies at a time. MaxText's recipes bring in up to 2048, for which they
# allow kernels more memory.
_BLOCK, _COMPUTE = 1024, 512

# Of queries, keys and values, and ids of segments where there are some.
_Attention = Callable[..., jax.Array]


CUDNN, SPLASH = 'cudnn', 'splash'
CUDNN_FAILS = 'cannot be called'  # how that obstacle begins


def cudnn(
  query_BLHA: jax.Array,
  key_BLGA: jax.Array,
  value_BLGA: jax.Array,
  segment_ids_BL: jax.Array | None = None,
) -> jax.Array:
  """Calls cuDNN's flash attention, for bfloat16 and float16.

  JAX's interface to it takes segments as a mask.
  """
  mask = None
  length = query_BLHA.shape[1]
  if segment_ids_BL is not None:
    if length % 2:  # which it does not train with a mask
      padded = _padded(1, query_BLHA, key_BLGA, value_BLGA, segment_ids_BL)
      return cudnn(*padded)[:, :length]
    mask = same_segment(segment_ids_BL, segment_ids_BL)[:, None]
  return jax.nn.dot_product_attention(
    query_BLHA,
    key_BLGA,
    value_BLGA,
    mask=mask,
    is_causal=True,
    implementation='cudnn',
  )


@functools.cache
def _cudnn_failure(dtype: jnp.dtype, head_dim: int) -> str | None:
  """Returns the obstacle of a cuDNN that does not load here or is too old.

  JAX asks cuDNN for its version when it traces a call.
  """
  shape = jax.ShapeDtypeStruct((1, _LANES, 1, head_dim), dtype)
  try:
    jax.eval_shape(cudnn, shape, shape, shape)
  except (OSError, RuntimeError, ValueError) as error:
    return f'{CUDNN_FAILS}: {" ".join(str(error).split())[:200]}'
  return None


def splash(
  query_BLHA: jax.Array,
  key_BLGA: jax.Array,
  value_BLGA: jax.Array,
  segment_ids_BL: jax.Array | None = None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Calls JAX's splash attention, a Pallas kernel for TPUs.

  `interpret` runs its program on any device, slowly.
  """
  length, heads, head_dim = query_BLHA.shape[1:]
  padding = -length % _LANES
  if padding:
    padded = _padded(padding, query_BLHA, key_BLGA, value_BLGA, segment_ids_BL)
    return splash(*padded, interpret=interpret)[:, :length]
  mask = splash_attention.MultiHeadMask(
    [splash_attention.CausalMask((length, length))] * heads
  )
  attend = splash_attention.make_splash_mha(
    mask,
    block_sizes=_block_sizes(length),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=ATTENDED,
    interpret=interpret,
  )
  query_BHLA = query_BLHA.swapaxes(1, 2) * head_dim**-0.5  # it does not scale
  segments = None
  if segment_ids_BL is not None:
    segments = splash_attention.SegmentIds(segment_ids_BL, segment_ids_BL)
  attended_BHLA = jax.vmap(attend)(
    query_BHLA, key_BLGA.swapaxes(1, 2), value_BLGA.swapaxes(1, 2), segments
  )
  return attended_BHLA.swapaxes(1, 2)


def _padded(count: int, *arrays: jax.Array | None) -> list[Any]:
  """Adds positions at the end, where causality hides them.

  They are of segment 0, as padding is, and so each sees itself.
  """
  return [
    a
    if a is None
    else jnp.pad(a, [(0, 0), (0, count)] + [(0, 0)] * (a.ndim - 2))
    for a in arrays
  ]


def sharded(
  attention: _Attention, mesh: jax.sharding.Mesh | None
) -> _Attention:
  """Returns the same, run on every device's own sequences and heads."""
  if mesh is None or mesh.size == 1:
    return attention
  rows, spec = P(mesh_lib.BATCH_AXES), context.WHOLE

  def attend(*arrays: jax.Array) -> jax.Array:
    # Unchecked, as the kernels do not say along which axes their results vary.
    # Neither going in nor coming out is an array with heads the same on two
    # devices; the ids of segments are, and have no gradient.
    return jax.shard_map(
      attention,
      mesh=mesh,
      in_specs=tuple(spec if a.ndim == 4 else rows for a in arrays),
      out_specs=spec,
      check_vma=False,
    )(*arrays)

  return attend


def _block_sizes(length: int) -> splash_attention.BlockSizes:
  """Returns the largest that divide the length.

  In one kernel all gradients would save two products of a square. But of those
  of queries it makes a part per block of keys, and to add them up costs more,
  by the compiler's count, than these products.
  """
  block, compute = (
    next(n for n in range(most, 0, -_LANES) if length % n == 0)
    for most in (_BLOCK, _COMPUTE)
  )
  if block % compute:  # as a kernel takes a block in equal parts
    compute = block
  return splash_attention.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=compute,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=compute,
    block_q_dq=block,
    block_kv_dq=block,
  )


class _KernelAttention(CausalAttention):
  """A kernel on every device's own sequences and heads.

  Attributes:
    kernel: The function of queries, keys and values, and ids of segments.
  """

  kernel: _Attention

  def __call__(
    self, query_BLHA: jax.Array, key_BLGA: jax.Array, value_BLGA: jax.Array
  ) -> jax.Array:
    """Returns softmax attention, [B, L, H, A]."""
    attend = sharded(self.kernel, self.case.mesh)
    return attend(query_BLHA, key_BLGA, value_BLGA)

  def within(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    segment_ids_BL: jax.Array,
  ) -> jax.Array:
    """Returns the same within segments."""
    attend = sharded(self.kernel, self.case.mesh)
    return attend(query_BLHA, key_BLGA, value_BLGA, segment_ids_BL)


@ATTENTIONS.register(CUDNN)
class CudnnAttention(_KernelAttention):
  """`cudnn`; of packed rows its mask is a square, 16 bits each."""

  kernel = staticmethod(cudnn)

  @classmethod
  def obstacle(cls, case: Case) -> str | None:
    """Returns why it does not fit a case, or None if it does."""
    if case.device.platform != 'gpu':
      return f'runs on NVIDIA GPUs, not on {case.device.platform}'
    version = capability(case.device)
    if version < (8, 0):
      has = getattr(case.device, 'compute_capability', 'none')
      return f'needs compute capability 8.0, and the device has {has}'
    if case.dtype not in (jnp.bfloat16, jnp.float16):
      return f'computes in 16 bits, and model.dtype comes to {case.dtype}'
    largest = 256 if version >= (9, 0) else 128
    if case.head_dim % 8 or case.head_dim > largest:
      return (
        f'takes head sizes that are multiples of 8 up to {largest}, not'
        f' {case.head_dim}'
      )
    if case.device in jax.devices():  # of others nothing is known
      return _cudnn_failure(case.dtype, case.head_dim)
    return None


@ATTENTIONS.register(SPLASH)
class SplashAttention(_KernelAttention):
  """`splash`."""

  kernel = staticmethod(splash)

  @classmethod
  def obstacle(cls, case: Case) -> str | None:
    """Returns why it does not fit a case, or None if it does."""
    if case.device.platform != 'tpu':
      return f'runs on TPUs, not on {case.device.platform}'
    return None
