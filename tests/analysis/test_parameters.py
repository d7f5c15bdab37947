"""Norms and places of the parameters of routers and experts."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import parameter
from moe_jax.analysis import parameters
from moe_jax.model.decoder import Decoder
from moe_jax.model.routers import by_router
from tests.helpers import oracle, tiny


def made(**changes: Any) -> tuple[ConfigDict, Any, Any]:
  """A config, parameters of it as NumPy arrays, and what each is."""
  config = tiny.config(**changes)
  model = nnx.eval_shape(
    lambda: Decoder(config, tiny.VOCAB, None, rngs=nnx.Rngs(params=0))
  )
  shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
  )
  return config, params, parameter.declarations(model)


# A dense layer, one before the pattern repeats, and two repetitions of it.
PREFIX = {
  'model.num_layers': 6,
  'moe.first_dense': 1,
  'moe.every': 2,
  'moe.factors': 2,
}


def test_routers_are_found_in_depth_order() -> None:
  config, params, declared = made(**PREFIX)
  found = by_router(params, config)
  wanted = [
    block['chain']['sub_layers'][factor]
    for block in oracle.blocks(params)
    if 'router' in block['chain']['sub_layers'][0]
    for factor in range(2)
  ]
  assert len(found) == len(wanted) >= 4
  for a, b in zip(found, wanted, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
  kinds = by_router(declared, config, stacked=False)
  for sub_layer, of_sub_layer in zip(found, kinds, strict=True):
    assert jax.tree.structure(sub_layer) == jax.tree.structure(of_sub_layer)


def test_what_is_taken_apart_is_joined_again() -> None:
  _, params, _ = made(**PREFIX)
  routers, rest = parameters.split(params, parameters.ROUTER)
  assert routers and rest
  assert all('router' in path for path in routers)
  jax.tree.map(
    np.testing.assert_array_equal, parameters.joined(routers, rest), params
  )


@pytest.mark.parametrize('activation', ['swiglu', 'relu'])
def test_norms_and_similarity_of_experts(activation: str) -> None:
  config, params, declared = made(
    **{'model.activation': activation, 'model.num_layers': 1}
  )
  [sub_layer] = by_router(params, config)
  [kinds] = by_router(declared, config, stacked=False)
  experts, of_experts = sub_layer['experts'], kinds['experts']
  found_N = parameters.expert_norms(experts, of_experts)
  wanted_N = [
    np.sqrt(
      sum((leaf[n].astype(float) ** 2).sum() for leaf in experts.values())
    )
    for n in range(8)
  ]
  np.testing.assert_allclose(found_N, wanted_N, rtol=1e-6)

  vectors = []
  for n in range(8):
    if activation == 'swiglu':
      gate_up_D2F = experts['gate_up_ND2F'][n]
      kernels = [gate_up_D2F[:, 0], gate_up_D2F[:, 1]]
    else:
      kernels = [experts['up_NDF'][n]]
    # Of every [inputs, outputs] a mean over the outputs, PyTorch's rows.
    means = [kernel.mean(1) for kernel in (*kernels, experts['down_NFD'][n])]
    joined = np.concatenate([mean / np.linalg.norm(mean) for mean in means])
    vectors.append(joined / np.linalg.norm(joined))
  cosine_NN = np.array(vectors) @ np.array(vectors).T
  wanted = cosine_NN[~np.eye(8, dtype=bool)].mean()
  found = parameters.expert_similarity(experts, of_experts)
  assert float(found) == pytest.approx(wanted, abs=1e-5)


# The leaf that has an expert's weights, and the axis of them.
GATES = {
  'linear': ('weight_XN', 0),
  'mlp': ('weight_FN', 0),
  'cosine': ('embedding_NX', 1),
  'xmoe': ('embedding_NE', 1),
  'hyper': None,
  'random': None,
  'hash': None,
}


@pytest.mark.parametrize('gate', GATES)
def test_norms_of_gates(gate: str) -> None:
  config, params, declared = made(
    **{'router.score': gate, 'model.num_layers': 1}
  )
  [sub_layer] = by_router(params, config)
  [kinds] = by_router(declared, config, stacked=False)
  found = parameters.gate_norms(
    sub_layer['router']['score'], kinds['router']['score']
  )
  if GATES[gate] is None:
    assert found is None
    return
  name, axis = GATES[gate]
  weights = sub_layer['router']['score'][name]
  np.testing.assert_allclose(found, np.linalg.norm(weights, axis=axis), 1e-5)
  assert found.shape == (8,)
