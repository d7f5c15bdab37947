"""The library's layers in somebody else's model, and its documentation."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import layers
from moe_jax.config import MESH_AXES
from moe_jax.errors import UserError
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.routing.selection import Routing
from tests.helpers.routing_oracles import f64, gru, sigmoid, softmax

ROOT = Path(__file__).parents[1]
D, N, K, F = 12, 6, 2, 8


def rngs() -> nnx.Rngs:
  return nnx.Rngs(params=0)


def tokens(*leading: int) -> jax.Array:
  return jax.random.normal(jax.random.key(1), (*leading, D))


def make(kind: type[layers.MoE] = layers.MoE, **options: Any) -> layers.MoE:
  return kind(
    D,
    **{'num_experts': N, 'top_k': K, 'width': F, 'init_std': 0.3}
    | {'rngs': rngs()}
    | options,
  )


def expected(params: Any, x_TD: np.ndarray, logits_TN: np.ndarray) -> Any:
  """`y = sum_k w_k E_k(x)` in float64, from the layer's parameters."""
  p_TN = softmax(logits_TN)
  y_TD = np.zeros(x_TD.shape)
  for t, p_N in enumerate(p_TN):
    best = np.argsort(-p_N)[:K]
    for n in best:
      gate_F, up_F = np.einsum(
        'D,DgF->gF', x_TD[t], params['experts']['gate_up_ND2F'][n]
      )
      hidden_F = gate_F * sigmoid(gate_F) * up_F
      down_FD = params['experts']['down_NFD'][n]
      y_TD[t] += p_N[n] / p_N[best].sum() * (hidden_F @ down_FD)
  return y_TD


def params_of(module: nnx.Module) -> Any:
  return f64(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize(
  'leading',
  [
    (),
    pytest.param((5,), marks=pytest.mark.slow),
    pytest.param((2, 5), marks=pytest.mark.slow),
    pytest.param((2, 3, 5), marks=pytest.mark.slow),
  ],
)
def test_a_layer_takes_any_leading_axes(leading: tuple[int, ...]) -> None:
  moe, x = make(), tokens(*leading)
  y, aux = moe(x)
  params, x_TD = params_of(moe)['layer'], f64(x).reshape(-1, D)
  logits_TN = x_TD @ params['router']['score']['weight_XN']
  y_TD = expected(params, x_TD, logits_TN)
  np.testing.assert_allclose(y, y_TD.reshape(x.shape), atol=1e-5)
  np.testing.assert_allclose(aux.routing.logits_TN, logits_TN, atol=1e-5)
  assert float(aux.load.counts_N.sum()) == len(x_TD) * K
  f_N = np.asarray(aux.load.counts_N) / len(x_TD)
  balance = N * (f_N * softmax(logits_TN).mean(0)).sum()
  np.testing.assert_allclose(aux.balance_loss, balance, rtol=1e-5)


@pytest.mark.slow
def test_the_recurrent_router_is_handed_from_layer_to_layer() -> None:
  """RMoE eq. 4-5 in float64, over two layers that share the cell."""
  router = layers.RecurrentRouter(D, state_size=4, rngs=rngs())
  stack = [make(router=router, rngs=nnx.Rngs(params=i)) for i in (1, 2)]
  x, state = tokens(5), None
  cell = params_of(router)['cell']
  states = [(np.zeros(4),)] * 5
  for moe in stack:
    y, aux = moe(x, state, router=router)
    params, x_TD = params_of(moe)['layer'], f64(x)
    projector = params['router']['features']['project']['projector_DR']
    states = [
      gru(u_X, h, cell) for u_X, h in zip(x_TD @ projector, states, strict=True)
    ]
    h_TR = np.stack([h_R for (h_R,) in states])
    logits_TN = h_TR @ params['router']['score']['weight_XN']
    y_TD = expected(params, x_TD, logits_TN)
    np.testing.assert_allclose(y, y_TD, atol=1e-5)
    x, state = x + y, aux.state
    np.testing.assert_allclose(state.cell, h_TR, atol=1e-5)


def test_a_layer_does_not_keep_the_router() -> None:
  router = layers.RecurrentRouter(D, state_size=4, rngs=rngs())
  names = jax.tree_util.tree_leaves_with_path(params_of(make(router=router)))
  assert not any('cell' in jax.tree_util.keystr(path) for path, _ in names)
  with pytest.raises(ValueError, match='called with the same router'):
    make(router=router)(tokens(3))
  with pytest.raises(ValueError, match='made with it'):
    make()(tokens(3), router=router)


@pytest.mark.slow
def test_a_router_adds_the_logits_of_a_layer_that_hands_them_on() -> None:
  _, aux = make()(tokens(3))
  with pytest.raises(TypeError, match='the state has none'):
    make(keys={'router.residual': 0.5})(tokens(3), aux.state)


@pytest.mark.slow
def test_a_cartesian_layer_has_its_residuals_within() -> None:
  """`a = x + MoE_A(norm(x))`, `y = a + MoE_B(norm(a))`."""
  layer, x = make(layers.CartesianMoE), tokens(5)
  y, aux = layer(x)
  params, x_TD = params_of(layer)['layer'], f64(x)
  for place in (0, 1):
    of_layer = params['sub_layers'][place]
    size = np.sqrt((x_TD**2).mean(-1, keepdims=True) + 1e-6)
    u_TD = x_TD / size * params['norms'][place]['scale_D']
    logits_TN = u_TD @ of_layer['router']['score']['weight_XN']
    x_TD = x_TD + expected(of_layer, u_TD, logits_TN)
  np.testing.assert_allclose(y, x_TD, atol=1e-5)
  assert aux.routing.indices_TK.shape == (2, 5, K)


def test_padding_visits_no_expert() -> None:
  moe, x = make(), tokens(2, 3)
  mask = jnp.array([[True, True, True], [True, False, False]])
  y, aux = moe(x, padding_mask=mask)
  np.testing.assert_allclose(y[1, 0], moe(x)[0][1, 0], atol=1e-6)
  assert not y[1, 1:].any()
  assert float(aux.load.tokens) == 4


class Stack(nnx.Module):
  """Somebody's model: two layers, one recurrent router."""

  def __init__(self, rngs: nnx.Rngs) -> None:
    self.router = layers.RecurrentRouter(D, state_size=4, rngs=rngs)
    # Made by `nnx.vmap`: every parameter has an axis of layers in front.
    make_one = nnx.vmap(lambda rngs: make(router=self.router, rngs=rngs))
    self.layers = make_one(rngs.split(2))

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scans over the layers."""
    _, aux = self._one(0)(x, router=self.router)  # the structure of a state
    state = jax.tree.map(jnp.zeros_like, aux.state)

    def step(
      carry: Any, router: layers.RecurrentRouter, layer: layers.MoE
    ) -> Any:
      x, state = carry
      y, aux = layer(x, state, router=router)
      return (x + y, aux.state), aux.balance_loss

    scan = nnx.scan(step, in_axes=(nnx.Carry, None, 0), out_axes=(nnx.Carry, 0))
    (x, _), losses = scan((x, state), self.router, self.layers)
    return x, losses.sum()

  def loop(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Does the same, layer by layer."""
    state, total = None, jnp.zeros(())
    for place in (0, 1):
      y, aux = self._one(place)(x, state, router=self.router)
      x, state, total = x + y, aux.state, total + aux.balance_loss
    return x, total

  def _one(self, place: int) -> layers.MoE:
    graphdef, params = nnx.split(self.layers)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[place], params))


