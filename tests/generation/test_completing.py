"""Prompts gone on with to their ends, in batches."""

from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.errors import UserError
from moe_jax.generation import completing
from moe_jax.generation.completing import Options, complete
from moe_jax.generation.rows import Token
from moe_jax.generation.sampling import Sampling
from moe_jax.generation.steps import Steps
from moe_jax.parallel import mesh as mesh_lib
from tests.helpers import oracle, tiny

EOS = 256
WARM = Sampling.of(1.0)
PROMPTS = [[EOS, 65], [66] * 40, [67, 68, 69]]


class FakeRows:
  """Writes given tokens in place of a model's, with experts or without."""

  made: list['FakeRows'] = []
  script: dict[int, bytes | list[int]] = {}

  def __init__(
    self, steps: Any, params: Any, prompts: Any, *, numbers: Any, **options: Any
  ) -> None:
    del params
    self.numbers, self.options = list(numbers), options
    self.lengths = [len(prompt) for prompt in prompts]
    self.experts = steps.returns_experts
    self.active_B = np.ones(len(prompts), bool)
    self.made.append(self)

  def __iter__(self) -> Any:
    for n in range(self.options['max_tokens']):
      ids = [[*self.script[i], *[48] * 99][n] for i in self.numbers]
      experts = None
      if self.experts:
        length = 1 if n else max(self.lengths)
        experts = np.zeros((1, 1, len(ids), length), int) + n
      yield Token(np.array(ids), experts)
      if not self.active_B.any():
        return


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeRows]:
  monkeypatch.setattr(completing, 'Rows', FakeRows)
  FakeRows.made = []
  return FakeRows


class FakeSteps:
  vocab_size = 257

  def __init__(self, returns_experts: bool = False) -> None:
    self.returns_experts = returns_experts


def write(options: Options, shown: list | None = None, **kinds: Any) -> Any:
  def show(number: int, piece: str, experts: Any) -> None:
    if shown is not None:
      shown.append((number, piece, experts))

  steps: Any = FakeSteps(**kinds)
  return complete(steps, {}, ByteTokenizer(), PROMPTS, options, show)


def test_every_end(fake: type[FakeRows]) -> None:
  fake.script = {0: b'stop here', 1: [*b'ab', EOS, *b'c'], 2: b'0123456789'}
  shown: list = []
  options = Options(max_tokens=7, stops=('he', 'x'), batch_size=2)
  first, second, third = write(options, shown)
  assert (first.text, first.ended) == ('stop ', 'stop')
  assert bytes(first.ids) == b'stop he'
  assert (second.text, second.ids, second.ended) == ('ab', [*b'ab'], 'end')
  assert (third.text, third.ended) == ('0123456', 'length')
  for number, found in enumerate((first, second, third)):
    assert ''.join(p for n, p, _ in shown if n == number) == found.text
  # Of like lengths together, with the numbers that they had.
  assert [batch.numbers for batch in fake.made] == [[1, 2], [0]]


def test_the_end_of_a_document_need_not_end(fake: type[FakeRows]) -> None:
  fake.script = {number: [97, EOS, 98] for number in range(3)}
  found = write(Options(max_tokens=3, ends=False))
  assert {(each.text, each.ended) for each in found} == {('ab', 'length')}


def test_pieces_come_with_the_experts_of_their_tokens(
  fake: type[FakeRows],
) -> None:
  fake.script = {0: b'xyz', 1: [97, EOS], 2: b'stop'}
  shown: list = []
  found = write(
    Options(max_tokens=3, stops=('to',)), shown, returns_experts=True
  )
  # Tokens are read one call after they were chosen; those of the prompt first.
  pieces = [(p, int(e[0, 0])) for n, p, e in shown if n == 0]
  assert pieces == [('', 0), ('A', 0), ('x', 1), ('y', 2), ('z', 3)]
  assert found[0].experts[0, 0].tolist() == [0, 0, 1, 2, 3]
  assert found[1].experts[0, 0].tolist() == [0] * 40 + [1]
  assert [each.ended for each in found] == ['length', 'end', 'stop']
  assert found[2].text == ''.join(p for n, p, _ in shown if n == 2)[3:] == 's'


def test_what_is_refused() -> None:
  with pytest.raises(UserError, match='batch_size = 0 must be at least 1'):
    Options(batch_size=0)
  with pytest.raises(UserError, match='a stop is empty'):
    Options(stops=('a', ''))


@pytest.fixture(scope='module')
def model() -> tuple[Any, Any, Steps]:
  config = tiny.config(**{'moe.factors': 2, 'model.num_layers': 2})
  _, params = tiny.decoder(config)
  mesh = mesh_lib.make_mesh(
    dict.fromkeys(mesh_lib.MESH_AXES, 1), jax.devices()[:1]
  )
  return config, params, Steps(config, tiny.VOCAB, mesh, experts=True)


class Letters:
  """61 ids, none of which ends anything."""

  name, fingerprint, vocab_size, eos_id = 'letters', None, tiny.VOCAB, 61

  def encode(self, text: str) -> np.ndarray:
    return np.array([ord(c) - 64 for c in text], np.int32) % tiny.VOCAB

  def decode(self, ids: Any) -> str:
    return ''.join(chr(64 + int(i)) for i in ids)


@pytest.mark.slow
def test_experts_are_those_of_the_oracle(model: tuple) -> None:
  """Of every layer and sub-layer, for prompts of two lengths and on."""
  config, params, steps = model
  prompts = [[1, 2, 3, 4, 5], [9]]
  options = Options(max_tokens=4, sampling=WARM, seed=5)
  found = complete(steps, params, Letters(), prompts, options)
  for prompt, each in zip(prompts, found, strict=True):
    sequence = oracle.Sequence(config, params)
    sequence.run(np.array([*prompt, *each.ids]))
    best = [[token[0] for token in chosen] for _, chosen in sequence.routed]
    assert each.experts is not None
    np.testing.assert_array_equal(
      each.experts, np.reshape(best, each.experts.shape)
    )


@pytest.mark.slow
def test_batches_change_nothing(model: tuple) -> None:
  _, params, steps = model
  prompts = [[n % tiny.VOCAB] * (1 + n % 3) for n in range(5)]
  one, all_together = (
    complete(
      steps,
      params,
      Letters(),
      prompts,
      Options(max_tokens=6, sampling=WARM, batch_size=size),
    )
    for size in (1, 8)
  )
  assert [each.ids for each in one] == [each.ids for each in all_together]
