"""Which layers are scanned, what strings become, what routers start with."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe_jax.config.schema import KEYS
from moe_jax.experts.dispatch import DISPATCHES, PRIORITIES
from moe_jax.model.attention import ATTENTIONS
from moe_jax.model.build import (
  MIXINGS,
  make_cell,
  make_router,
  repetition,
)
from moe_jax.model.decoder import REMAT_POLICIES, Decoder
from moe_jax.registry import EXCHANGES, GROUPED_MATMULS
from moe_jax.routing.cells import CELLS
from moe_jax.routing.gates import GATES
from moe_jax.routing.router import Context, start
from tests.helpers import tiny


@pytest.mark.parametrize(
  ('pattern', 'every', 'expected'),
  [
    ('mmmm', 1, (0, 1)),
    ('dddd', 3, (0, 1)),
    ('mdmd', 2, (0, 2)),
    ('mdmdm', 2, (1, 2)),  # the first layer, then (dm)(dm)
    ('dmmm', 1, (1, 1)),
    ('ddmdmd', 2, (2, 2)),  # an offset of two
    ('dddmddm', 3, (1, 3)),
    ('m', 1, (0, 1)),
    ('dm', 3, (2, 3)),  # never repeats: no scan
  ],
)
def test_repetition(
  pattern: str, every: int, expected: tuple[int, int]
) -> None:
  kinds = tuple({'m': 'moe', 'd': 'dense'}[c] for c in pattern)
  assert repetition(kinds, every) == expected


def test_config_knows_every_part_there_is() -> None:
  """A part that the schema does not list could not be chosen."""
  parts = {
    'moe.dispatch': DISPATCHES,
    'moe.exchange': {'auto', *EXCHANGES},
    'moe.priority': PRIORITIES,
    'moe.grouped_matmul': {'auto', *GROUPED_MATMULS},
    'moe.shared.mixing': MIXINGS,
    'router.recurrent': CELLS,
    'router.score': GATES,
    'model.remat': REMAT_POLICIES,
    'model.attention': {'auto', *ATTENTIONS},
  }
  for key, registry in parts.items():
    assert set(KEYS[key].names()) == set(registry), key


@pytest.mark.parametrize(
  ('keys', 'gate', 'projector'),
  [
    # sqrt(256 / 64) as many entries, of four times the size
    ({}, 0.1 * 2 * 4, 0.1),
    ({'router.recurrent': 'none'}, 0.1, None),
    ({'router.gate_std': 0.5}, 0.5, 0.1),
    ({'router.projector_std': 0.02}, 0.8, 0.02),
  ],
)
def test_what_routers_start_with(
  keys: dict[str, float | str], gate: float, projector: float | None
) -> None:
  sizes = {'model.hidden_size': 256, 'router.state_size': 64}
  usual = {'model.init_std': 0.1, 'router.recurrent': 'gru'}
  made = tiny.config(**sizes, **usual | keys)
  router = make_router(made, 257, 0, 8, nnx.Rngs(params=0))
  # 512 and 16,384 draws: 3 deviations are 10 % and 2 %.
  assert router.score.weight_XN[...].std() == pytest.approx(gate, rel=0.1)
  if projector is not None:
    drawn = router.features.project.projector_DR[...].std()
    assert drawn == pytest.approx(projector, rel=0.02)


@pytest.mark.parametrize('activation', ['swiglu', 'relu'])
@pytest.mark.parametrize(('key', 'expected'), [(0.0, 0.1), (0.02, 0.02)])
def test_what_is_added_to_the_residual_stream_has_its_own_start(
  activation: str, key: float, expected: float
) -> None:
  made = tiny.config(
    **{'model.init_std': 0.1, 'model.residual_std': key},
    **{'model.activation': activation, 'moe.first_dense': 1},
    **{'moe.shared.width': 32, 'moe.shared.mixing': 'coefficient'},
  )
  model = Decoder(made, 61, None, rngs=nnx.Rngs(params=0))
  found = {'out_HAD': 0, 'down_FD': 0, 'down_NFD': 0}
  for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if value.size > 300 and 'bias' not in path[-1]:
      started = expected if path[-1] in found else 0.1
      assert value[...].std() == pytest.approx(started, rel=0.12), path
      if path[-1] in found:
        found[path[-1]] += 1
  # Attention of two layers; a dense layer and a shared expert; the experts.
  assert [*found.values()] == [2, 2, 1]


def test_first_logits_are_as_far_apart_with_a_memory_as_without() -> None:
  """Whatever the sizes: a recurrent router is not blind at the start."""
  x_TD = jax.random.normal(jax.random.key(1), (256, 96))
  spreads = {}
  for recurrent in ('none', 'gru'):
    made = tiny.config(
      **{
        'model.hidden_size': 96,
        'model.init_std': 0.06,
        'moe.num_experts': 32,
        'router.state_size': 40,
        'router.recurrent': recurrent,
      }
    )
    cell = make_cell(made, nnx.Rngs(params=2))
    router = make_router(made, 257, 0, 32, nnx.Rngs(params=0))
    ids = jnp.zeros((1, 256), jnp.int32)
    context = Context(cell, ids, ids == 0)
    logits_TN, _ = router(x_TD, start(cell, 256), context)
    spreads[recurrent] = float(logits_TN.std(-1).mean())
  assert spreads['none'] == pytest.approx(0.06 * 96**0.5, rel=0.1)
  assert 0.5 < spreads['gru'] / spreads['none'] < 1.5