@pytest.mark.slow
def test_layers_are_stacked_and_scanned() -> None:
  model, x = Stack(nnx.Rngs(params=0)), tokens(2, 3)
  scanned = nnx.jit(lambda model, x: model(x))(model, x)
  np.testing.assert_allclose(scanned[0], model.loop(x)[0], atol=1e-5)
  np.testing.assert_allclose(scanned[1], model.loop(x)[1], atol=1e-5)


@pytest.mark.slow
def test_gradients_by_nnx_and_by_jax_agree() -> None:
  model, x = Stack(nnx.Rngs(params=0)), tokens(2, 3)

  def loss(model: Stack, x: jax.Array) -> jax.Array:
    y, balance_loss = model.loop(x)
    return (y**2).mean() + 0.01 * balance_loss

  graphdef, params = nnx.split(model)
  ours = jax.jit(jax.grad(lambda p: loss(nnx.merge(graphdef, p), x)))(params)
  theirs = nnx.jit(nnx.grad(loss))(model, x)
  for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(a).max() > 0


@pytest.mark.slow
def test_experts_on_several_devices_compute_the_same() -> None:
  axes = dict.fromkeys(MESH_AXES, 1) | {'data': 2, 'expert': 4}
  mesh = mesh_lib.make_mesh(axes, jax.devices())
  options: dict[str, Any] = {'num_experts': 8}
  alone, split = make(**options), make(**options, mesh=mesh)
  x = tokens(8, 4)
  y, aux = nnx.jit(lambda moe, x: moe(x))(split, x)
  np.testing.assert_allclose(y, alone(x)[0], atol=1e-5)
  np.testing.assert_allclose(aux.balance_loss, alone(x)[1].balance_loss)


def test_options_that_contradict_each_other_are_refused() -> None:
  with pytest.raises(UserError, match=r'moe\.top_k = 9'):
    make(top_k=9)
  with pytest.raises(UserError, match='linear'):
    make(score='linaer')


def test_importing_the_package_imports_no_jax() -> None:
  program = "import sys, moe_jax; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)


@pytest.mark.slow
def test_the_documented_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(ROOT)
  text = (ROOT / 'docs' / 'library.md').read_text()
  names: dict[str, Any] = {}
  for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
    exec(compile(block, 'docs/library.md', 'exec'), names)
  assert names['y'].shape == names['x'].shape
  assert isinstance(names['routing'], Routing)
  leaves = jax.tree.leaves(names['gradients'])
  assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.slow
def test_the_notebook_runs(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  notebook = json.loads((ROOT / 'examples' / 'moe_jax.ipynb').read_text())
  monkeypatch.chdir(tmp_path)
  names: dict[str, Any] = {'__name__': '__main__'}
  for cell in notebook['cells']:
    if cell['cell_type'] == 'code':
      source = ''.join(cell['source'])
      exec(compile(source, 'moe_jax.ipynb', 'exec'), names)
  assert names['losses'][-1] < names['losses'][0]
