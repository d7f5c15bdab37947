"""One contract for every causal attention that runs here; who is chosen."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.model import attention_blocks, attention_kernels, implementations
from moe_jax.model.attention import ATTENTIONS, Case, CausalAttention
from moe_jax.model.decoder import REMAT_POLICIES, Decoder
from moe_jax.parallel import context
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training.step import make_train_step
from tests.helpers import registries, steps, tiny

CPU = Case(jax.devices()[0], None, jnp.dtype('float32'), 8)
RUN_HERE = [name for name in ATTENTIONS if not ATTENTIONS[name].obstacle(CPU)]
# B, L, H, G, A: one block; one and a part of another; several.
SHAPES = [(2, 7, 4, 4, 8), (1, 200, 4, 2, 6), (2, 384, 2, 1, 4)]


def random_arrays(shape: tuple[int, ...]) -> list[np.ndarray]:
  """Queries, keys, values, and the gradient of what comes out; float64."""
  batch, length, heads, groups, size = shape
  rng = np.random.default_rng(0)
  return [
    rng.standard_normal((batch, length, count, size))
    for count in (heads, groups, groups, heads)
  ]


def oracle(
  q: Any, k: Any, v: Any, g: Any, ids: np.ndarray | None = None
) -> list[np.ndarray]:
  """The weighted values and the gradients of the three, by hand.

  `ids` are those of segments, [B, L]; without them a row is one.
  """
  out, dq, dk, dv = (np.zeros_like(a) for a in (q, q, k, v))
  causal = np.tril(np.ones((q.shape[1],) * 2, bool))
  scale = q.shape[-1] ** -0.5
  for b in range(len(q)):
    seen = causal if ids is None else causal & (ids[b][:, None] == ids[b])
    for h in range(q.shape[2]):
      at = (b, slice(None), h)
      kv = (b, slice(None), h * k.shape[2] // q.shape[2])
      scores = np.where(seen, q[at] @ k[kv].T * scale, -np.inf)
      p = np.exp(scores - scores.max(1, keepdims=True))
      p /= p.sum(1, keepdims=True)
      out[at] = p @ v[kv]
      dp = g[at] @ v[kv].T
      ds = p * (dp - (p * dp).sum(1, keepdims=True)) * scale
      dq[at] = ds @ k[kv]
      dk[kv] += ds.T @ q[at]
      dv[kv] += p.T @ g[at]
  return [out, dq, dk, dv]


def run(attention: Any, arrays: list[np.ndarray], dtype: Any) -> list[Any]:
  @jax.jit
  def both(q: Any, k: Any, v: Any, g: Any) -> list[Any]:
    out, vjp = jax.vjp(attention, q, k, v)
    return [out, *vjp(g)]

  return both(*[jnp.asarray(a, dtype) for a in arrays])


def check(attention: Any, shape: tuple[int, ...]) -> None:
  arrays = random_arrays(shape)
  for ours, exact in zip(
    run(attention, arrays, jnp.float32), oracle(*arrays), strict=True
  ):
    np.testing.assert_allclose(ours, exact, atol=2e-5 * np.abs(exact).max())


@pytest.mark.parametrize('name', RUN_HERE)
@pytest.mark.parametrize('shape', SHAPES)
def test_equals_the_oracle(name: str, shape: tuple[int, ...]) -> None:
  check(ATTENTIONS[name](CPU), shape)


def random_segments(shape: tuple[int, ...]) -> np.ndarray:
  """Ids of one to five segments a row and, of the last row, padding."""
  batch, length = shape[:2]
  rng = np.random.default_rng(1)
  starts = np.zeros((batch, length), np.int32)
  for row in starts:
    row[rng.integers(length, size=4)] = 1
  starts[:, 0] = 1
  ids = np.cumsum(starts, axis=1, dtype=np.int32)
  ids[-1, length - 3 :] = 0
  return ids


def check_within(attention: Any, shape: tuple[int, ...]) -> None:
  """`attention` takes the ids of segments as its fourth argument."""
  arrays, ids = random_arrays(shape), random_segments(shape)
  within = functools.partial(_last, attention, jnp.asarray(ids))
  for ours, exact in zip(
    run(within, arrays, jnp.float32), oracle(*arrays, ids), strict=True
  ):
    np.testing.assert_allclose(ours, exact, atol=2e-5 * np.abs(exact).max())


def _last(attention: Any, last: Any, *arrays: Any) -> Any:
  return attention(*arrays, last)


@pytest.mark.parametrize('name', RUN_HERE)
@pytest.mark.parametrize('shape', SHAPES)
def test_equals_the_oracle_within_segments(
  name: str, shape: tuple[int, ...]
) -> None:
  check_within(ATTENTIONS[name](CPU).within, shape)


@pytest.mark.parametrize('name', [*RUN_HERE, 'dropping'])
def test_no_gradient_reaches_another_segment(name: str) -> None:
  """Exactly none, through queries, keys or values."""
  shape = SHAPES[1]
  ids = jnp.asarray(random_segments(shape))
  q, k, v, g = (jnp.asarray(a, 'float32') for a in random_arrays(shape))
  attention = (
    functools.partial(_dropping, jax.random.key(0))
    if name == 'dropping'
    else ATTENTIONS[name](CPU).within
  )
  own = (ids == 2)[:, :, None, None]
  gradients = jax.grad(
    lambda *a: (attention(*a, ids) * g * own).sum(), argnums=(0, 1, 2)
  )(q, k, v)
  for gradient in gradients:
    assert not np.asarray(gradient)[np.asarray(ids) != 2].any()
    assert np.asarray(gradient)[np.asarray(ids) == 2].any()


def _dropping(key: Any, q: Any, k: Any, v: Any, ids: Any) -> Any:
  return attention_blocks.blocks(q, k, v, 0.5, key, ids)


def test_cudnn_is_told_segments_by_a_mask(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """What it is given means the right thing, at an odd length too."""
  asked, lengths = jax.nn.dot_product_attention, []

  def elsewhere(query: Any, *arrays: Any, implementation: str, **keys: Any):
    assert implementation == 'cudnn'
    lengths.append(query.shape[1])
    return asked(query, *arrays, implementation='xla', **keys)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', elsewhere)
  check_within(attention_kernels.cudnn, SHAPES[0])
  assert set(lengths) == {8}


def test_parts_of_several_blocks_equal_the_oracle(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Long sequences: two parts, of three blocks and of two, one not full."""
  monkeypatch.setattr(attention_blocks, '_PARTS', 2)
  shape = 1, 4 * attention_blocks.BLOCK + 70, 2, 1, 4
  check(attention_blocks.blocks, shape)
  check_within(attention_blocks.BlockAttention(CPU).within, shape)


