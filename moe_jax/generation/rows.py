"""A batch of prompts of any lengths, continued token by token."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import UserError
from moe_jax.generation.sampling import Sampling
from moe_jax.generation.steps import Draw, Next, Params, Steps

# Rows are at least so long, and a cache is for at least so many tokens.
_LEAST_READ, _LEAST_TOKENS = 32, 64
_LARGEST_SEED = 2**32 - 1


class Token(NamedTuple):
  """A token of every row.

  Attributes:
    ids_B: The tokens that follow, int32; of a row that has ended, any.
    experts: The first choice of what was read just before, first the prompts,
      int32 [MoE layers, S, B, L]; None where the programs do not return it.
  """

  ids_B: np.ndarray
  experts: np.ndarray | None


class Rows:
  """Prompts that are continued together.

  Shapes are rounded up, so that few programs are compiled: the number of rows,
  the length of the longest prompt and that of the longest text, to the next of
  1, 2, 3, 4, 6, 8, 12, 16, ...

  Attributes:
    active_B: Bool; whoever reads the tokens clears an element to end a row.
  """

  def __init__(
    self,
    steps: Steps,
    params: Params,
    prompts: Sequence[Any],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
  ) -> None:
    """Puts the prompts into rows.

    Args:
      steps: The programs of the model.
      params: Its parameters, where the mesh of the programs has them.
      prompts: The token ids of every prompt; none is empty.
      max_tokens: How many tokens follow in each row, at the most.
      sampling: How they are chosen.
      seed: What random numbers follow from, with the number of the prompt and
        the position in its text.
      numbers: The number of every prompt; None for 0, 1, 2, ...

    Raises:
      UserError: There is no prompt, one is empty or has an id that is not in
        the vocabulary, or a number is out of range.
    """
    check_prompts(prompts, steps.vocab_size)
    check_numbers(max_tokens, seed)
    self.active_B = np.ones(len(prompts), bool)
    self._steps, self._params, self._max_tokens = steps, params, max_tokens
    shards = steps.num_shards
    self._count = shards * rounded(-(-len(prompts) // shards))
    lengths = [len(ids) for ids in prompts]
    self._read = rounded(max(lengths), _LEAST_READ)
    ids_BL = np.zeros((self._count, self._read), np.int32)
    for row, ids in zip(ids_BL, prompts, strict=False):
      row[: len(ids)] = ids
    numbers = range(len(prompts)) if numbers is None else numbers
    # A row that no prompt takes has no token.
    lengths_B = self._of_rows(lengths, np.int32)
    numbers_B = self._of_rows(numbers, np.int32)
    placed = steps.place((ids_BL, lengths_B, np.uint32(seed), numbers_B))
    self._ids_BL, self._lengths_B, placed_seed, placed_numbers_B = placed
    self._draw = Draw(placed_seed, placed_numbers_B, sampling)

  def __iter__(self) -> Iterator[Token]:
    """Yields the tokens of all rows, position by position.

    It ends after `max_tokens`, or when no row is active any more. What follows
    a token is computed while that is looked at: of the last one, in vain.
    """
    steps, attend = self._steps, self._steps.attend
    longest = rounded(self._read + self._max_tokens, _LEAST_TOKENS)
    cache, following = steps.read(
      self._params,
      self._ids_BL,
      self._lengths_B,
      self._draw,
      num_slots=attend.num_slots(longest),
    )
    for count in range(self._max_tokens):
      ahead: Next | None = None
      if count + 1 < self._max_tokens:
        cache, ahead = steps.go_on(
          self._params,
          cache,
          following.ids_B,
          self._lengths_B,
          self._of_rows(self.active_B, bool),
          self._read,
          count,
          self._draw,
        )
      yield self._token(following)
      if ahead is None or not self.active_B.any():
        return
      following = ahead

  def _of_rows(self, values: Any, dtype: type) -> np.ndarray:
    """Returns a value for every row; 0 of those that no prompt takes."""
    found_B: np.ndarray = np.zeros(self._count, dtype)
    found_B[: len(values)] = values
    return found_B

  def _token(self, following: Next) -> Token:
    ids_B, experts = following
    count = len(self.active_B)
    return Token(
      np.asarray(ids_B)[:count],
      None if experts is None else np.asarray(experts)[:, :, :count],
    )


def rounded(size: int, least: int = 1) -> int:
  """Returns the next of 1, 2, 3, 4, 6, 8, 12, ... that is large enough."""
  power = 1 << (max(size, least) - 1).bit_length()
  smaller = 3 * power // 4
  return smaller if power > 2 and smaller >= max(size, least) else power


def check_prompts(prompts: Sequence[Any], vocab_size: int) -> None:
  """Refuses prompts that no model can go on with.

  Raises:
    UserError: There is none, one is empty, or has an id that is none.
  """
  if not len(prompts):
    raise UserError('there is no prompt to go on with')
  for number, ids in enumerate(prompts):
    if not len(ids):
      raise UserError(
        f'prompt {number} is empty; give at least one token to go on from'
      )
    if min(ids) < 0 or max(ids) >= vocab_size:
      raise UserError(
        f'prompt {number} has ids from {min(ids)} to {max(ids)}, but the'
        f' vocabulary has {vocab_size}'
      )


def check_numbers(max_tokens: int, seed: int) -> None:
  """Refuses numbers that are out of range, with a `UserError`."""
  if max_tokens < 1:
    raise UserError(f'max_tokens = {max_tokens} must be at least 1')
  if not 0 <= seed <= _LARGEST_SEED:
    raise UserError(f'seed = {seed} must be from 0 to {_LARGEST_SEED}')
