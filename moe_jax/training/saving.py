"""Saves in the background: one at a time, and failures known in time."""

import contextlib
import datetime
import errno
import functools
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

from moe_jax import disk
from moe_jax.errors import RetryableError, UserError
from moe_jax.parallel import multihost
from moe_jax.training.run_dir import RunDir
from moe_jax.training.saved_step import UNFINISHED, named_steps, os_error

_CLEANING_SECONDS = 60  # at the most, to remove what cut saves left


class Saver:
  """Saves steps to DIR/checkpoints by Orbax' manager, and forgets old ones.

  A failure is forgiven once: what is in memory is then to be saved. All
  processes of a run call this, and every method, alike.
  """

  def __init__(self, run: RunDir) -> None:
    """Opens the folder, and begins to remove what cut saves left there.

    Args:
      run: The directory of the run; nothing is removed if it is only read.
    """
    self._folder = run.checkpoints
    self._failures = 0  # in a row
    self._in_flight: int | None = None
    _silence_failed_saves()
    before = {*threading.enumerate()}
    self._manager = _manager(run)
    self._cleaning = {*threading.enumerate()} - before

  def steps(self) -> list[int]:
    """Returns the steps that are saved or about to be, ascending."""
    return sorted(self._manager.all_steps())

  def reload(self) -> None:
    """Looks anew at what there is; nothing may be in flight."""
    self._manager.reload()

  def wait(self) -> None:
    """Blocks until nothing is being saved; raises what a save failed with."""
    self._manager.wait_until_finished()

  def finish(self) -> None:
    """Blocks until nothing is being saved, and closes.

    Raises:
      RetryableError: The last save has failed.
    """
    try:
      self.wait()
    except Exception as error:
      if os_error(error) is None:
        raise
      raise self._given_up(error) from error
    finally:
      self.close()

  def close(self) -> None:
    """Ends what runs in the background; a save that failed is not told."""
    with contextlib.suppress(Exception):
      self.wait()
    self._manager.close()
    # Orbax itself waits for its removal of cut saves only when it saves. Where
    # the program ended before, that would write a traceback. What fails in it
    # is raised by its own `join`, and by the next save.
    for thread in self._cleaning:
      _join(thread)

  def begin(self, step: int, items: ocp.args.Composite) -> None:
    """Begins to save; a failure at once is one like any other.

    The arrays may be donated as soon as this returns.

    Args:
      step: The number of steps done.
      items: What is saved.

    Raises:
      RetryableError: This is the second failure in a row.
    """
    self._in_flight = step
    failure = None
    try:
      # Orbax would skip a step while an earlier save is in flight.
      self._manager.save(step, args=items, force=True)
    except Exception as error:
      failure = error
    if multihost.any_process(failure is not None):
      self._judge(failure)

  def settled(self) -> bool:
    """Waits for the save in flight; returns whether the last one did well.

    Raises:
      RetryableError: This is the second failure in a row.
    """
    if self._in_flight is None:
      return not self._failures
    error = None
    try:
      self.wait()
    except Exception as caught:
      error = caught
    return self._judge(error)

  def _judge(self, error: Exception | None) -> bool:
    """Returns whether a save did well; a second failure in a row is raised."""
    if not multihost.any_process(error is not None):
      self._in_flight, self._failures = None, 0
      return True
    error = error or OSError(errno.EIO, "another process's part failed")
    self._failures += 1
    if os_error(error) is None:  # a fault of ours
      raise error
    if self._failures > 1:
      raise self._given_up(error) from error
    self._forget_cut_save()
    self._in_flight = None
    return False

  def _forget_cut_save(self) -> None:
    """Frees the space that the failed save took."""
    if multihost.is_main_process():
      name = f'{self._in_flight}{UNFINISHED}'
      path = os.path.join(self._folder, name)
      shutil.rmtree(path, ignore_errors=True)
    self.reload()  # the old ones that it would have replaced

  def _given_up(self, error: Exception) -> RetryableError | UserError:
    """Returns what to say of a save that failed, and of what is there."""
    answer = os_error(error) or errno.EIO
    self._forget_cut_save()
    steps = [step for step in self.steps() if step != self._in_flight]
    begins = f'goes on from step {steps[-1]}' if steps else 'begins anew'
    path = os.path.join(self._folder, str(self._in_flight))
    kind = RetryableError if disk.passes(answer) else UserError
    return kind(
      f'checkpoint {path} cannot be written: {os.strerror(answer)}; mend that,'
      f' and the same command {begins}'
    )

  def failed(self) -> bool:
    """Returns whether the last save has failed, as far as that is known.

    To be asked after every step: what is in memory is then to be saved at once.
    With several processes it is only known when the next save begins.

    Raises:
      RetryableError: So has the save before it.
    """
    if self._in_flight is None:
      return self._failures > 0
    if not multihost.is_single_process():
      return False
    return not self._manager.is_saving_in_progress() and not self.settled()


@functools.cache
def _silence_failed_saves() -> None:
  """Keeps tracebacks that Orbax logs of failed saves from the user.

  What they say is raised.
  """

  def unheard(record: logging.LogRecord) -> bool:
    return f'{os.sep}orbax{os.sep}' not in record.pathname

  logging.getLogger('absl').addFilter(unheard)


def _join(thread: threading.Thread) -> None:
  """Waits for a thread's end, also of one that is only about to start."""
  deadline = time.monotonic() + _CLEANING_SECONDS
  while time.monotonic() < deadline:
    try:
      threading.Thread.join(thread, _CLEANING_SECONDS)
    except RuntimeError:  # it has not started yet
      time.sleep(0.01)
    else:
      return


class _Step(ocp.path.step.Metadata):
  """A step that was saved when its folder was written."""

  @property
  def commit_timestamp(self) -> datetime.datetime:
    """Asked for each step there is; the item that says it may be damaged."""
    return datetime.datetime.fromtimestamp(self.path.stat().mtime, datetime.UTC)


class _StepNames(ocp.path.step.NameFormat[_Step]):
  """Steps by their number alone, as Orbax' own, and nothing read of them."""

  def build_name(self, step: int) -> str:
    return str(step)

  def find_all(self, base_path: epath.PathLike) -> Iterator[_Step]:
    for step in named_steps(os.fspath(base_path)):
      path = epath.Path(base_path) / str(step)
      if path.is_dir():
        yield _Step(step=step, path=path)

  def find_step(self, base_path: epath.PathLike, step: int) -> _Step:
    return _Step(step=step, path=epath.Path(base_path) / str(step))


class _Manager(ocp.CheckpointManager):
  """Orbax's, which does not ask whether the run is to stop.

  It would ask with its steps where `training.signals` counts in its own: jax
  then stops a run at a step that lies far off, or behind.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def _manager(run: RunDir) -> ocp.CheckpointManager:
  """Returns the manager of a run's checkpoints."""
  # Not Orbax's own read_only, which prints a warning: without a save, only
  # cleaning up would write. The folder is made when the run is claimed.
  checkpoint = run.config.checkpoint
  options = ocp.CheckpointManagerOptions(
    max_to_keep=checkpoint.keep,
    keep_period=checkpoint.keep_every or None,
    create=False,
    cleanup_tmp_directories=not run.read_only,
    save_root_metadata=False,
    step_name_format=_StepNames(),
  )
  return _Manager(
    run.checkpoints,
    options=options,
    item_handlers={
      'state': ocp.PyTreeCheckpointHandler(),
      'data': ocp.JsonCheckpointHandler(),
      'config': ocp.JsonCheckpointHandler(),
    },
  )
