"""Batches of prompts: exact, alone or together, with few programs."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.generation import rows as rows_lib
from moe_jax.generation.rows import Rows, rounded
from moe_jax.generation.sampling import Sampling
from moe_jax.generation.steps import Steps
from moe_jax.parallel import mesh as mesh_lib
from tests.helpers import oracle, tiny

GREEDY, WARM = Sampling.of(), Sampling.of(0.9, top_p=0.95)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
RMOE = {'moe.factors': 2, 'router.recurrent': 'gru', 'model.num_layers': 1}


class Model:
  """A tiny model and its programs."""

  def __init__(self, **axes: int) -> None:
    shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | axes
    count = int(np.prod(list(shape.values())))
    mesh = mesh_lib.make_mesh(shape, jax.devices()[:count])
    self.config = tiny.config(**RMOE)
    _, self.params = tiny.decoder(self.config)
    self.steps = Steps(self.config, tiny.VOCAB, mesh)

  def tokens(
    self,
    prompts: list[list[int]],
    sampling: Sampling = GREEDY,
    max_tokens: int = 12,
    **options: Any,
  ) -> list[list[int]]:
    """What follows each prompt."""
    batch = Rows(
      self.steps,
      self.params,
      prompts,
      max_tokens=max_tokens,
      sampling=sampling,
      **options,
    )
    return np.stack([token.ids_B for token in batch], axis=1).tolist()


@pytest.fixture(scope='module')
def model() -> Model:
  return Model()


@pytest.fixture
def compiled() -> Iterator[list[str]]:
  """The programs that are compiled in a test."""
  found: list[str] = []

  def listen(event: str, seconds: float, **kwargs: Any) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_the_oracle(model: Model) -> None:
  found = model.tokens(PROMPTS)
  for prompt, ours in zip(PROMPTS, found, strict=True):
    text = list(prompt)
    for token in ours:
      logits_LV = oracle.Sequence(model.config, model.params).run(
        np.array(text)
      )
      best = logits_LV[-1].max()
      assert logits_LV[-1, token] >= best - 1e-5 * np.abs(logits_LV).max()
      text.append(token)


def test_a_row_does_not_depend_on_those_beside_it(model: Model) -> None:
  together = model.tokens(PROMPTS, WARM, seed=3)
  for number, prompt in enumerate(PROMPTS):
    alone = model.tokens([prompt], WARM, seed=3, numbers=[number])
    assert alone == [together[number]]


@pytest.mark.slow
def test_number_seed_and_position_decide(model: Model) -> None:
  same = [PROMPTS[0]] * 2
  first, second = model.tokens(same, WARM)
  assert first != second
  assert model.tokens(same, WARM) == [first, second]
  assert model.tokens(same, WARM, seed=1) != [first, second]
  # What is gone on with later is what would have been there.
  rest = model.tokens([PROMPTS[0] + first[:5]], WARM, max_tokens=7)
  assert rest == [first[5:]]


@pytest.mark.slow
def test_a_bucket_is_compiled_once(model: Model, compiled: list[str]) -> None:
  model.tokens(PROMPTS, WARM)
  compiled.clear()
  model.tokens([[3] * 20, [4], [1, 1]], WARM, max_tokens=9, seed=5)
  model.tokens([[3] * 32, [4], [5]], Sampling.of(0.3, top_p=0.5))
  assert compiled == []
  model.tokens([[3] * 60, [4], [5]], WARM)
  assert len(compiled) == 2  # one to read, one to go on


def test_rows_end_where_they_are_told_to(model: Model) -> None:
  batch = Rows(
    model.steps, model.params, PROMPTS, max_tokens=9, sampling=GREEDY
  )
  expected = model.tokens(PROMPTS, max_tokens=9)
  found: list[list[int]] = [[], [], []]
  for token in batch:
    for row in np.flatnonzero(batch.active_B):
      found[row].append(token.ids_B[row])
      batch.active_B[row] = len(found[row]) < (2, 5, 3)[row]
  assert found == [expected[0][:2], expected[1][:5], expected[2][:3]]


@pytest.mark.slow
@pytest.mark.parametrize(
  'axes',
  [{'data': 2, 'tensor': 2}, {'fsdp': 2, 'context': 2}, {'expert': 8}],
  ids=str,
)
def test_equal_on_every_mesh(model: Model, axes: dict[str, int]) -> None:
  elsewhere = Model(**axes)
  for sampling in (GREEDY, WARM):
    found = elsewhere.tokens(PROMPTS, sampling)
    assert found == model.tokens(PROMPTS, sampling)


@pytest.mark.parametrize(
  'prompts, options, message',
  [
    ([], {}, 'there is no prompt'),
    ([[1], []], {}, 'prompt 1 is empty'),
    ([[1, tiny.VOCAB]], {}, 'prompt 0 has ids from 1 to 61, but .* has 61'),
    ([[1]], {'max_tokens': 0}, 'max_tokens = 0 must be at least 1'),
    ([[1]], {'seed': -1}, 'seed = -1 must be from 0 to'),
  ],
)
def test_what_is_refused(
  model: Model, prompts: Any, options: dict[str, int], message: str
) -> None:
  with pytest.raises(UserError, match=message):
    model.tokens(prompts, **options)


def test_rounded() -> None:
  sizes = {n: rounded(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 100, 129)}
  assert sizes == {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 9: 12, 12: 12,
                   13: 16, 100: 128, 129: 192}  # fmt: skip
  assert rounded(5, least=32) == 32
  assert rows_lib.rounded(33, least=32) == 48
