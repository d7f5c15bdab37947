"""Statistics of routing, against loops in float64 and scikit-learn."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from moe_jax.analysis import routing as routing_lib
from moe_jax.analysis.routing import Statistics, TokenCounts
from moe_jax.routing.selection import Routing
from tests.helpers import tiny

W, T, N, K = 3, 120, 8, 2


def logits(num_experts: int = N, seed: int = 0) -> np.ndarray:
  """Of routers that follow each other, some of them very sure."""
  rng = np.random.default_rng(seed)
  own = rng.normal(size=(W, T, num_experts))
  made = (own + 0.8 * rng.normal(size=(1, T, num_experts))) * 1.5
  made[1, : T // 4] *= 40  # probabilities that are 0 and 1 in float32
  return made.astype(np.float32)


def routed(logits_WTN: np.ndarray, k: int = K) -> Routing:
  """Top-k of them all."""
  select = tiny.select(logits_WTN.shape[-1], k)
  return jax.tree.map(
    lambda *a: jnp.stack(a), *[select(jnp.asarray(each)) for each in logits_WTN]
  )


def measured(routing: Routing, real_T: np.ndarray | None = None) -> Statistics:
  statistics = Statistics(routing.num_experts)
  statistics.add(routing, real_T)
  return statistics


def chosen(routing: Routing) -> list[list[set[int]]]:
  """The experts of every token of every router."""
  return [
    [{int(n) for n in of_token if n < routing.num_experts} for of_token in each]
    for each in np.asarray(routing.indices_TK)
  ]


def probabilities(routing: Routing) -> np.ndarray:
  return np.asarray(routing.probabilities_TN, np.float64)


def digits(p: np.ndarray) -> np.ndarray:
  """What the papers digitise with."""
  return np.digitize(p, np.linspace(0, 1, 101))


def information(first: np.ndarray, second: np.ndarray) -> float:
  """The mutual information of two lists of labels, label by label."""
  total = 0.0
  for a, b in itertools.product(set(first), set(second)):
    both = np.mean((first == a) & (second == b))
    if both:
      total += both * math.log(
        both / np.mean(first == a) / np.mean(second == b)
      )
  return total


@pytest.mark.parametrize('num_experts', [2, 8, 40])
def test_mutual_information_equals_a_loop(num_experts: int) -> None:
  routing = routed(logits(num_experts))
  found_WW = measured(routing).mutual_information()
  bins_WTN = digits(probabilities(routing))
  for a, b in itertools.product(range(W), repeat=2):
    wanted = np.mean(
      [
        information(*pair)
        for pair in zip(bins_WTN[a], bins_WTN[b], strict=True)
      ]
    )
    assert found_WW[a, b] == pytest.approx(wanted, abs=2e-5)
  assert found_WW.max() > 0.1


def test_mutual_information_is_that_of_scikit_learn() -> None:
  routing = routed(logits())
  found_WW = measured(routing).mutual_information()
  bins_WTN = digits(probabilities(routing))
  for a, b in itertools.product(range(W), repeat=2):
    wanted = np.mean(
      [
        metrics.mutual_info_score(*pair)
        for pair in zip(bins_WTN[a], bins_WTN[b], strict=True)
      ]
    )
    assert found_WW[a, b] == pytest.approx(wanted, abs=2e-5)


def test_digits_are_those_of_numpy_on_every_side_of_every_edge() -> None:
  edges = np.linspace(0, 1, 101).astype(np.float32)
  beside = [np.nextafter(edges, np.float32(side)) for side in (-1, 2)]
  p = np.clip(np.concatenate([edges, *beside]), 0, 1)
  found = np.asarray(routing_lib.digitised(jnp.asarray(p)))
  wanted = digits(p.astype(np.float64)) - 1
  np.testing.assert_array_equal(found[p < 1], wanted[p < 1])
  assert wanted[p == 1].tolist() == [100, 100]  # a bin of its own
  assert found[p == 1].tolist() == [99, 99]


def test_entropy_and_balance_equal_a_loop() -> None:
  routing = routed(logits())
  statistics = measured(routing)
  p_WTN = probabilities(routing)
  entropy_WT = -np.array(
    [[sum(p * math.log(p) for p in p_N if p) for p_N in each] for each in p_WTN]
  )
  np.testing.assert_allclose(
    statistics.mean_entropy(), entropy_WT.mean(1), rtol=1e-5
  )
  edges, density_WI = statistics.entropy_density()
  assert edges[0] == 0 and edges[-1] == pytest.approx(math.log(N))
  for density_I, entropy_T in zip(density_WI, entropy_WT, strict=True):
    wanted, _ = np.histogram(entropy_T, edges, density=True)
    # A token may lie on an edge, within rounding.
    assert np.abs(density_I - wanted).sum() * edges[1] < 0.02
    assert density_I.sum() * edges[1] == pytest.approx(1)

  ordered_WTN = np.sort(p_WTN, axis=-1)
  second_WT = ordered_WTN[..., -2]
  inner_WT = np.where(
    second_WT > 0, ordered_WTN[..., -1] / np.maximum(second_WT, 1e-300), np.inf
  )
  inner_WT[inner_WT > routing_lib.MAX_INNER_BALANCE] = np.inf
  outer_WT = ordered_WTN[..., -K:].sum(-1)
  ranks = (0.25, 0.5, 0.75)
  quantile = {'axis': 1, 'method': 'inverted_cdf'}
  np.testing.assert_allclose(
    statistics.inner_balance(ranks),
    np.quantile(inner_WT, ranks, **quantile).T,
    rtol=0.006,
  )
  np.testing.assert_allclose(
    statistics.outer_balance(ranks),
    np.quantile(outer_WT, ranks, **quantile).T,
    atol=1 / 4096,
  )


def test_a_balance_without_bound_is_infinite() -> None:
  sure = np.full((1, 4, N), -np.inf, np.float32)
  sure[:, :, 3] = 0
  statistics = measured(routed(sure))
  assert statistics.inner_balance([0.5]).item() == math.inf
  assert statistics.outer_balance([0.5]).item() == pytest.approx(1, abs=1e-3)
  assert statistics.mean_entropy().item() == 0
  single = measured(routed(np.zeros((1, 4, 1), np.float32), k=1))
  assert np.isnan(single.inner_balance([0.5])).all()


def test_choices_equal_a_loop() -> None:
  routing = routed(logits())
  statistics, sets = measured(routing), chosen(routing)
  frequency_WN = np.array(
    [[sum(n in s for s in each) / T for n in range(N)] for each in sets]
  )
  np.testing.assert_allclose(statistics.selection_frequency(), frequency_WN)
  below_W, chance_W = statistics.agreement()
  assert np.isnan(below_W[0]) and np.isnan(chance_W[0])
  for w in range(1, W):
    same = sum(len(a & b) for a, b in zip(sets[w], sets[w - 1], strict=True))
    assert below_W[w] == pytest.approx(same / (T * K))
    product = (frequency_WN[w] * frequency_WN[w - 1]).sum()
    assert chance_W[w] == pytest.approx(product / K)


def test_agreement_is_chance_where_routers_know_nothing_of_each_other() -> None:
  rng = np.random.default_rng(0)
  skewed = np.linspace(0, 2, N)  # some experts are used more than others
  free = rng.normal(size=(2, 20_000, N)) + skewed
  below_W, chance_W = measured(routed(free.astype(np.float32))).agreement()
  assert below_W[1] == pytest.approx(chance_W[1], abs=0.01)
  assert chance_W[1] > 0.05 + K / N


def test_pairs_equal_a_loop() -> None:
  routing = routed(logits())
  shares_NN, sets = measured(routing).pairs(1), chosen(routing)
  counts_NN = np.zeros((N, N))
  for below, above in zip(sets[1], sets[2], strict=True):
    for a, b in itertools.product(below, above):
      counts_NN[a, b] += 1
  np.testing.assert_allclose(shares_NN, counts_NN / counts_NN.sum())


def test_how_much_of_a_product_is_used() -> None:
  even = np.full((4, 4), 1 / 16)
  assert routing_lib.product_use(even) == (1.0, pytest.approx(1))
  one = np.zeros((4, 4))
  one[2, 1] = 1
  assert routing_lib.product_use(one) == (1 / 16, pytest.approx(1 / 16))
  half = np.repeat([[1 / 8, 0]], 8, 0).reshape(4, 4)
  assert routing_lib.product_use(half) == (0.5, pytest.approx(0.5))
  rare = np.array([[0.98, 0.02]])  # a tenth of the even share is 0.05
  assert routing_lib.product_use(rare)[0] == 0.5


@pytest.mark.parametrize('cut', [1, 50, T - 1])
def test_chunks_equal_one_pass(
  cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  routing = routed(logits())
  whole = measured(routing)
  parts = Statistics(N)
  for part in (slice(0, cut), slice(cut, T)):
    parts.add(jax.tree.map(lambda a, part=part: a[:, part], routing))
  monkeypatch.setattr(routing_lib, '_CHUNK', 37)
  chunked = measured(routing)
  for statistics in (parts, chunked):
    equal(statistics, whole)


def equal(first: Statistics, second: Statistics) -> None:
  """Sums that are whole numbers are the same, others within rounding."""
  for a, b in zip(
    jax.tree.leaves(first.total), jax.tree.leaves(second.total), strict=True
  ):
    if a.dtype == np.int64:
      np.testing.assert_array_equal(a, b)
    else:
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_padding_is_left_out() -> None:
  logits_WTN = logits()
  real_T = np.random.default_rng(0).random(T) < 0.7
  alone = measured(routed(logits_WTN[:, real_T]))
  garbage = np.where(real_T[:, None], logits_WTN, np.nan)
  equal(measured(routed(garbage), real_T), alone)


def test_unused_slots_count_for_no_expert() -> None:
  """Top-p, masked gates and padding leave slots unused."""
  routing = routed(logits())
  used_WTK = np.ones((W, T, K), bool)
  used_WTK[:, ::3, 1] = False
  fewer = Routing(
    jnp.where(used_WTK, routing.weights_TK, 0),
    jnp.where(used_WTK, routing.indices_TK, N),
    routing.probabilities_TN,
    routing.logits_TN,
  )
  statistics, sets = measured(fewer), chosen(fewer)
  assert statistics.selection_frequency().sum(1) == pytest.approx(
    [used_WTK[0].sum() / T] * W
  )
  same = sum(len(a & b) for a, b in zip(sets[1], sets[0], strict=True))
  assert statistics.agreement()[0][1] == pytest.approx(same / used_WTK[1].sum())
  full = measured(routing)
  np.testing.assert_allclose(
    statistics.mutual_information(), full.mutual_information(), atol=1e-6
  )


def test_probabilities_of_no_expert_count_for_the_gate_alone() -> None:
  """Null experts: the gate rates more than there are."""
  routing = routed(logits())
  statistics = Statistics(N - 2)
  statistics.add(routing)
  frequency_WN = measured(routing).selection_frequency()
  np.testing.assert_allclose(
    statistics.selection_frequency(), frequency_WN[:, :-2]
  )
  np.testing.assert_allclose(
    statistics.mean_entropy(), measured(routing).mean_entropy()
  )
  edges, _ = statistics.entropy_density()
  assert edges[-1] == pytest.approx(math.log(N))


def test_routings_of_layers_and_of_models_are_taken_alike() -> None:
  routing = routed(logits())
  listed = Statistics(N)
  layers = [jax.tree.map(lambda a, w=w: a[w], routing) for w in range(W)]
  listed.add(layers)
  equal(listed, measured(routing))
  # As `Model.routing` returns it: [MoE layers, sub-layers, B, L, ...].
  of_model = Statistics(N)
  of_model.add(jax.tree.map(lambda a: a.reshape(W, 1, 4, T // 4, -1), routing))
  equal(of_model, measured(routing))


def test_no_token_at_all() -> None:
  with pytest.raises(ValueError, match='no token'):
    Statistics(N).mutual_information()


@pytest.mark.parametrize('num_classes', [5, 1000])
def test_token_counts_equal_a_loop(num_classes: int) -> None:
  routing = routed(logits())
  rng = np.random.default_rng(0)
  classes_T = rng.integers(num_classes + 1, size=T)  # the last is of none
  real_T = rng.random(T) < 0.8
  counts = TokenCounts(N, num_classes)
  for part in (slice(0, 50), slice(50, T)):
    indices_WTK = np.asarray(routing.indices_TK)[:, part]
    counts.add(indices_WTK, classes_T[part], real_T[part])
  wanted = np.zeros((W, N, num_classes))
  base = np.zeros(num_classes)
  for t in range(T):
    if real_T[t] and classes_T[t] < num_classes:
      base[classes_T[t]] += 1
      for w in range(W):
        for n in chosen(routing)[w][t]:
          wanted[w, n, classes_T[t]] += 1
  np.testing.assert_array_equal(counts.counts_WNC, wanted)
  np.testing.assert_allclose(counts.base(), base / base.sum())
  with np.errstate(invalid='ignore'):
    np.testing.assert_allclose(
      counts.shares(), wanted / wanted.sum(-1, keepdims=True)
    )


def test_what_tells_an_expert_best() -> None:
  base_C = np.array([0.5, 0.25, 0.2, 0.05, 0.0])
  shares_C = np.array([0.3, 0.5, 0.0, 0.2, 0.0])
  # 0.5 log 2 = 0.347 is more than 0.2 log 4 = 0.277; the first has no lift.
  told = routing_lib.telling(shares_C, base_C, 8)
  assert [token for token, _, _ in told] == [1, 3]
  assert [share for _, share, _ in told] == [0.5, 0.2]
  assert [lift for _, _, lift in told] == pytest.approx([2, 4])
  assert len(routing_lib.telling(shares_C, base_C, 1)) == 1
  assert routing_lib.telling(np.full(5, np.nan), base_C, 8) == []


def test_stability_and_drop_ratio_equal_a_loop() -> None:
  before, after = [
    np.asarray(routed(logits(seed=seed)).indices_TK)[0] for seed in (0, 1)
  ]
  before = np.where(np.arange(T)[:, None] % 5 == 0, N, before)  # padding
  kept = sum(n in list(after[t]) for t in range(T) for n in before[t] if n < N)
  used = int((before < N).sum())
  assert routing_lib.stability(before, after, N) == pytest.approx(kept / used)
  assert np.isnan(routing_lib.stability(np.full((3, 2), N), after[:3], N))

  room = math.ceil(used / N)
  dropped, taken = 0, [0] * N
  for n in before.reshape(-1):
    if n < N:
      dropped += taken[n] >= room
      taken[n] += 1
  assert routing_lib.drop_ratio(before, N) == pytest.approx(dropped / used)
  even = np.arange(T * N).reshape(-1, 2) % N
  assert routing_lib.drop_ratio(even, N) == 0
  assert routing_lib.drop_ratio(np.zeros((T, 1), int), N) == pytest.approx(
    1 - 1 / N
  )


def test_similarity_equals_a_loop() -> None:
  rng = np.random.default_rng(0)
  shapes = [(N, 6, 5), (N, 5, 6)]
  matrices = [rng.normal(size=shape) + 0.3 for shape in shapes]
  joined = []
  for n in range(N):
    # In PyTorch's layout, [outputs, inputs], a mean over the rows.
    rows = [matrix[n].T.mean(0) for matrix in matrices]
    joined.append(np.concatenate([r / np.linalg.norm(r) for r in rows]))
  wanted = np.mean(
    [
      a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      for a, b in itertools.combinations(joined, 2)
    ]
  )
  found = routing_lib.similarity([jnp.asarray(m) for m in matrices])
  assert float(found) == pytest.approx(wanted, rel=1e-5)
  alike = [jnp.asarray(np.repeat(m[:1], N, 0)) for m in matrices]
  assert float(routing_lib.similarity(alike)) == pytest.approx(1, rel=1e-5)
