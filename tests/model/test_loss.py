"""The chunked loss and its gradient against float64, on several meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model import loss as module
from moe_jax.model.decoder import Head
from moe_jax.model.loss import Loss, Targets, cross_entropy
from moe_jax.parallel import mesh as mesh_lib

MESHES = {
  'one device': {},
  'tokens and vocabulary': {'data': 2, 'fsdp': 2, 'tensor': 2},
  'experts and positions': {'expert': 2, 'context': 2, 'fsdp': 2},
}


def mesh_of(axes: dict[str, int]) -> jax.sharding.Mesh:
  shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | axes
  size = int(np.prod(list(shape.values())))
  return mesh_lib.make_mesh(shape, jax.devices()[:size])


def random_case(vocab: int, biased: bool) -> tuple[Any, Head, Targets]:
  """Eight sequences of 5 tokens; logits up to a hundred, some no weight."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((8, 5, 6))
  weight = rng.standard_normal((6, vocab)) * 20
  bias = rng.standard_normal(vocab) if biased else None
  ids = rng.integers(0, vocab, (8, 5))
  weights = rng.uniform(0.1, 2, (8, 5)) * (rng.uniform(size=(8, 5)) < 0.7)
  return x, Head(weight, bias), Targets(ids, weights)


def oracle(x: Any, head: Head, targets: Targets) -> tuple[Any, Any, Head]:
  """The loss of each token, and its gradients in `x` and the head; float64."""
  bias = 0 if head.bias_V is None else head.bias_V
  logits = x @ head.weight_DV + bias
  logits = logits - logits.max(-1, keepdims=True)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  own = np.eye(p.shape[-1])[targets.ids_BL]
  weights = targets.weights_BL
  # log p by the logits: p itself underflows.
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  loss = -np.where(own, log_p, 0).sum(-1) * weights
  g = (p - own) * weights[..., None]
  of_bias = None if head.bias_V is None else g.sum((0, 1))
  of_weight = np.einsum('bld,blv->dv', x, g)
  return loss, g @ head.weight_DV.T, Head(of_weight, of_bias)


def run(
  mesh: jax.sharding.Mesh, x: Any, head: Head, targets: Targets, dtype: str
) -> Any:
  """The loss of a training step and of an evaluation, and the gradients."""

  @jax.jit
  def both(x: Any, head: Head, targets: Targets) -> Any:
    def loss(x: Any, head: Head) -> tuple[jax.Array, Loss]:
      found = cross_entropy(mesh, x, head, targets)
      # A gradient that is scaled once more on its way back.
      return 3 * found.sum, found

    grads, of_training = jax.grad(loss, (0, 1), has_aux=True)(x, head)
    return of_training, cross_entropy(mesh, x, head, targets), grads

  as_float = jax.tree.map(
    lambda a: jnp.asarray(a, jnp.float32), (head, targets)
  )
  ids = jnp.asarray(targets.ids_BL, jnp.int32)
  return both(jnp.asarray(x, dtype), as_float[0], Targets(ids, as_float[1][1]))


@pytest.mark.parametrize('softmax', ['_softmax', '_softmax_of_gpus'])
@pytest.mark.parametrize('axes', MESHES.values(), ids=MESHES)
@pytest.mark.parametrize(
  ('vocab', 'biased'), [(32, True), (31, False)], ids=['even', 'odd']
)
def test_equals_float64(
  axes: dict[str, int],
  vocab: int,
  biased: bool,
  softmax: str,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Chunks of 3 tokens, the last not full; a vocabulary split and not.

  Padding is at its end, on two devices all that one of them has.
  """
  monkeypatch.setitem(module.CHUNK, 'cpu', 3)
  monkeypatch.setattr(module, '_softmax', getattr(module, softmax))
  case = random_case(vocab, biased)
  if biased:
    case[1].bias_V[16:] = -np.inf
    case[2].ids_BL[:] %= 16
  loss, of_x, of_head = oracle(*case)
  training, evaluation, grads = run(mesh_of(axes), *case, 'float32')
  for found in training, evaluation:
    np.testing.assert_allclose(found.sum, loss.sum(), rtol=1e-6)
    # A logit of a hundred has a last bit of 8e-6.
    np.testing.assert_allclose(found.of_token_BL, loss, rtol=1e-5, atol=8e-6)
  for ours, exact in zip(
    jax.tree.leaves(grads), jax.tree.leaves((of_x, of_head)), strict=True
  ):
    scale = np.abs(exact).max()
    np.testing.assert_allclose(ours / 3, exact, atol=1e-5 * scale)


@pytest.mark.parametrize('axes', MESHES.values(), ids=MESHES)
def test_tells_which_targets_are_the_best(
  axes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
  """About half of them; in training and in evaluation."""
  monkeypatch.setitem(module.CHUNK, 'cpu', 3)
  x, head, (ids, weights) = random_case(32, True)
  best = (x @ head.weight_DV + head.bias_V).argmax(-1)
  chosen = np.random.default_rng(1).uniform(size=ids.shape) < 0.5
  ids = np.where(chosen, best, ids)
  training, evaluation, _ = run(
    mesh_of(axes), x, head, Targets(ids, weights), 'float32'
  )
  assert 10 < (ids == best).sum() < 30
  np.testing.assert_array_equal(evaluation.is_best_BL, ids == best)
  np.testing.assert_array_equal(training.is_best_BL, ids == best)


def test_operands_are_rounded_and_sums_are_not() -> None:
  """bfloat16: exact but for the rounding of what goes into the matmuls."""
  x, head, targets = random_case(32, True)
  loss, of_x, of_head = oracle(
    rounded(x), Head(rounded(head.weight_DV), head.bias_V), targets
  )
  training, _, (grad_x, grad_head) = run(
    mesh_of({}), x, head, targets, 'bfloat16'
  )
  assert training.sum.dtype == grad_head.weight_DV.dtype == jnp.float32
  assert grad_x.dtype == jnp.bfloat16
  # The loss is summed in float32 from exact products of rounded operands.
  np.testing.assert_allclose(training.sum, loss.sum(), rtol=1e-5)
  for ours, exact in ((grad_x, of_x), (grad_head.weight_DV, of_head.weight_DV)):
    error = np.abs(np.asarray(ours, float) / 3 - exact).max()
    assert error < 0.01 * np.abs(exact).max()


def rounded(a: np.ndarray) -> np.ndarray:
  return np.asarray(jnp.asarray(a, jnp.bfloat16), float)


def test_the_logits_of_all_tokens_never_exist() -> None:
  """The compiled gradient holds a chunk's logits, not those of 16 chunks."""
  chunk = module.CHUNK['cpu']
  vocab, tokens = 1024, 16 * chunk
  shapes = (
    jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32),
    Head(jax.ShapeDtypeStruct((8, vocab), jnp.float32), None),
    Targets(
      jax.ShapeDtypeStruct((1, tokens), jnp.int32),
      jax.ShapeDtypeStruct((1, tokens), jnp.float32),
    ),
  )
  grad = jax.jit(
    jax.grad(lambda *of: cross_entropy(*of).sum, (1, 2)), static_argnums=0
  )
  compiled = grad.lower(mesh_of({}), *shapes).compile()
  of_chunk = 4 * chunk * vocab
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * of_chunk
