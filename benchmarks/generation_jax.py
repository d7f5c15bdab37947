"""Our sides of `benchmarks.generation`: workers of a duel.

python -m benchmarks.generation_jax SIZES_AS_JSON TOKENS cached|copied|uncached
"""

import sys
from collections.abc import Callable

from benchmarks.peer_sizes import Sizes
from moe_jax import runtime


def main(sizes_json: str, tokens: str, how: str) -> None:
  """Goes on with random texts, so many tokens a step."""
  runtime.configure_malloc()  # before jax is imported
  runtime.silence_plugins()
  from benchmarks import common, duel

  sizes, count = Sizes.from_json(sizes_json), int(tokens)
  make = {'cached': _cached, 'copied': _copied, 'uncached': _uncached}[how]
  step = make(sizes, count)
  step()
  duel.serve(step, {'tokens': count} | common.place())


def _cached(sizes: Sizes, count: int) -> Callable[[], None]:
  import jax
  import numpy as np

  from moe_jax.generation.sampling import Sampling
  from moe_jax.generation.steps import Draw, Steps

  made, params, ids_BL = _model(sizes)
  steps = Steps(made.config, made.vocab_size, made.mesh)
  length = sizes.seq_len
  lengths_B = np.full(len(ids_BL), length, np.int32)
  draw = Draw(np.uint32(0), np.arange(len(ids_BL)), Sampling.of())
  num_slots = steps.attend.num_slots(length + count)
  cache, following = steps.read(
    params, ids_BL, lengths_B, draw, num_slots=num_slots
  )

  def step() -> None:
    """From the same place every time; what was behind it is written over."""
    nonlocal cache, following
    active_B = lengths_B > 0
    for n in range(count):
      cache, following = steps.go_on(
        params, cache, following.ids_B, lengths_B, active_B, length, n, draw
      )
    jax.block_until_ready(following)

  return step


def _copied(sizes: Sizes, count: int) -> Callable[[], None]:
  from moe_jax.model import build

  build.reads_in_place = lambda parts, mesh: False
  return _cached(sizes, count)


def _uncached(sizes: Sizes, count: int) -> Callable[[], None]:
  import jax
  import jax.numpy as jnp
  from flax import nnx

  made, params, ids_BL = _model(sizes)

  @jax.jit
  def following(params: dict, ids_BL: jax.Array) -> jax.Array:
    model = nnx.merge(made.graphdef, params)
    x_BLD = model.hidden(ids_BL, jnp.ones(ids_BL.shape, bool)).x_BLD
    return model.logits(x_BLD[:, -1:])[:, 0].argmax(-1)

  def step() -> None:
    for _ in range(count):
      jax.block_until_ready(following(params, ids_BL))

  return step


def _model(sizes: Sizes) -> tuple:
  import numpy as np

  from benchmarks import common
  from benchmarks.peer_jax import config_of

  made = common.set_up(config_of(sizes))
  shape = sizes.batch_size, sizes.seq_len
  ids_BL = np.random.default_rng(0).integers(made.vocab_size, size=shape)
  return made, made.init()['params'], ids_BL.astype(np.int32)


if __name__ == '__main__':
  main(*sys.argv[1:])
