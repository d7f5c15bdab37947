"""The text of a row as it grows, token by token, up to where it stops."""

from collections.abc import Sequence

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError

# Tokens that spell one character, at the most; more are no text.
_LONGEST_CHARACTER = 8
# Tokens before a new one by which a tokenizer knows how to spell it.
_BEFORE = 4
_UNFINISHED = '\N{REPLACEMENT CHARACTER}'


class Writing:
  """What follows a prompt.

  Attributes:
    text: The text so far, without the stop that ended it.
    stop: The stop that ended it; '' while none has.
  """

  def __init__(
    self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]
  ) -> None:
    """Begins behind a prompt.

    Args:
      tokenizer: Spells the tokens.
      prompt_ids: The tokens of the prompt.
      stops: Texts before the first of which the writing ends.
    """
    self.text = ''
    self.stop = ''
    self._decode = tokenizer.decode
    self._before = [int(i) for i in prompt_ids[-_BEFORE:]]
    self._pending: list[int] = []
    self._stops = stops
    self._longest_stop = max(map(len, stops), default=0)
    self._shown = 0

  def add(self, token: int) -> str:
    """Takes one token more, and returns the text that is certain by now.

    Half a character waits for the other half, and what may become a stop for
    what follows.
    """
    self._pending.append(token)
    piece = self._spelled()
    long = len(self._pending) >= _LONGEST_CHARACTER
    if piece.endswith(_UNFINISHED) and not long:
      return ''
    self._take(piece)
    return self._show(len(self.text) - self._held())

  def end(self) -> str:
    """Returns what is left when no token follows."""
    if self._pending and not self.stop:
      self._take(self._spelled())
    return self._show(len(self.text))

  def _spelled(self) -> str:
    """Returns how the tokens that wait are spelled behind those before."""
    known = self._decode(self._before)
    return self._decode(self._before + self._pending)[len(known) :]

  def _take(self, piece: str) -> None:
    self._before = (self._before + self._pending)[-_BEFORE:]
    self._pending = []
    # A stop may have begun in the text before.
    first = max(len(self.text) - self._longest_stop, 0)
    self.text += piece
    found = {
      place: stop
      for stop in self._stops
      if (place := self.text.find(stop, first)) >= 0
    }
    if found:
      place = min(found)
      self.text, self.stop = self.text[:place], found[place]

  def _held(self) -> int:
    """Returns how long the end of the text is that may begin a stop."""
    if self.stop:
      return 0
    longest = min(self._longest_stop - 1, len(self.text))
    ends = (self.text[-n:] for n in range(longest, 0, -1))
    return next(
      (
        len(end)
        for end in ends
        if any(stop.startswith(end) for stop in self._stops)
      ),
      0,
    )

  def _show(self, end: int) -> str:
    shown, self._shown = self._shown, max(self._shown, end)
    return self.text[shown:end]


def prompt_ids(
  tokenizer: Tokenizer, text: str, begins: bool = True
) -> list[int]:
  """Returns the tokens of a prompt.

  Args:
    tokenizer: The tokenizer.
    text: The prompt.
    begins: Whether it is read as the beginning of a document, with what stands
      before one in front.

  Raises:
    UserError: The prompt is empty, or the tokenizer cannot encode it.
  """
  if not text:
    raise UserError(
      'a prompt is empty; give at least one character to go on from'
    )
  ids = [int(i) for i in tokenizer.encode(text)]
  if ends_lines(tokenizer):
    # A line that the prompt leaves open is not over.
    open_line = ids[-1:] == [tokenizer.eos_id] and not text.endswith('\n')
    return ids[:-1] if open_line and len(ids) > 1 else ids
  return [tokenizer.eos_id, *ids] if begins else ids


def ends_lines(tokenizer: Tokenizer) -> bool:
  """Returns whether the end of a line is what also ends a document."""
  try:
    return tokenizer.eos_id in tokenizer.encode('\n')
  except UserError:  # it has no token for that
    return False