@pytest.mark.parametrize('name', RUN_HERE)
def test_half_precision_rounds_and_no_more(name: str) -> None:
  attention = ATTENTIONS[name](CPU)
  arrays = random_arrays(SHAPES[1])
  rounded = [np.asarray(jnp.asarray(a, 'bfloat16'), float) for a in arrays]
  for ours, exact in zip(
    run(attention, arrays, jnp.bfloat16), oracle(*rounded), strict=True
  ):
    assert ours.dtype == jnp.bfloat16
    error = np.abs(np.asarray(ours, float) - exact).max()
    assert error < 0.02 * np.abs(exact).max()


def test_nothing_that_is_kept_grows_with_the_square() -> None:
  """Bytes that backward keeps, of 8 and of 16 blocks."""

  def kept(length: int) -> int:
    q, k, v, _ = random_arrays((1, length, 2, 1, 4))
    shapes = jax.eval_shape(
      lambda q, k, v: jax.vjp(attention_blocks.blocks, q, k, v)[1], q, k, v
    )
    return sum(a.size for a in jax.tree.leaves(shapes))

  block = attention_blocks.BLOCK
  assert kept(16 * block) < 2.1 * kept(8 * block)


def test_long_sequences_do_not_grow_the_program() -> None:
  def lines(length: int) -> int:
    q, k, v, _ = random_arrays((1, length, 2, 1, 4))
    lowered = jax.jit(
      jax.grad(lambda *a: attention_blocks.blocks(*a).sum(), (0, 1, 2))
    ).lower(q, k, v)
    return len(lowered.as_text().splitlines())

  assert lines(64 * attention_blocks.BLOCK) < 1.02 * lines(
    16 * attention_blocks.BLOCK
  )


def test_dropout_scales_what_it_keeps() -> None:
  """On average nothing changes, and of one position nothing else is left."""
  q, k, v, _ = (jnp.asarray(a, 'float32') for a in random_arrays(SHAPES[0]))
  q, k, v = q[:1], k[:1], v[:1]
  keys = jax.random.split(jax.random.key(0), 400)
  dropped = jax.jit(
    jax.vmap(lambda key: attention_blocks.blocks(q, k, v, rate=0.5, rng=key))
  )(keys)
  first = np.asarray(dropped[:, :, 0] / v[:, 0])
  assert set(np.unique(first.round(5))) == {0.0, 2.0}
  np.testing.assert_allclose(
    dropped.mean(0), attention_blocks.blocks(q, k, v), atol=0.3
  )


