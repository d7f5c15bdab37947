"""Cross-entropy of an output head, without the logits of all tokens.

Logits are made for some tokens at a time. In training their gradient follows at
once, while they are there; backward only scales what is already known, so that
nothing is computed twice. On several devices each has its own tokens, and those
along the `tensor` axis each their part of the vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.model.decoder import Head
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parameter import EMBED, VOCAB

# Tokens of a device whose logits are in memory together. The gradient of the
# head is read and written once for each such chunk, so the faster a device
# computes compared to its memory, the larger they have to be.
CHUNK = {'cpu': 512}
_CHUNK_OF_ACCELERATORS = 4096


class Targets(NamedTuple):
  """What is to be predicted.

  Attributes:
    ids_BL: The ids, int32; any id for a token without weight.
    weights_BL: What each token's loss is multiplied by, float32.
  """

  ids_BL: jax.Array
  weights_BL: jax.Array


class _Gradients(NamedTuple):
  """The gradients of the loss in what it was computed from."""

  x: jax.Array
  head: Head


class Loss(NamedTuple):
  """The cross-entropy of some tokens, in nats, float32.

  Attributes:
    sum: The weighted sum over all tokens, [].
    of_token_BL: What each token adds to it; without a gradient.
    is_best_BL: Whether no id is likelier than a token's target, bool; one of
      several equally likely ones is.
  """

  sum: jax.Array
  of_token_BL: jax.Array
  is_best_BL: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
  mesh: Mesh, x_BLD: jax.Array, head: Head, targets: Targets
) -> Loss:
  """Returns the loss of tokens, whose sum is differentiable in x_BLD and head.

  The matmuls take operands of the dtype of `x_BLD` and accumulate in float32;
  logits and softmax are float32.

  Args:
    mesh: Where the arrays are, split as `moe_jax.parallel.mesh` says.
    x_BLD: What the head reads, or [B n, L / n, D] where sequences are in n
      shards.
    head: The parameters of the head.
    targets: The targets and their weights.
  """
  return _computed(mesh, x_BLD, head, targets, with_gradient=False)[0]


def _forward(
  mesh: Mesh, x_BLD: jax.Array, head: Head, targets: Targets
) -> tuple[Loss, _Gradients]:
  loss, gradients = _computed(mesh, x_BLD, head, targets, with_gradient=True)
  assert gradients is not None
  return loss, gradients


def _backward(
  mesh: Mesh, gradients: _Gradients, cotangents: Loss
) -> tuple[jax.Array, Head, None]:
  del mesh
  scale = cotangents.sum
  scaled = jax.tree.map(lambda a: (a * scale).astype(a.dtype), gradients)
  return *scaled, None


cross_entropy.defvjp(_forward, _backward)


def chunk_of(platform: str) -> int:
  """Returns how many tokens' logits a device has in memory together."""
  return CHUNK.get(platform, _CHUNK_OF_ACCELERATORS)


def _computed(
  mesh: Mesh,
  x_BLD: jax.Array,
  head: Head,
  targets: Targets,
  *,
  with_gradient: bool,
) -> tuple[Loss, _Gradients | None]:
  shape_BL = targets.ids_BL.shape
  targets = jax.tree.map(lambda a: a.reshape(x_BLD.shape[:2]), targets)
  platform = mesh.devices.flat[0].platform
  local = functools.partial(
    _local,
    chunk=chunk_of(platform),
    softmax=_softmax_of_gpus if platform == 'gpu' else _softmax,
    with_gradient=with_gradient,
  )
  if mesh.size == 1:
    return local(x_BLD, head, targets, None)
  tokens = P(mesh_lib.TOKEN_AXES)
  stored = mesh_lib.spec('head_DV', head.weight_DV.shape, (EMBED, VOCAB), mesh)
  split_vocabulary = stored[1] is not None
  # Specs in the places of arrays: trees of one shape.
  specs: Any = Head
  head_specs = specs(stored, P(stored[1]))
  specs = _Gradients
  gradient_specs = specs(tokens, head_specs) if with_gradient else None
  specs = Loss
  loss, gradients = jax.shard_map(
    functools.partial(
      _of_device, local, mesh_lib.TENSOR if split_vocabulary else None
    ),
    mesh=mesh,
    in_specs=(tokens, head_specs, tokens),
    out_specs=(specs(P(), tokens, tokens), gradient_specs),
    check_vma=True,
  )(x_BLD, head, targets)
  of_each = (a.reshape(shape_BL) for a in (loss.of_token_BL, loss.is_best_BL))
  return Loss(loss.sum, *of_each), gradients


