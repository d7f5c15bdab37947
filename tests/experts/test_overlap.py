"""What is computed while tokens travel waits for no exchange, nor it for that.

The data flow decides what a compiler may overlap; it is read from the trace.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe_jax.model.decoder import Decoder
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning import abstract_setup, compiled, topologies
from moe_jax.routing.router import Context, start
from tests.helpers import tiny

D, F, R, N, T = 32, 24, 16, 8, 32
CONFIG = tiny.config(
  **tiny.MODELS['cartesian rmoe'],
  **{
    'moe.shared.width': 2 * F,
    'moe.shared.mixing': 'coefficient',
    'model.num_layers': 1,
  },
)


def traced() -> list[Any]:
  """The equations of a Cartesian layer, forward; an exchange is one of them."""
  shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | {'data': 2, 'expert': 4}
  mesh = mesh_lib.make_mesh(shape, jax.devices())

  def run(x_TD: jax.Array) -> jax.Array:
    model = Decoder(CONFIG, 1, mesh, rngs=nnx.Rngs(params=0))
    graphdef, params = nnx.split(model.periods)
    period = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], params))
    real = jnp.ones((1, T), bool)
    state = start(model.cell, T, 0)
    context = Context(model.cell, real.astype(jnp.int32), real)
    chain = period.blocks[0].chain
    return chain(x_TD, state, context)[0]

  return jax.make_jaxpr(run)(jnp.ones((T, D))).eqns


def after(eqns: list[Any], first: Any) -> set[int]:
  """The places of equations that need the result of one."""
  reached, found = set(map(id, first.outvars)), set()
  for place, eqn in enumerate(eqns):
    if any(id(var) in reached for var in eqn.invars):
      found.add(place)
      reached |= set(map(id, eqn.outvars))
  return found


def products(eqns: list[Any]) -> list[tuple[int, ...]]:
  """Of matmuls of T rows, what these are multiplied by."""
  shapes = []
  for eqn in eqns:
    if eqn.primitive.name == 'dot_general':
      rows, matrix = (var.aval.shape for var in eqn.invars)
      shapes += [tuple(matrix)] if len(rows) == 2 else []
    for inner in inside(eqn):
      shapes += products(inner.eqns)
  return sorted(shapes)


def inside(eqn: Any) -> list[Any]:
  """The programs within an equation, but not those of exchanges."""
  if eqn.primitive.name == 'shard_map':
    return []
  values = jax.tree.leaves(
    list(eqn.params.values()), is_leaf=lambda value: hasattr(value, 'eqns')
  )
  return [value for value in values if hasattr(value, 'eqns')]


def test_the_rest_of_the_layer_is_free_while_tokens_travel() -> None:
  eqns = traced()
  exchanges = [eqn for eqn in eqns if eqn.primitive.name == 'shard_map']
  assert len(exchanges) == 2
  for nth, exchange in enumerate(exchanges):
    later = after(eqns, exchange)
    free = [
      eqn
      for place, eqn in enumerate(eqns)
      if place not in later
      and exchange is not eqn
      # What the exchange itself waits for.
      and not any(e is exchange for e in (eqns[p] for p in after(eqns, eqn)))
    ]
    shared = [(D, F), (D, F), (F, D)]
    # The hidden side of the next sub-layer's cell needs only this one's state.
    ahead = [(D, 2)] + ([(R, 3 * R)] if nth == 0 else [])
    assert set(shared + ahead) <= set(products(free)), nth


@pytest.mark.slow
@pytest.mark.parametrize('exchange', ['all_to_all', 'ragged'])
def test_tpu_programs_compute_while_assignments_travel(exchange: str) -> None:
  config = CONFIG.copy_and_resolve_references()
  config.model.dtype = 'bfloat16'
  config.moe.exchange = exchange
  config.mesh.update({'data': 1, 'expert': 4})
  setup = abstract_setup.make(config, topologies.target('v5e:2x2').devices)
  step, _ = compiled.train_step(setup)
  lines, meanwhile = step.as_text().splitlines(), 0
  for place, line in enumerate(lines):
    begun = re.match(r'\s*(%\S*all-to-all-start\S*) = ', line)
    if not begun:
      continue
    # A program's lines are in the order in which they are computed.
    done = next(
      later
      for later in range(place, len(lines))
      if '-done(' in lines[later] and begun[1] in lines[later]
    )
    between = [each for each in lines[place:done] if 'shared_expert' in each]
    meanwhile += any('dot_general' in each for each in between)
  # Of both sub-layers, forward at least.
  assert meanwhile >= 2
