"""A run's numbers and pictures for TensorBoard: files of events."""

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tensorboardX import event_file_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from moe_jax import disk
from moe_jax.errors import RetryableError, UserError


class TensorBoard:
  """A file of TensorBoard's events, given up when it cannot be written."""

  def __init__(
    self,
    folder: str,
    start: int,
    given_up: Callable[[RetryableError | UserError], None],
  ) -> None:
    """Opens a file, which hides what others have of step `start` and later.

    Args:
      folder: The folder that has the files, or is made for them.
      start: The first step that is written.
      given_up: Is told why nothing is written any more.

    Raises:
      UserError: There is something else than a folder.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
      raise UserError(f'{folder} is not a folder; move it away')
    self._folder = folder
    self._given_up = given_up
    self._writer: event_file_writer.EventsWriter | None = None
    begin = SessionLog(status=SessionLog.START)

    def make() -> None:
      os.makedirs(folder, exist_ok=True)
      # Files are named by the second: two starts within one need the suffix.
      self._writer = event_file_writer.EventsWriter(
        os.path.join(os.path.abspath(folder), 'events'), f'.{start}'
      )
      self._writer.write_event(Event(step=start, session_log=begin))
      self._writer.flush()

    self._try(make)

  def log(
    self,
    step: int,
    scalars: Mapping[str, float],
    pictures: Mapping[str, np.ndarray],
  ) -> None:
    """Writes what there is of a step.

    Args:
      step: The number of steps done.
      scalars: Finite numbers by their tags.
      pictures: Pictures by their tags, RGB, uint8 [height, width, 3].
    """
    parts = [summary.scalar(tag, value) for tag, value in scalars.items()]
    parts += [
      summary.image(tag, pixels, dataformats='HWC')
      for tag, pixels in pictures.items()
    ]
    self._add(step, parts)

  def text(self, step: int, tag: str, text: str) -> None:
    """Writes a text as it stands: as code, in Markdown."""
    indented = ''.join(f'    {line}\n' for line in text.splitlines())
    self._add(step, [summary.text(tag, indented)])

  def close(self) -> None:
    """Closes the file."""
    if self._writer is not None:
      self._try(self._writer.close)

  def _add(self, step: int, parts: list[Summary]) -> None:
    """Writes summaries as one event: each event costs a checksum in Python."""
    if self._writer is None or not parts:
      return
    joined = Summary(value=[value for part in parts for value in part.value])
    event = Event(step=step, summary=joined, wall_time=time.time())
    self._try(functools.partial(self._writer.write_event, event))
    if self._writer is not None:
      self._try(self._writer.flush)

  def _try(self, write: Callable[[], Any]) -> None:
    try:
      disk.retried(self._folder, write)
    except (RetryableError, UserError) as error:
      self._given_up(error)
      self._writer = None
