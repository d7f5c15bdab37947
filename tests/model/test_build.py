"""Which layers are scanned, what strings become, what routers start with."""

import pytest
from flax import nnx

from moe_jax.config.schema import KEYS
from moe_jax.experts.dispatch import DISPATCHES, PRIORITIES
from moe_jax.model.attention import ATTENTIONS
from moe_jax.model.build import MIXINGS, make_router, repetition
from moe_jax.model.decoder import REMAT_POLICIES
from moe_jax.registry import EXCHANGES, GROUPED_MATMULS
from moe_jax.routing.cells import CELLS
from moe_jax.routing.gates import GATES
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
    ({}, 0.1, 0.1),
    ({'router.gate_std': 0.5}, 0.5, 0.1),
    ({'router.projector_std': 0.02}, 0.1, 0.02),
  ],
)
def test_what_routers_start_with(
  keys: dict[str, float], gate: float, projector: float
) -> None:
  sizes = {'model.hidden_size': 256, 'router.state_size': 64}
  made = tiny.config(**sizes, **{'model.init_std': 0.1} | keys)
  made.router.recurrent = 'gru'
  router = make_router(made, 257, 0, 8, nnx.Rngs(params=0))
  # 512 and 16,384 draws: 3 deviations are 10 % and 2 %.
  assert router.score.weight_XN[...].std() == pytest.approx(gate, rel=0.1)
  drawn = router.features.project.projector_DR[...].std()
  assert drawn == pytest.approx(projector, rel=0.02)
