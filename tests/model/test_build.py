"""Which layers are scanned, and which come before."""

import pytest

from moe_jax.config.schema import KEYS
from moe_jax.experts.dispatch import DISPATCHES, PRIORITIES
from moe_jax.model.attention import ATTENTIONS
from moe_jax.model.build import MIXINGS, repetition
from moe_jax.model.decoder import REMAT_POLICIES
from moe_jax.registry import EXCHANGES, GROUPED_MATMULS
from moe_jax.routing.cells import CELLS
from moe_jax.routing.gates import GATES


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
