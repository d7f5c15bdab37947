"""The files of a run's numbers: metrics.jsonl and TensorBoard's events."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax import disk, files, strict_json
from moe_jax.config.saved import ROLLBACK, SKIPPED_STEP
from moe_jax.errors import UserError
from moe_jax.training.tensorboard import TensorBoard
from moe_jax.training.trackers import Tracking

_FILE = 'metrics.jsonl'
_TRAIN = 'train'
_EVENTS = 'tensorboard'
_EVENT_LINES = (SKIPPED_STEP, ROLLBACK)  # which come when they come


class MetricsWriter:
  """Appends to DIR/metrics.jsonl and to the event files in DIR/tensorboard.

  One JSON object a line, `step` and `split` first; `strict_json` says how
  floats are written. A line is on disk, whole, when it has been written, or it
  is not there. Event files that cannot be written are given up, which is told:
  metrics.jsonl has the same numbers.

  Attributes:
    evaluated: Whether there is an evaluation of the step gone on from.
  """

  def __init__(
    self,
    workdir: str,
    resume_step: int | None,
    active: bool = True,
    every: Mapping[str, int] | None = None,
    tell: Callable[[str], None] = print,
    tracking: Tracking | None = None,
  ) -> None:
    """Opens the files and takes back what a resumed run will write again.

    Args:
      workdir: The run's directory, which exists.
      resume_step: The step of the checkpoint gone on from; what was written
        of later steps is dropped. None is a new start, which sets a file of
        another one aside as metrics.jsonl.1, or the next free number.
      active: Whether anything is written, as it is by one process alone.
      every: How many steps lie between two lines of 'train' and of an
        'evaluation', to find missing ones; 0 for no lines.
      tell: Tells a line to people: what was dropped or is missing, and what
        cannot be written.
      tracking: Is told the numbers too, and not closed; None for nothing.

    Raises:
      UserError: metrics.jsonl has a line that is not JSON, not being the last,
        or it or `tensorboard` is not what it should be.
      RetryableError: The disk is full.
    """
    self._active = active
    self._tracking = tracking
    self.evaluated = False
    if not active:
      return
    self._path = os.path.join(workdir, _FILE)
    with _in_one_line(self._path):
      lines = _read(self._path)
      if resume_step is None:
        _set_aside(self._path, lines, tell)
      else:
        lines = _cut_back(self._path, lines, resume_step, tell)
        _tell_of_holes(self._path, lines, every or {}, resume_step, tell)
      self._file = os.open(
        self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666
      )
    self.evaluated = any(
      line.step == resume_step and line.split not in (_TRAIN, *_EVENT_LINES)
      for line in lines
    )
    first = 0 if resume_step is None else resume_step + 1
    self._events = TensorBoard(
      os.path.join(workdir, _EVENTS),
      first,
      lambda error: tell(f'{error}: from here on only {_FILE} is written'),
    )

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(
    self,
    step: int,
    split: str,
    values: Mapping[str, Any],
    details: Mapping[str, float] | None = None,
    pictures: Mapping[str, np.ndarray] | None = None,
  ) -> None:
    """Writes one line; a scalar also for TensorBoard and the tracker.

    Their name of a scalar is `split/name`. They have no place for one that is
    not finite.

    Args:
      step: The number of steps done.
      split: 'train', or the name of an evaluation.
      values: Numbers, or arrays of them, such as one per layer; on the
        device or not.
      details: Scalars that are for these alone, as what the arrays hold.
      pictures: Pictures for these: RGB, uint8 [height, width, 3].

    Raises:
      RetryableError: The disk is full.
    """
    if not self._active:
      return
    plain = {name: np.asarray(value).tolist() for name, value in values.items()}
    row = {'step': step, 'split': split} | plain
    self._append(strict_json.dumps(row) + '\n')
    scalars: dict[str, float] = {
      f'{split}/{name}': value
      for name, value in plain.items()
      if isinstance(value, int | float)
    }
    scalars |= details or {}
    finite = {tag: x for tag, x in scalars.items() if math.isfinite(x)}
    self._events.log(step, finite, pictures or {})
    if self._tracking is not None:
      self._tracking.log(step, finite, pictures or {})

  def text(self, name: str, text: str, step: int) -> None:
    """Writes a text to TensorBoard, as it stands."""
    if self._active:
      self._events.text(step, name, text)

  def close(self) -> None:
    """Closes the files."""
    if self._active:
      self._active = False
      os.close(self._file)
      self._events.close()

  def _append(self, line: str) -> None:
    """Adds a line, or leaves the file as it was."""
    size = os.fstat(self._file).st_size

    def write() -> None:
      left = memoryview(line.encode())
      try:
        while left:
          left = left[os.write(self._file, left) :]
      except OSError:
        os.ftruncate(self._file, size)
        raise

    disk.retried(self._path, write)


@contextlib.contextmanager
def _in_one_line(path: str) -> Iterator[None]:
  """Reports what the file system refuses."""
  try:
    yield
  except OSError as error:
    raise disk.refused(path, error, 'move it away') from error


class _Line(NamedTuple):
  """A line of the file, with what is asked of it."""

  text: str
  step: int
  split: str


def _read(path: str) -> list[_Line]:
  """Returns the lines of the file, without a last one that was cut short."""
  try:
    with open(path, encoding='utf-8', errors='replace') as file:
      texts = file.read().splitlines()
  except FileNotFoundError:
    return []
  lines = []
  for number, text in enumerate(texts, start=1):
    try:
      row = files.parse_json(text)
      lines.append(_Line(text, int(row['step']), str(row.get('split'))))
    except (ValueError, TypeError, KeyError) as error:
      if number < len(texts):
        raise UserError(
          f'{path}:{number} is not a JSON object with a step; mend or remove it'
        ) from error
  return lines


def _set_aside(
  path: str, lines: Sequence[_Line], tell: Callable[[str], None]
) -> None:
  """Renames a file of another start, so that no line of it is lost."""
  if not lines:
    with contextlib.suppress(FileNotFoundError):
      os.remove(path)
    return
  for number in itertools.count(1):
    aside = f'{path}.{number}'
    if not os.path.lexists(aside):
      break
  os.rename(path, aside)
  tell(
    f'note: {path} has {len(lines)} lines, to step {lines[-1].step}, and there'
    f' is no checkpoint to go on from; it is now {aside}'
  )


def _cut_back(
  path: str,
  lines: Sequence[_Line],
  last: int,
  tell: Callable[[str], None],
) -> list[_Line]:
  """Drops the lines of steps after `last`, and one cut short; returns the rest.

  They are written again as these steps are.
  """
  kept = [line for line in lines if line.step <= last]
  text = ''.join(f'{line.text}\n' for line in kept)
  if os.path.exists(path) and os.path.getsize(path) != len(text.encode()):
    disk.retried(path, lambda: files.replace(path, text))
  dropped = [line.step for line in lines if line.step > last]
  if dropped:
    tell(
      f'note: {path} goes on from step {last}: lines of steps'
      f' {min(dropped)} to {max(dropped)} are dropped, to be written again'
    )
  return kept


def _tell_of_holes(
  path: str,
  lines: Sequence[_Line],
  every: Mapping[str, int],
  last: int,
  tell: Callable[[str], None],
) -> None:
  """Tells which steps up to `last` have no line though they should have one."""
  splits = {_TRAIN: every.get(_TRAIN, 0)}
  for line in lines:
    if line.split in _EVENT_LINES:
      continue
    splits.setdefault(line.split, every.get('evaluation', 0))
  for split, steps in splits.items():
    there = [line.step for line in lines if line.split == split]
    for first, final in holes(there, steps, last) if steps else ():
      tell(
        f'note: {path} lacks lines of {split}: there are none of steps {first}'
        f' to {final}'
      )


def holes(there: Sequence[int], every: int, last: int) -> list[tuple[int, int]]:
  """Returns the first and the last step of each stretch without a line.

  A stretch counts that is longer than `every` and than both beside it: a run
  may have written more rarely before it was resumed.

  Args:
    there: The steps that have a line.
    every: How many steps lie between two lines now.
    last: The step up to which lines are expected.
  """
  marks = [0, *sorted({*there} - {0})]
  lengths = [after - before for before, after in itertools.pairwise(marks)]
  found = [
    (marks[i] + 1, marks[i + 1] - 1)
    for i, length in enumerate(lengths)
    if length
    > max([every, *lengths[max(i - 1, 0) : i], *lengths[i + 1 : i + 2]])
  ]
  # The end is a stretch without a line behind it.
  if last - marks[-1] >= max([every, *lengths[-1:]]):
    found.append((marks[-1] + 1, last))
  return found