def _of_device(
  local: Callable[..., tuple[Loss, _Gradients | None]],
  axis: str | None,
  x_BLD: jax.Array,
  head: Head,
  targets: Targets,
) -> tuple[Loss, _Gradients | None]:
  """Calls `local` on a device of a mesh; `axis` splits the vocabulary."""
  # Cast before it travels: half the bytes in bfloat16.
  weight_DV = lax.all_gather(
    head.weight_DV.astype(x_BLD.dtype), mesh_lib.FSDP, tiled=True
  )
  loss, gradients = local(x_BLD, Head(weight_DV, head.bias_V), targets, axis)
  loss = loss._replace(sum=lax.psum(loss.sum, mesh_lib.TOKEN_AXES))
  if gradients is None:
    return loss, None
  weight_DV, bias_V = gradients.head
  weight_DV = lax.psum_scatter(weight_DV, mesh_lib.FSDP, tiled=True)
  weight_DV = lax.psum(weight_DV, mesh_lib.REPEATED_AXES)
  bias_V = None if bias_V is None else lax.psum(bias_V, mesh_lib.TOKEN_AXES)
  return loss, _Gradients(gradients.x, Head(weight_DV, bias_V))


def _local(
  x_BLD: jax.Array,
  head: Head,
  targets: Targets,
  axis: str | None,
  *,
  chunk: int,
  softmax: '_Softmax',
  with_gradient: bool,
) -> tuple[Loss, _Gradients | None]:
  """Returns the loss of the tokens that are here, chunk by chunk.

  The gradient of the head is the part of these tokens; that of `x_BLD` is
  whole.
  """
  x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
  head = Head(head.weight_DV.astype(x_BLD.dtype), head.bias_V)
  count = math.ceil(len(x_TD) / chunk)
  tokens = x_TD, *(a.reshape(-1) for a in targets)
  chunks = [_cut(a, count) for a in tokens]
  one = functools.partial(_chunk, head, axis, softmax, with_gradient)

  def add(total: _Sums, chunk: list[jax.Array]) -> tuple[_Sums, _OfTokens]:
    more, of_tokens = one(*chunk)
    return jax.tree.map(jnp.add, total, more), of_tokens

  # Not in the scan: the sums start from what it gives, of the right dtypes and
  # varying over the right axes, and one chunk needs no loop.
  total, of_tokens = one(*[a[0] for a in chunks])
  if count > 1:
    total, rest = lax.scan(add, total, [a[1:] for a in chunks])
    of_tokens = jax.tree.map(
      lambda first, others: jnp.concatenate([first[None], others]),
      of_tokens,
      rest,
    )
  loss, head_grad = total
  loss_C, best_C, grad_CD = of_tokens

  def whole(of_chunks: jax.Array) -> jax.Array:
    return of_chunks.reshape(-1)[: len(x_TD)].reshape(targets.ids_BL.shape)

  found = Loss(loss, whole(loss_C), whole(best_C))
  if grad_CD is None or head_grad is None:
    return found, None
  grad_TD = grad_CD.reshape(-1, x_TD.shape[1])[: len(x_TD)]
  return found, _Gradients(grad_TD.reshape(x_BLD.shape), head_grad)


# The sum of the loss of some tokens, and its gradient in the head.
_Sums = tuple[jax.Array, Head | None]
# The loss of each of them [C], whether its target is the best [C], and the
# gradient of the loss in `x_CD`.
_OfTokens = tuple[jax.Array, jax.Array, jax.Array | None]


