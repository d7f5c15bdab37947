"""Packed rows and masked targets, through the model and the training step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import validate
from moe_jax.errors import UserError
from moe_jax.model.attention import segments_of
from moe_jax.training.step import gradient, make_eval_step, make_train_step
from tests.helpers import steps, tiny

LENGTHS = 5, 6, 3  # of documents; two positions of a row of 16 are padding
PACKED = {'data.order': 'packed', 'train.batch_size': 2}
# One layer, and no loss but that of tokens.
SMALL = {
  'model.num_layers': 1,
  'train.batch_size': 4,
  'loss.balance_weight': 0.0,
  'model.tie_embeddings': False,
}


def _alone(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The documents of packed rows, each the beginning of a row of its own."""
  rows, ids = [], batch['segment_ids']
  for b, n in np.ndindex(len(ids), int(ids.max())):
    here = ids[b] == n + 1
    row = {key: np.zeros(ids.shape[1], a.dtype) for key, a in batch.items()}
    for key in ('token_ids', 'targets', 'padding_mask'):
      row[key][: here.sum()] = batch[key][b][here]
    rows.append(row)
  keys = 'token_ids', 'targets', 'padding_mask'
  return {key: np.stack([row[key] for row in rows]) for key in keys}


@pytest.mark.slow
@pytest.mark.parametrize('attention', ['blocks', 'xla'])
def test_a_token_has_the_loss_it_has_in_its_document_alone(
  attention: str,
) -> None:
  """And no gradient comes from another document, not the least."""
  config = tiny.config(
    **PACKED, **tiny.MODELS['cartesian rmoe'], **{'model.attention': attention}
  )
  graphdef, params = tiny.decoder(config)
  packed = steps.packed_batch(config, LENGTHS)

  def losses(params: Any, batch: dict[str, Any]) -> jax.Array:
    logits_BLV = nnx.merge(graphdef, params)(
      batch['token_ids'], batch['padding_mask'], segments=segments_of(batch)
    ).logits_BLV
    picked = jnp.take_along_axis(logits_BLV, batch['targets'][..., None], -1)
    return jax.nn.logsumexp(logits_BLV, -1) - picked[..., 0]

  alone = _alone(packed)
  expected = jax.jit(losses)(params, alone)[alone['padding_mask']]
  own = packed['segment_ids'] == 2

  @jax.jit
  def of_packed(params: Any) -> tuple[jax.Array, Any]:
    found, pull = jax.vjp(lambda p: losses(p, packed), params)
    return found, pull(own.astype(np.float32))[0]['embed_VD']

  found, gradient_VD = of_packed(params)
  np.testing.assert_allclose(
    found[packed['padding_mask']], expected, rtol=1e-5, atol=1e-5
  )
  ids = packed['token_ids']
  assert not np.asarray(gradient_VD)[ids[~own]].any()
  assert np.asarray(gradient_VD)[ids[own]].any(-1).all()


def _masked(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A batch whose first row has no target, and others some."""
  mask = batch['padding_mask'] & (np.arange(16) % 3 == 1)
  mask[0] = False
  mask[1, 8:] = False
  return batch | {'target_mask': mask}


def test_masked_targets_have_no_gradient_and_all_tokens_are_routed() -> None:
  config = tiny.config(**SMALL)
  made = steps.setup(config)
  state = steps.init(made)
  batch = _masked(steps.batch(config))
  ids = batch['token_ids'] = batch['token_ids'] % 59
  ids[0], ids[1, 8:] = 60, 59  # a row without targets, and the end of another
  of = jax.jit(lambda batch: gradient(made, state, batch)[:2])
  grads, metrics = of(batch)
  mask = batch['target_mask']

  other = batch | {'targets': np.where(mask, batch['targets'], 7)}
  jax.tree.map(np.testing.assert_array_equal, (grads, metrics), of(other))
  norms_V = np.abs(grads['embed_VD']).max(1)
  assert norms_V[:59].any() and not norms_V[59:].any()
  assert metrics['load'].tokens.tolist() == [[batch['padding_mask'].sum()]]
  none = batch | {'target_mask': np.zeros_like(mask)}
  grads, metrics = of(none)
  assert metrics['loss'] == 0
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_the_loss_is_the_mean_over_targets_whatever_the_parts() -> None:
  """Of one batch, of four micro-batches with unlike shares, and evaluated."""
  found = []
  for count in (1, 4):
    config = tiny.config(**SMALL, **{'train.accumulation': count})
    made = steps.setup(config)
    batch = _masked(steps.batch(config))
    _, metrics = make_train_step(made)(steps.init(made), batch)
    found.append([metrics['loss'], metrics['gradient_norm']])
  np.testing.assert_allclose(*found, rtol=1e-5)

  eval_step, params = make_eval_step(made), steps.init(made)['params']
  mask, real = batch['target_mask'], batch['padding_mask']
  masks = [mask, real & ~mask, real]
  sums = [eval_step(params, batch | {'target_mask': m}) for m in masks]
  assert [int(each['targets']) for each in sums] == [m.sum() for m in masks]
  nll = [float(each['nll']) for each in sums]
  assert nll[0] / mask.sum() == pytest.approx(float(found[0][0]), rel=1e-5)
  assert nll[0] + nll[1] == pytest.approx(nll[2], rel=1e-5)


@pytest.mark.slow
def test_packed_rows_on_a_mesh_in_micro_batches() -> None:
  """Kept apart as on one device, with masked targets."""
  found = []
  for count, axes in (1, {}), (2, {'data': 2, 'tensor': 2}):
    config = tiny.config(
      **SMALL | {'data.order': 'packed', 'train.accumulation': count}
    )
    made = steps.setup(config, **axes)
    batch = _masked(steps.packed_batch(config, LENGTHS))
    _, metrics = make_train_step(made)(steps.init(made), batch)
    found.append([metrics['loss'], metrics['gradient_norm']])
  np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_span_is_refused_with_packed_rows() -> None:
  """It remembers the row before, and packed rows go on nowhere."""
  config = tiny.config(
    **{'data.order': 'packed', 'model.positions': 'span', 'model.span': 8}
  )
  message = "remembers the segment before.*'packed'.*set data.order = 'contig"
  with pytest.raises(UserError, match=message):
    validate(config, 1)
