"""Positions on several devices: what is computed is what one device computes.

Parts of it are tested where they are: the exchange around attention in
`tests/model/test_attention.py`, embedding, loss and experts beside them.
"""

from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training.step import gradient, make_score_step
from tests.helpers import steps, tiny

MODEL = tiny.MODELS['cartesian rmoe'] | {
  'model.num_layers': 1,
  'model.num_kv_heads': 2,
  'loss.balance_scope': 'sequence',
  'train.accumulation': 2,
  'data.order': 'packed',
}
# Of rows of 16 positions, cut in the middle: the second crosses the cut.
LENGTHS = 7, 5, 3


@pytest.mark.slow
def test_gradients_and_routing_are_those_of_one_device() -> None:
  """Packed rows; a recurrent router, two sub-layers, bounded buffers."""
  config = tiny.config(
    **MODEL | {'moe.exchange': 'all_to_all', 'moe.buffer_factor': 0.6}
  )
  batch = steps.packed_batch(config, LENGTHS)
  batch['target_mask'] = batch['padding_mask'] & (batch['positions'] > 1)
  found = []
  for axes in {}, {'data': 2, 'expert': 2, 'context': 2}:
    made = steps.setup(config, **axes)
    data = jax.device_put(batch, mesh_lib.batch_sharding(made.mesh))
    found.append(
      jax.jit(lambda state, data, made=made: gradient(made, state, data)[:2])(
        steps.init(made), data
      )
    )
  (alone, expected), (grads, metrics) = found
  for ours, exact in zip(*map(jax.tree.leaves, (grads, alone)), strict=True):
    scale = np.abs(exact).max()
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * scale)
  for name in ('loss', 'balance_loss'):
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
  np.testing.assert_array_equal(
    metrics['load'].counts_N, expected['load'].counts_N
  )


@pytest.mark.slow
def test_no_position_sees_the_future_or_another_document() -> None:
  """Across the cuts too, to the last bit: in what a token is predicted by."""
  config = tiny.config(
    **MODEL | {'moe.factors': 1, 'train.accumulation': 1, 'train.batch_size': 2}
  )
  made = steps.setup(config, context=4)
  params = steps.init(made)['params']
  score, batch = make_score_step(made), steps.packed_batch(config, LENGTHS)

  def scores(changes: Any) -> np.ndarray:
    changed = batch['token_ids'].copy()
    changed[changes] = (changed[changes] + 1) % tiny.VOCAB
    found = score(params, batch | {'token_ids': changed})
    return np.asarray(found.log_probability_BL)

  before, ids = scores([]), batch['segment_ids']
  for at in (0, 3, 8, 12):
    differ = scores((0, at)) != before
    sees = (ids[0] == ids[0, at]) & (np.arange(16) >= at)
    assert differ[0].tolist() == sees.tolist() and not differ[1].any()
