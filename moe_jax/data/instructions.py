"""Instruction data: rows of examples to texts in which responses are marked.

The template `alpaca` is Stanford Alpaca's own (github.com/tatsu-lab/
stanford_alpaca, train.py), which a row without an input has in a shorter form.
The other one, `chat`, is ours: plain text, so that it needs no special token.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import nearest, printable

# A piece of a text, and whether it is a response.
Part = tuple[str, bool]

_WITH_INPUT = (
  'Below is an instruction that describes a task, paired with an input that'
  ' provides further context. Write a response that appropriately completes the'
  ' request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n'
  '### Response:'
)
_WITHOUT_INPUT = (
  'Below is an instruction that describes a task. Write a response that'
  ' appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n'
  '### Response:'
)
_HEADING, _BETWEEN = '### {}:\n', '\n\n'

# What rows call the author of a message; ShareGPT's names are the last two.
_ROLES = {
  'system': 'System',
  'user': 'User',
  'assistant': 'Assistant',
  'human': 'User',
  'gpt': 'Assistant',
}
# The field of the messages, and in each of them those of author and text.
_MESSAGES = {
  'messages': ('role', 'content'),
  'conversations': ('from', 'value'),
}


class BadRow(ValueError):
  """A row that is no example; says what is wrong with it."""


class NoResponse(ValueError):
  """An example without anything to learn; says why."""


class Example(bytes):
  """The UTF-8 text of an example.

  Attributes:
    responses: Where each response begins and ends, in characters, one after the
      other; the last one ends the text.
  """

  responses: tuple[int, ...] = ()


class Format(NamedTuple):
  """A kind of example.

  Attributes:
    fields: The names that a row may have; all others are left alone.
    needed: Any of these is enough to be read, the first if none is there.
    parts: Returns the parts of a row that has what is needed.
    template: What the text follows; another template is other data.
    prompt: Returns the text of messages, each with `role` and `content`, up to
      where the model goes on: within the last one, if that is the assistant's.
  """

  fields: tuple[str, ...]
  needed: tuple[tuple[str, ...], ...]
  parts: Callable[[Mapping[str, Any]], list[Part]]
  template: str
  prompt: Callable[[Sequence[Mapping[str, str]]], str]

  def check(self, names: Iterable[str]) -> None:
    """Refuses a row or a table without the fields that are needed."""
    names = [str(name) for name in names]
    if any(set(needed) <= set(names) for needed in self.needed):
      return
    missing = [name for name in self.needed[0] if name not in names]
    others = ''.join(f' (nor {", ".join(each)})' for each in self.needed[1:])
    near = nearest(missing[0], names)
    there = printable(', '.join(names[:20]), 400) or 'nothing'
    raise BadRow(f'has no {", ".join(missing)}{others}{near} (there: {there})')

  def example(self, row: object) -> Example:
    """Returns the text of a row.

    Raises:
      BadRow: It is no such example.
      NoResponse: There is nothing to learn from it.
    """
    if not isinstance(row, dict):
      raise BadRow(f'is no object with fields, but {_kind(row)}')
    self.check(row)
    parts = self.parts(row)
    try:
      made = Example(''.join(text for text, _ in parts).encode())
    except UnicodeEncodeError as error:
      raise NoResponse('half a surrogate pair') from error
    ends = itertools.accumulate(len(text) for text, _ in parts)
    made.responses = tuple(
      place
      for end, (text, response) in zip(ends, parts, strict=True)
      if response
      for place in (end - len(text), end)
    )
    return made


def parts_of(text: str, responses: Sequence[int]) -> list[Part]:
  """Returns the parts of a text; see `Example` for where responses are."""
  bounds = [0, *responses]
  return [
    (text[begin:end], bool(n % 2))
    for n, (begin, end) in enumerate(itertools.pairwise(bounds))
    if begin < end
  ]


def encode(
  parts: Sequence[Part], encode_text: Callable[[str], np.ndarray], eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids of a text, and bool at those to be predicted.

  Parts are encoded apart. An `eos_id` ends each response; the last one's is
  what separates documents, and not of this text.

  Args:
    parts: The text.
    encode_text: That of a tokenizer.
    eos_id: That of the tokenizer.
  """
  ids, targets = [], []
  for n, (text, response) in enumerate(parts, start=1):
    found = encode_text(text)
    if response and n < len(parts):
      found = np.append(found, np.array(eos_id, found.dtype))
    ids.append(found)
    targets.append(np.full(len(found), response))
  return np.concatenate(ids), np.concatenate(targets)


