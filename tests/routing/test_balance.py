"""Balance losses against numbers derived by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import balance
from tests.helpers import tiny


def load(
  logits: list[list[float]], real: list[bool] | None = None
) -> balance.Load:
  logits_TN = jnp.array(logits, jnp.float32)
  real = [True] * len(logits) if real is None else real
  padding_mask_BL = jnp.array([real])
  select = tiny.select(logits_TN.shape[1], 1)
  routing = select(logits_TN)
  routing = routing.only(padding_mask_BL.reshape(-1, 1))
  return balance.load_of(routing, padding_mask_BL, jnp.int32(0), select)


def test_balanced_is_k_and_collapsed_is_n() -> None:
  # One token each on two experts, probabilities close to 1 and 0:
  # N * sum f P = 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1.
  even = load([[50.0, 0.0], [0.0, 50.0]])
  assert float(balance.balance_loss(even)) == pytest.approx(1.0)
  # Both on the first: 2 * (1 * 1 + 0 * 0) = 2.
  collapsed = load([[50.0, 0.0], [50.0, 0.0]])
  assert float(balance.balance_loss(collapsed)) == pytest.approx(2.0)


def test_padding_counts_nowhere() -> None:
  alone = load([[1.0, 0.0]])
  padded = load([[1.0, 0.0], [0.0, 9.0]], [True, False])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), padded, alone
  )


def test_layers_separate_and_joined() -> None:
  even = load([[50.0, 0.0], [0.0, 50.0]])
  collapsed = load([[50.0, 0.0], [50.0, 0.0]])
  both = jax.tree.map(lambda *a: jnp.stack(a)[:, None], even, collapsed)
  assert float(balance.balance_loss(both)) == pytest.approx(1.0 + 2.0)
  # Together 3 of 4 tokens on the first: 2 * (3/4 * 3/4 + 1/4 * 1/4) = 1.25.
  together = balance.balance_loss(balance.joined(both))
  assert float(together) == pytest.approx(1.25)


def test_z_loss_is_the_mean_squared_log_partition() -> None:
  # log(e^0 + e^0) = log 2 for each of two tokens.
  expected = np.log(2.0) ** 2
  found = balance.z_loss(load([[0.0, 0.0], [0.0, 0.0]]))
  assert float(found) == pytest.approx(expected)
