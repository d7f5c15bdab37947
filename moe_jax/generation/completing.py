"""Texts that follow prompts, in batches of prompts of like lengths."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.generation.rows import (
  Rows,
  Token,
  check_numbers,
  check_prompts,
)
from moe_jax.generation.sampling import Sampling
from moe_jax.generation.steps import Params, Steps
from moe_jax.generation.writing import Writing, ends_lines

# What ends a text: a stop, what ends a document, or that it is long enough.
STOP, END, LENGTH = 'stop', 'end', 'length'


@dataclasses.dataclass(frozen=True)
class Options:
  """How prompts are gone on with.

  Attributes:
    max_tokens: The tokens that follow a prompt, at the most.
    sampling: How they are chosen.
    seed: What random numbers follow from, with the number of the prompt and the
      position in its text.
    stops: Texts before the first of which what follows ends.
    ends: Whether it ends where a document does.
    batch_size: The prompts that are gone on with together, at the most.
  """

  max_tokens: int = 128
  sampling: Sampling = dataclasses.field(default_factory=Sampling.of)
  seed: int = 0
  stops: tuple[str, ...] = ()
  ends: bool = True
  batch_size: int = 32

  def __post_init__(self) -> None:
    """Refuses what nothing can follow from, with a `UserError`."""
    check_numbers(self.max_tokens, self.seed)
    if self.batch_size < 1:
      raise UserError(f'batch_size = {self.batch_size} must be at least 1')
    if '' in self.stops:
      raise UserError('a stop is empty: every text would end at once')


class Completion(NamedTuple):
  """What follows a prompt.

  Attributes:
    text: The text, without the stop that ended it.
    ids: The tokens it was made of, without what ends a document.
    ended: Why nothing follows: `STOP`, `END` or `LENGTH`.
    experts: The first choice of every token, those of the prompt first, int32
      [MoE layers, S, tokens]; None where the programs do not return it.
  """

  text: str
  ids: list[int]
  ended: str
  experts: np.ndarray | None


# Called with the number of a prompt, a piece of text as soon as it is certain,
# and the first choices of its token, int32 [MoE layers, S], where the programs
# return them: then the pieces of the prompt come first.
Show = Callable[[int, str, np.ndarray | None], None]


def complete(
  steps: Steps,
  params: Params,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  options: Options,
  show: Show | None = None,
) -> list[Completion]:
  """Goes on with prompts; all processes of a run call this alike.

  What follows a prompt depends on the seed, its number and itself.

  Args:
    steps: The programs of the model.
    params: Its parameters, where the mesh of the programs has them.
    tokenizer: Its tokenizer.
    prompts: The token ids of every prompt.
    options: How.
    show: Gets the text as it grows; None for nobody.

  Raises:
    UserError: A prompt is empty or has an id that is not in the vocabulary.
  """
  check_prompts(prompts, steps.vocab_size)
  end_id = None
  if options.ends and not ends_lines(tokenizer):
    end_id = tokenizer.eos_id
  rows = [
    _Row(number, ids, tokenizer, options, end_id, show)
    for number, ids in enumerate(prompts)
  ]
  # Of like length in a batch, so that little of it is padding; and the longest
  # first, so that what does not fit into memory fails at once.
  rows_by_length = sorted(rows, key=lambda row: -len(row.prompt))
  for first in range(0, len(rows), options.batch_size):
    together = rows_by_length[first : first + options.batch_size]
    _run(steps, params, together, options)
  return [row.completion() for row in rows]


def _run(
  steps: Steps, params: Params, rows: 'Sequence[_Row]', options: Options
) -> None:
  batch = Rows(
    steps,
    params,
    [row.prompt for row in rows],
    # The experts of the last token are told by the one after it.
    max_tokens=options.max_tokens + steps.returns_experts,
    sampling=options.sampling,
    seed=options.seed,
    numbers=[row.number for row in rows],
  )
  for token in batch:
    for b in np.flatnonzero(batch.active_B).tolist():
      batch.active_B[b] = rows[b].take(token, b)


class _Row:
  """A prompt, and what follows it so far."""

  def __init__(
    self,
    number: int,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    options: Options,
    end_id: int | None,
    show: Show | None,
  ) -> None:
    self.number, self.prompt = number, prompt
    self._ids: list[int] = []
    self._ended = ''
    self._writing = Writing(tokenizer, prompt, options.stops)
    self._max_tokens, self._end_id = options.max_tokens, end_id
    self._show = show or (lambda number, piece, experts: None)
    self._experts: list[np.ndarray] = []
    # Pieces whose experts are not known yet.
    self._waiting: list[str] = _pieces(tokenizer, prompt)

  def take(self, token: Token, b: int) -> bool:
    """Takes the next token, and returns whether any more are wanted.

    Args:
      token: The tokens of all rows.
      b: This one's place.
    """
    if token.experts is not None:
      self._tell(token.experts[:, :, b])
    if not self._ended:
      piece = self._add(int(token.ids_B[b]))
      if token.experts is None:
        self._show(self.number, piece, None)
      else:
        self._waiting.append(piece)
        return True
    return not self._ended

  def completion(self) -> Completion:
    """Returns what became of it."""
    experts = None
    if self._experts:
      known = len(self.prompt) + len(self._ids)
      experts = np.concatenate(self._experts, axis=-1)[..., :known]
    return Completion(self._writing.text, self._ids, self._ended, experts)

  def _add(self, token: int) -> str:
    """Returns the text that is certain with one token more."""
    if token == self._end_id:
      self._ended = END
      return self._writing.end()
    self._ids.append(token)
    piece = self._writing.add(token)
    if self._writing.stop:
      self._ended = STOP
    elif len(self._ids) == self._max_tokens:
      self._ended = LENGTH
      piece += self._writing.end()
    return piece

  def _tell(self, experts_L: np.ndarray) -> None:
    """Shows the pieces that wait for these experts, [MoE layers, S, L]."""
    experts_L = experts_L[..., : len(self._waiting)]
    self._experts.append(experts_L)
    for i, piece in enumerate(self._waiting):
      self._show(self.number, piece, experts_L[..., i])
    self._waiting = []


def _pieces(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[str]:
  """Returns the text that each token of a prompt adds."""
  writing = Writing(tokenizer, [], ())
  pieces = [writing.add(int(i)) for i in prompt]
  pieces[-1] += writing.end()
  return pieces