def _alpaca(row: Mapping[str, Any]) -> list[Part]:
  given = {'input': ''} | {k: v for k, v in row.items() if v is not None}
  fields = 'instruction', 'input', 'output'
  texts = {name: _text(repr(name), given.get(name)) for name in fields}
  if not texts['output'].strip():
    raise NoResponse("an empty 'output'")
  template = _WITH_INPUT if texts['input'] else _WITHOUT_INPUT
  return [(template.format(**texts), False), (texts['output'], True)]


def _chat(row: Mapping[str, Any]) -> list[Part]:
  """Returns the parts of messages; what follows the last response is no part.

  There is nothing to learn from it.
  """
  there = (name for name in _MESSAGES if row.get(name) is not None)
  field = next(there, 'messages')
  messages = row[field]
  if not isinstance(messages, list):
    raise BadRow(f'has no list in {field!r}, but {_kind(messages)}')
  parts: list[Part] = []
  prompt = ''
  for number, message in enumerate(messages, start=1):
    role, text = _message(message, field, f'{field}[{number}]')
    prompt += (_BETWEEN if number > 1 else '') + _HEADING.format(role)
    if role != 'Assistant':
      prompt += text
      continue
    if not text.strip():
      raise NoResponse('an empty message of the assistant')
    parts += [(prompt, False), (text, True)]
    prompt = ''
  if not parts:
    raise NoResponse('no message of the assistant')
  return parts


def _alpaca_prompt(messages: Sequence[Mapping[str, str]]) -> str:
  """Returns all messages but a begun response as one instruction."""
  *asked, last = messages
  begun = last['content'] if last['role'] == 'assistant' else ''
  told = asked if last['role'] == 'assistant' else messages
  instruction = _BETWEEN.join(message['content'] for message in told)
  return _WITHOUT_INPUT.format(instruction=instruction) + begun


def _chat_prompt(messages: Sequence[Mapping[str, str]]) -> str:
  texts = [
    _HEADING.format(_ROLES[message['role']]) + message['content']
    for message in messages
  ]
  if messages[-1]['role'] != 'assistant':
    texts.append(_HEADING.format('Assistant'))
  return _BETWEEN.join(texts)


def _message(message: object, field: str, where: str) -> tuple[str, str]:
  """Returns the heading and the text of a message."""
  author, content = _MESSAGES[field]
  if not isinstance(message, dict):
    raise BadRow(f'has no object in {where}, but {_kind(message)}')
  role = _text(f'{where}.{author}', message.get(author))
  if role not in _ROLES:
    known = ', '.join(_ROLES)
    raise BadRow(
      f'has the role {role[:40]!r} in {where}; the roles are {known}'
    )
  return _ROLES[role], _text(f'{where}.{content}', message.get(content))


def _text(name: str, value: object) -> str:
  """Returns a value that has to be a text."""
  if isinstance(value, str):
    return value
  raise BadRow(f'has no text in {name}, but {_kind(value)}')


def _kind(value: object) -> str:
  """Returns what a value of JSON is."""
  kinds: list[tuple[type, str]] = [
    (bool, 'true or false'),
    (int | float, 'a number'),  # type: ignore[list-item]
    (str, 'a text'),
    (list, 'a list'),
    (dict, 'an object'),
  ]
  return next((name for kind, name in kinds if isinstance(value, kind)), 'null')


FORMATS = {
  'alpaca': Format(
    ('instruction', 'input', 'output'),
    (('instruction', 'output'),),
    _alpaca,
    _WITH_INPUT + _WITHOUT_INPUT,
    _alpaca_prompt,
  ),
  'chat': Format(
    tuple(_MESSAGES),
    tuple((name,) for name in _MESSAGES),
    _chat,
    _BETWEEN + _HEADING,
    _chat_prompt,
  ),
}