@pytest.mark.slow
def test_splash_equals_the_oracle() -> None:
  """The kernel's program, interpreted: grouped heads, lanes not full."""
  attention = functools.partial(attention_kernels.splash, interpret=True)
  check(attention, (1, 200, 2, 1, 128))
  check_within(attention, (1, 200, 2, 1, 128))


@pytest.mark.parametrize('remat, keeps', [('dots', True), ('full', False)])
def test_dots_keeps_what_splash_attention_computed(
  remat: str, keeps: bool
) -> None:
  """The sum of every query's weights, without which it is computed again."""
  attend = jax.checkpoint(
    functools.partial(attention_kernels.splash, interpret=True),
    policy=REMAT_POLICIES[remat],
  )
  q = jnp.zeros((1, 128, 2, 64))
  kept = jax.eval_shape(lambda *qkv: jax.vjp(attend, *qkv)[1], q, q, q)
  shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
  assert ((1, 2, 128) in shapes) == keeps


def test_sharded_kernels_compute_their_own_rows_and_heads() -> None:
  """The wrapper of the libraries' kernels, around one that runs here."""
  axes = {'data': 2, 'expert': 2, 'tensor': 2}
  shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | axes
  mesh = mesh_lib.make_mesh(shape, jax.devices()[:8])
  seen = []

  def attention(q: Any, k: Any, v: Any, ids: Any = None) -> Any:
    seen.append((q.shape, k.shape, None if ids is None else ids.shape))
    return attention_blocks.blocks(q, k, v, segment_ids_BL=ids)

  sharded, shape = attention_kernels.sharded(attention, mesh), (4, 9, 4, 2, 8)
  check(sharded, shape)
  check_within(sharded, shape)
  assert seen[0] == ((1, 9, 2, 8), (1, 9, 1, 8), None)
  assert seen[-1] == (*seen[0][:2], (1, 9))


def test_positions_are_exchanged_for_heads() -> None:
  """Around the wrapper of kernels, with copies of both heads of keys."""
  axes = {'data': 2, 'context': 2, 'tensor': 2}
  shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | axes
  mesh = mesh_lib.make_mesh(shape, jax.devices()[:8])
  seen = []

  def kernel(q: Any, k: Any, v: Any, ids: Any) -> Any:
    seen.append((q.shape, k.shape, ids.shape))
    return attention_blocks.blocks(q, k, v, segment_ids_BL=ids)

  def attention(q: Any, k: Any, v: Any, ids: Any) -> Any:
    sharded = attention_kernels.sharded(kernel, mesh)
    found = context.by_heads(
      lambda *arrays: sharded(*arrays, ids),
      mesh,
      2,
      *(a.reshape(8, 5, *a.shape[2:]) for a in (q, k, v)),
    )
    return found.reshape(q.shape)

  check_within(attention, (4, 10, 8, 2, 8))
  assert set(seen) == {((2, 10, 2, 8), (2, 10, 1, 8), (2, 10))}


def case(
  platform: str,
  dtype: str = 'bfloat16',
  head_dim: int = 128,
  capability: str = '9.0',
  packed: bool = False,
) -> Case:
  device = SimpleNamespace(platform=platform, compute_capability=capability)
  return Case(device, None, jnp.dtype(dtype), head_dim, packed)


@pytest.mark.parametrize(
  ('of', 'expected'),
  [
    (case('cpu'), 'blocks'),
    (case('gpu'), 'cudnn'),
    (case('gpu', head_dim=256), 'cudnn'),
    (case('gpu', head_dim=60), 'blocks'),
    (case('gpu', dtype='float32'), 'blocks'),
    (case('tpu'), 'splash'),
    (case('tpu', dtype='float32'), 'splash'),
    (case('cpu', packed=True), 'blocks'),
    # cuDNN would need a square of positions; it can be asked for.
    (case('gpu', packed=True), 'blocks'),
    (case('tpu', packed=True), 'splash'),
  ],
)
def test_auto_takes_the_best_that_fits(of: Case, expected: str) -> None:
  assert implementations.attention_name('auto', of) == expected


