"""Checkpoints of a run: asynchronous, atomic, restored onto any mesh."""

import contextlib
import errno
import functools
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from moe_jax.errors import RetryableError, UserError
from moe_jax.parallel import multihost
from moe_jax.training import digests
from moe_jax.training.run_dir import RunDir
from moe_jax.training.saved_step import (
  VOCABULARY,
  DamagedError,
  Restored,
  SavedStep,
  data_item,
  os_error,
)

_DATA = 'data'  # the entry that describes the data
_TEMPORARY = '.orbax-checkpoint-tmp'  # ends the name of an unfinished save
_CLEANING_SECONDS = 60  # at the most, to remove what cut saves left


class Checkpointer:
  """The checkpoints in DIR/checkpoints.

  A checkpoint holds the state (a dictionary of pytrees of arrays), digests of
  all its arrays, the position in the data, what the data and the vocabulary
  were, and the config. The newest `checkpoint.keep` stay, and every step that
  is a multiple of `checkpoint.keep_every`. A save that a crash cut short is
  never listed, and the next run removes what it left.

  All processes of a run call this, and every method, alike. As a context it
  waits for saves in flight when it is left.
  """

  def __init__(
    self,
    run: RunDir,
    vocabulary: str | None = None,
    data: Mapping[str, Any] | None = None,
  ) -> None:
    """Opens the checkpoints; nothing is written before the first save.

    Args:
      run: The directory of the run, which is claimed before the first save.
      vocabulary: The fingerprint of the data's vocabulary; None asks for none.
      data: What the data are, see `TokenSequences.fingerprint`; None asks for
        none.

    Raises:
      UserError: The newest checkpoint is of another vocabulary or other data,
        or the folder is none.
    """
    self._run = run
    self._vocabulary = vocabulary
    self._data = data
    self._failures = 0  # in a row, of saving
    self._in_flight: int | None = None
    if os.path.lexists(run.checkpoints) and not os.path.isdir(run.checkpoints):
      raise UserError(
        f'{run.checkpoints} is no folder, which is to hold the checkpoints;'
        ' move it away'
      )
    _silence_failed_saves()
    before = {*threading.enumerate()}
    self._manager = _manager(run)
    self._cleaning = {*threading.enumerate()} - before
    try:
      multihost.fail_together(self._check_newest)
    except BaseException:
      self._close()
      raise

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      if kind is None:  # or it would hide what ended the run
        raise self._cannot_save(error) from error
    finally:
      self._close()

  def _close(self) -> None:
    self._manager.close()
    # Orbax itself waits for its removal of cut saves only when it saves. Where
    # the program ended before, that would write a traceback. What fails in it
    # is raised by its own `join`, and by the next save.
    for thread in self._cleaning:
      _join(thread)

  def steps(self) -> list[int]:
    """Returns the steps there are checkpoints of, ascending."""
    return sorted({*self._manager.all_steps(), *_no_folders(self._run)})

  def latest(self) -> int | None:
    """Returns the newest step saved; None before the first.

    Raises:
      UserError: The processes of the run do not see the same.
    """
    latest = max(self.steps(), default=None)
    multihost.assert_equal(
      -1 if latest is None else latest,
      f'the newest checkpoint in workdir {self._run.path}',
    )
    return latest

  def vocabulary(self) -> str | None:
    """Returns the fingerprint in the newest checkpoint, None without one."""
    steps = self.steps()
    return self.data(steps[-1]).get(VOCABULARY) if steps else None

  def data(self, step: int) -> dict[str, Any]:
    """Returns what a checkpoint holds beside its arrays and config.

    Raises:
      DamagedError: It is not what was saved.
    """
    return self._saved(step).data

  def save(
    self,
    step: int,
    state: dict[str, Any],
    position: int | None = None,
    skipped: Sequence[tuple[int, int]] = (),
    wait: bool = False,
  ) -> bool:
    """Begins to save; returns whether it did: a step is never saved twice.

    The arrays may be donated as soon as this returns. A first failure is
    forgiven, see `failed`.

    Args:
      step: The number of steps done so far.
      state: Pytrees of jax.Array.
      position: The number of batches read so far; None is `step`.
      skipped: Stretches of the data that are not trained on: the first position
        of each, and how many batches.
      wait: Whether to wait until it is saved, and to try again if it fails.

    Raises:
      RetryableError: This is the second failure in a row.
    """
    if self._settled() and step in self._manager.all_steps():
      return False
    more: dict[str, Any] = {}
    if self._data is not None:
      more[_DATA] = dict(self._data)
    if self._vocabulary:
      more[VOCABULARY] = self._vocabulary
    position = step if position is None else position
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state),
      data=ocp.args.JsonSave(data_item(step, state, position, skipped, **more)),
      config=ocp.args.JsonSave(self._run.config.to_dict()),
    )
    self._begin(step, items)
    if wait and not self._settled():
      self._begin(step, items)
      self._settled()
    return True

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
    return not self._manager.is_saving_in_progress() and not self._settled()

  def set_aside(self, step: int) -> str:
    """Moves a checkpoint out of the way; returns where it is kept.

    It is no longer one of the run's, and a person may take it back. Nothing may
    be in flight.
    """

    def move() -> str:
      target = self._run.aside(step)
      if multihost.is_main_process():
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.rename(self._saved(step).path, target)
      return target

    target = multihost.fail_together(move)
    self._manager.reload()
    return target

  def wait(self) -> None:
    """Blocks until nothing is being saved; raises what a save failed with."""
    self._manager.wait_until_finished()

  def restore(
    self, abstract_state: dict[str, Any], step: int | None = None
  ) -> Restored:
    """Returns a checkpoint; waits for a save in flight.

    Args:
      abstract_state: jax.ShapeDtypeStruct leaves with the shardings wanted;
        entries left out at the top, such as `opt_state`, are not read.
      step: The step of the checkpoint; None for the newest.

    Raises:
      UserError: There is no such checkpoint, it is damaged, or it is of
        another model.
    """
    self.wait()
    saved = self._saved(self._existing(step))
    try:
      return self._restored(saved, abstract_state)
    except DamagedError as error:
      raise DamagedError(f'{error}; {self._remedy(saved.step)}') from error

  def resume(self, abstract_state: dict[str, Any]) -> Restored | None:
    """Returns the checkpoint that training goes on from, None without any.

    It is the newest. Where that is damaged and `checkpoint.fallback` says so,
    it is the newest sound one, and those after it are set aside.

    Args:
      abstract_state: As in `restore`, whole.

    Raises:
      UserError: The checkpoint is damaged, or it is of another model.
    """
    self.latest()  # which all processes have to agree on
    errors: dict[int, DamagedError] = {}
    for step in reversed(self.steps()):
      try:
        restored = self._restored(self._saved(step), abstract_state)
      except DamagedError as error:
        errors[step] = error
        if not self._falls_back():
          raise DamagedError(f'{error}; {self._remedy(step)}') from error
        continue
      for damaged, why in errors.items():
        target = self.set_aside(damaged)
        if multihost.is_main_process():
          told = f'{why}; it is set aside as {target}'
          print(
            f'{told}, and the run goes on from step {step}', file=sys.stderr
          )
      return restored
    if errors:
      first = next(iter(errors.values()))
      raise DamagedError(
        f'{first}; no other checkpoint in workdir {self._run.path} is sound:'
        ' begin anew in another --workdir'
      ) from first
    return None

  def outlook(self) -> str:
    """Returns what the same command will do if this process ends now.

    It only looks at names of folders, so any thread may call it.

    Raises:
      OSError: There is no such folder yet.
    """
    names = os.listdir(self._run.checkpoints)
    steps = [int(name) for name in names if name.isdecimal()]
    if not steps:
      return 'there is no checkpoint yet, so the same command begins anew'
    return f'the same command goes on from step {max(steps)}'

  def _begin(self, step: int, items: ocp.args.Composite) -> None:
    """Begins to save; a failure at once is one like any other."""
    self._in_flight = step
    failure = None
    try:
      # Orbax would skip a step while an earlier save is in flight.
      self._manager.save(step, args=items, force=True)
    except Exception as error:
      failure = error
    if multihost.any_process(failure is not None):
      self._judge(failure)

  def _settled(self) -> bool:
    """Waits for the save in flight; returns whether the last one did well."""
    if self._in_flight is None:
      return not self._failures
    error = None
    try:
      self._manager.wait_until_finished()
    except Exception as caught:
      error = caught
    return self._judge(error)

  def _judge(self, error: Exception | None) -> bool:
    """Returns whether a save did well; a second failure in a row is raised."""
    if not multihost.any_process(error is not None):
      self._in_flight, self._failures = None, 0
      return True
    error = error or OSError(errno.EIO, "another process's part failed")
    failure = self._cannot_save(error)
    self._failures += 1
    if self._failures > 1:
      raise failure from error
    self._forget_cut_save()
    self._in_flight = None
    return False

  def _forget_cut_save(self) -> None:
    """Frees the space that the failed save took."""
    if multihost.is_main_process():
      name = f'{self._in_flight}{_TEMPORARY}'
      path = os.path.join(self._run.checkpoints, name)
      shutil.rmtree(path, ignore_errors=True)
    self._manager.reload()  # the old ones that it would have replaced

  def _cannot_save(self, error: Exception) -> Exception:
    """Returns the failure of a save; a fault of ours as it is."""
    answer = os_error(error)
    if answer is None:
      return error
    self._manager.reload()
    steps = [step for step in self.steps() if step != self._in_flight]
    begins = f'goes on from step {steps[-1]}' if steps else 'begins anew'
    path = os.path.join(self._run.checkpoints, str(self._in_flight))
    return RetryableError(
      f'checkpoint {path} cannot be written: {os.strerror(answer)}; mend that,'
      f' and the same command {begins}'
    )

  def _restored(
    self, saved: SavedStep, abstract_state: dict[str, Any]
  ) -> Restored:
    """Reads and verifies a checkpoint; it is sound for all processes or none.

    Raises:
      DamagedError: It is damaged; without a remedy.
    """

    def read() -> tuple[dict[str, Any], DamagedError | None]:
      try:
        self._check_data(saved.data)
        self._check_shapes(saved, abstract_state)
        wanted = _with_step(abstract_state, saved.leaves)
        return saved.read(wanted), None
      except DamagedError as error:
        return {}, error

    state, error = multihost.fail_together(read)
    if multihost.any_process(error is not None):
      raise error or DamagedError(
        f'checkpoint {saved.path} is damaged: another process cannot read it'
      )
    saved.verify(state)
    return saved.restored({name: state[name] for name in abstract_state})

  def _saved(self, step: int) -> SavedStep:
    return SavedStep(self._run.checkpoints, step)

  def _existing(self, step: int | None) -> int:
    steps = self.steps()
    if not steps:
      raise UserError(
        f'workdir {self._run.path} holds no checkpoint yet;'
        f' {self._run.remedy or "train first"}'
      )
    if step is not None and step not in steps:
      raise UserError(
        f'workdir {self._run.path} has no checkpoint of step {step};'
        f' there are {", ".join(map(str, steps))}'
      )
    return steps[-1] if step is None else step

  def _remedy(self, step: int) -> str:
    """Returns what to do about a damaged checkpoint."""
    if self._run.remedy:
      return self._run.remedy
    before = [other for other in self.steps() if other < step]
    other = f'`moe_jax eval` takes --step={before[-1]}' if before else ''
    if self._run.read_only:
      return other or 'there is none before it'
    if not before:
      return 'move that folder away to begin anew'
    return (
      f'move that folder away to go on from step {before[-1]}, which'
      f' --config.checkpoint.fallback=on does by itself; {other}'
    )

  def _falls_back(self) -> bool:
    """Returns whether a damaged checkpoint is set aside without a person."""
    chosen = self._run.config.checkpoint.fallback
    if chosen == 'auto':
      terminals = (sys.stdin, sys.stdout)
      attended = all(each is not None and each.isatty() for each in terminals)
      return not multihost.any_process(attended)
    return chosen == 'on'

  def _check_newest(self) -> None:
    """Refuses other data before anything is read of it."""
    steps = self.steps()
    if steps:
      with contextlib.suppress(DamagedError):  # told when it is read
        self._check_data(self._saved(steps[-1]).data)

  def _check_data(self, item: Mapping[str, Any]) -> None:
    """Refuses data that are not those of a checkpoint."""
    saved = item.get(VOCABULARY)
    if self._vocabulary is not None and saved != self._vocabulary:
      what = 'do not say which' if saved is None else 'are of another'
      tokenizer = self._run.config.data.tokenizer
      raise UserError(
        f'workdir {self._run.path}: its checkpoints {what} vocabulary, and'
        f' data.tokenizer = {tokenizer!r} takes its ids from the data; give the'
        ' data (data.name, data.path, data.text_key) as it was in training, or'
        f' {self._run.remedy or "another --workdir"}'
      )
    self._check_fingerprint(item.get(_DATA))

  def _check_fingerprint(self, saved: Mapping[str, Any] | None) -> None:
    """Refuses to go on with other data than those trained on."""
    refused = self._run.config.data.changed == 'refuse'
    if self._data is None or saved is None or not refused:
      return
    changes = [
      f'{key} {saved.get(key)} -> {value}'
      for key, value in self._data.items()
      if key != 'name' and saved.get(key) != value
    ]
    if changes:
      raise UserError(
        f'workdir {self._run.path} was trained on other data:'
        f' {saved.get("name")} -> {self._data["name"]} ({", ".join(changes)});'
        ' give the old data, another --workdir, or'
        ' --config.data.changed=allow to go on with these'
      )

  def _check_shapes(
    self, saved: SavedStep, abstract_state: dict[str, Any]
  ) -> None:
    asked = digests.flatten(abstract_state)
    there = {
      path: leaf
      for path, leaf in saved.leaves.items()
      if path.split('.')[0] in abstract_state
    }
    remedy = self._run.remedy or 'give its config or another --workdir'
    for path in sorted(there | asked):
      old, new = _kind(there.get(path)), _kind(asked.get(path))
      if old != new:
        raise UserError(
          f'workdir {self._run.path} was made with another model: {path} is'
          f' {old} in the checkpoint of step {saved.step} and {new} by this'
          f' config; {remedy}'
        )


def _with_step(
  abstract_state: dict[str, Any], leaves: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the state wanted and, where it is saved, its step."""
  wanted = jax.tree.leaves(abstract_state)
  if 'step' in abstract_state or 'step' not in leaves or not wanted:
    return abstract_state
  sharding = digests.everywhere(wanted[0].sharding)
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
  return abstract_state | {'step': step}


def _no_folders(run: RunDir) -> list[int]:
  """Returns the steps whose name something has that is no folder."""
  try:
    names = os.listdir(run.checkpoints)
  except FileNotFoundError:
    return []
  return [
    int(name)
    for name in names
    if re.fullmatch(r'0|[1-9]\d*', name)
    and not os.path.isdir(os.path.join(run.checkpoints, name))
  ]


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
  )
  return ocp.CheckpointManager(
    run.checkpoints,
    options=options,
    item_handlers={
      'state': ocp.PyTreeCheckpointHandler(),
      'data': ocp.JsonCheckpointHandler(),
      'config': ocp.JsonCheckpointHandler(),
    },
  )


def _kind(leaf: Any) -> str:
  return 'missing' if leaf is None else f'{leaf.dtype} {list(leaf.shape)}'