def _chunk(
  head: Head,
  axis: str | None,
  softmax: '_Softmax',
  with_gradient: bool,
  x_CD: jax.Array,
  ids_C: jax.Array,
  weights_C: jax.Array,
) -> tuple[_Sums, _OfTokens]:
  """Returns the sums of C tokens, and what is of each."""
  weight_DV, bias_V = head
  logits_CV = jnp.einsum(
    'CD,DV->CV', x_CD, weight_DV, preferred_element_type=jnp.float32
  )
  if bias_V is not None:
    logits_CV += bias_V
  over = _Vocabulary(axis)
  here_C = ids_C - over.first(weight_DV.shape[1])
  top_C, sum_C = softmax(logits_CV, over)
  own_C = over.sum(_look_up(logits_CV, here_C))
  loss_C = (jnp.log(sum_C) + top_C - own_C) * weights_C
  loss, best_C = loss_C.sum(), own_C == top_C
  if not with_gradient:
    return (loss, None), (loss_C, best_C, None)
  own_CV = jnp.arange(weight_DV.shape[1]) == here_C[:, None]
  grad_CV = jnp.exp(logits_CV - top_C[:, None]) * (weights_C / sum_C)[:, None]
  grad_CV = jnp.where(own_CV, grad_CV - weights_C[:, None], grad_CV)
  bias_grad_V = None if bias_V is None else grad_CV.sum(0)
  grad_CV = grad_CV.astype(x_CD.dtype)
  weight_grad_DV = jnp.einsum(
    'CD,CV->DV', x_CD, grad_CV, preferred_element_type=jnp.float32
  )
  grad_CD = jnp.einsum(
    'CV,DV->CD', grad_CV, weight_DV, preferred_element_type=jnp.float32
  )
  grad_CD = over.sum(grad_CD).astype(x_CD.dtype)
  return (loss, Head(weight_grad_DV, bias_grad_V)), (loss_C, best_C, grad_CD)


class _Vocabulary(NamedTuple):
  """The devices that share a vocabulary: those along `axis`, or one."""

  axis: str | None

  def first(self, size: int) -> jax.Array | int:
    """Returns the first id that is here, of `size` on each device."""
    return 0 if self.axis is None else lax.axis_index(self.axis) * size

  def sum(self, a: jax.Array) -> jax.Array:
    return a if self.axis is None else lax.psum(a, self.axis)

  def max(self, a: jax.Array) -> jax.Array:
    return a if self.axis is None else lax.pmax(a, self.axis)


# (logits_CV, over) -> each row's maximum, and its sum of exp(logit - maximum).
_Softmax = Callable[[jax.Array, _Vocabulary], tuple[jax.Array, jax.Array]]


def _softmax(
  logits_CV: jax.Array, over: _Vocabulary
) -> tuple[jax.Array, jax.Array]:
  top_C = over.max(logits_CV.max(-1))
  return top_C, over.sum(jnp.exp(logits_CV - top_C[:, None]).sum(-1))


def _softmax_of_gpus(
  logits_CV: jax.Array, over: _Vocabulary
) -> tuple[jax.Array, jax.Array]:
  """The same, reading the logits once: their bytes are what it costs."""

  def join(a: _TopAndSum, b: _TopAndSum) -> _TopAndSum:
    top = jnp.maximum(a[0], b[0])
    return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

  # Not -inf, which the padding's logits are: their difference is no number.
  nothing = jnp.finfo(logits_CV.dtype).min.astype(logits_CV.dtype)
  own_C, sum_C = lax.reduce(
    (logits_CV, jnp.ones_like(logits_CV)),
    (nothing, jnp.zeros_like(nothing)),
    join,
    dimensions=(1,),
  )
  top_C = over.max(own_C)
  return top_C, over.sum(sum_C * jnp.exp(own_C - top_C))


_TopAndSum = tuple[jax.Array, jax.Array]


def _look_up(logits_CV: jax.Array, ids_C: jax.Array) -> jax.Array:
  """Returns each row's entry at its id; 0 where that is no column."""
  size = logits_CV.shape[1]
  ids_C1 = jnp.clip(ids_C, 0, size - 1)[:, None]
  entry_C = jnp.take_along_axis(logits_CV, ids_C1, axis=1)[:, 0]
  return jnp.where((ids_C >= 0) & (ids_C < size), entry_C, 0.0)


def _cut(a: jax.Array, count: int) -> jax.Array:
  """Cuts [T, ...] into [count, C, ...], adding tokens without weight."""
  padding = [(0, -len(a) % count)] + [(0, 0)] * (a.ndim - 1)
  return jnp.pad(a, padding).reshape(count, -1, *a.shape[1:])