@pytest.mark.parametrize(
  ('asked', 'of', 'message'),
  [
    ('cudnn', case('cpu'), "'cudnn' runs on NVIDIA GPUs, not on cpu"),
    ('cudnn', case('gpu', dtype='float32'), 'to float32'),
    ('cudnn', case('gpu', head_dim=60), 'up to 256, not 60'),
    ('cudnn', case('gpu', capability='7.5'), 'capability 8.0.* has 7.5'),
    ('splash', case('gpu'), "on TPUs, not on gpu; .* auto, .* 'cudnn'"),
    ('flash', case('cpu'), "'flash' is not known"),
  ],
)
def test_what_cannot_run_is_refused(asked: str, of: Case, message: str) -> None:
  with pytest.raises(UserError, match=message):
    implementations.attention_name(asked, of)


def test_without_cudnn_there_is_another_attention(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  """One line says so; asked for by name, it is refused."""

  def fails(*arrays: Any, **options: Any) -> Any:
    raise RuntimeError('cuDNN not found.\nAt all.')

  here = case('gpu', head_dim=72)  # of no other test: what is found is kept
  monkeypatch.setattr(jax, 'devices', lambda: [here.device])
  monkeypatch.setattr(jax.nn, 'dot_product_attention', fails)
  for _ in range(2):
    assert implementations.attention_name('auto', here) == 'blocks'
  (line,) = [record.getMessage() for record in caplog.records]
  assert line == (
    "attention 'blocks': 'cudnn' cannot be called: cuDNN not found. At all."
  )
  with pytest.raises(UserError, match="'cudnn' cannot be called: cuDNN not"):
    implementations.attention_name('cudnn', here)
  elsewhere = case('gpu', capability='10.0')
  assert implementations.attention_name('auto', elsewhere) == 'cudnn'


def test_a_model_is_not_built_with_what_cannot_run() -> None:
  config = tiny.config(**{'model.attention': 'splash'})
  with pytest.raises(UserError, match='model.attention'):
    jax.eval_shape(lambda: Decoder(config, 61, None, rngs=nnx.Rngs(params=0)))


class Naive(CausalAttention):
  """An attention of a user's own, with all in one."""

  def __call__(
    self, query_BLHA: jax.Array, key_BLGA: jax.Array, value_BLGA: jax.Array
  ) -> jax.Array:
    repeats = query_BLHA.shape[2] // key_BLGA.shape[2]
    key_BLHA, value_BLHA = (
      jnp.repeat(a, repeats, axis=2) for a in (key_BLGA, value_BLGA)
    )
    scores_BHLL = jnp.einsum('BLHA,BKHA->BHLK', query_BLHA, key_BLHA)
    seen_LL = jnp.tril(jnp.ones(scores_BHLL.shape[-2:], bool))
    scores_BHLL = scores_BHLL / query_BLHA.shape[-1] ** 0.5
    weights_BHLL = jax.nn.softmax(jnp.where(seen_LL, scores_BHLL, -jnp.inf))
    return jnp.einsum('BHLK,BKHA->BLHA', weights_BHLL, value_BLHA)


def test_an_own_attention_that_knows_no_segments_is_refused_for_packed_rows(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  registries.forget(monkeypatch, ATTENTIONS)
  ATTENTIONS.register('own')(Naive)
  config = tiny.config(**{'model.attention': 'own', 'data.order': 'packed'})
  with pytest.raises(
    UserError, match=r"'own' has no method `within`.*takes 'blocks', or one of"
  ):
    jax.eval_shape(lambda: Decoder(config, 61, None, rngs=nnx.Rngs(params=0)))
  config.data.order = 'shuffled'
  jax.eval_shape(lambda: Decoder(config, 61, None, rngs=nnx.Rngs(params=0)))


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_an_own_attention_keeps_the_contract_and_trains(
  axes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
  registries.forget(monkeypatch, ATTENTIONS)
  ATTENTIONS.register('own')(Naive)
  check(ATTENTIONS['own'](CPU), SHAPES[1])
  gradients = []
  for name in ('blocks', 'own'):
    config = tiny.config(**{'model.attention': name, 'moe.num_experts': 0})
    config_lib.validate(config, 1)  # it is a known name
    made = steps.setup(config, **axes)
    data = steps.batch(config)
    _, metrics = make_train_step(made)(steps.init(made), data)
    gradients.append([metrics['loss'], metrics['gradient_norm']])
  np.testing.assert_allclose(*gradients, rtol=1e-5)
