"""Checkpoints of a run: asynchronous, atomic, restored onto any mesh."""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp

from moe_jax.errors import UserError
from moe_jax.parallel import multihost
from moe_jax.training.run_dir import RunDir

_VOCABULARY = 'dictionary'  # how checkpoints have always spelt it
# What Orbax and TensorStore raise where files are missing, cut or garbled.
_DAMAGED = (ValueError, KeyError, OSError)
_GIVEN_UP = 'Event loop is closed'  # what reads say that end after a failure
_CLEANING_SECONDS = 60  # at the most, to remove what cut saves left


class Checkpointer:
  """The checkpoints in DIR/checkpoints.

  A checkpoint holds the state (a dictionary of pytrees of arrays), the
  fingerprint of the vocabulary that gave the tokens their ids, and the config.
  The newest `checkpoint.keep` stay, and every step that is a multiple of
  `checkpoint.keep_every`. A save that a crash cut short is never listed, and
  the next run removes what it left.

  All processes of a run call this, and every method, alike. As a context it
  waits for saves in flight when it is left.
  """

  def __init__(self, run: RunDir, vocabulary: str | None = None) -> None:
    """Opens the checkpoints; nothing is written before the first save.

    Args:
      run: The directory of the run, which is claimed before the first save.
      vocabulary: The fingerprint of the data's vocabulary; None asks for none.

    Raises:
      UserError: The newest checkpoint is of another vocabulary.
    """
    self._run = run
    self._vocabulary = vocabulary
    before = {*threading.enumerate()}
    self._manager = _manager(run)
    self._cleaning = {*threading.enumerate()} - before
    try:
      self._check_vocabulary()
    except BaseException:
      self._close()
      raise

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *_: object) -> None:
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
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """Returns the newest step saved; None before the first.

    Raises:
      UserError: The processes of the run do not see the same.
    """
    latest = self._manager.latest_step()
    multihost.assert_equal(
      -1 if latest is None else latest,
      f'the newest checkpoint in workdir {self._run.path}',
    )
    return latest

  def vocabulary(self) -> str | None:
    """Returns the fingerprint in the newest checkpoint, None without one."""
    latest = self._manager.latest_step()
    if latest is None:
      return None
    items = ocp.args.Composite(data=ocp.args.JsonRestore())
    with self._reading(latest):
      saved = self._manager.restore(latest, args=items)
      return saved.data.get(_VOCABULARY)

  def save(self, step: int, state: dict[str, Any]) -> bool:
    """Begins to save; returns whether it did: a step is never saved twice.

    The arrays may be donated as soon as this returns. It waits for the save
    before it, whose failure it raises.

    Args:
      step: The number of steps done so far.
      state: Pytrees of jax.Array.
    """
    if step in self._manager.all_steps():
      return False
    vocabulary = self._vocabulary
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state),
      data=ocp.args.JsonSave({_VOCABULARY: vocabulary} if vocabulary else {}),
      config=ocp.args.JsonSave(self._run.config.to_dict()),
    )
    # Orbax would skip a step while an earlier save is in flight.
    return self._manager.save(step, args=items, force=True)

  def restore(
    self, abstract_state: dict[str, Any], step: int | None = None
  ) -> dict[str, Any]:
    """Returns the state of a checkpoint; waits for a save in flight.

    Args:
      abstract_state: jax.ShapeDtypeStruct leaves with the shardings wanted;
        entries left out at the top, such as `opt_state`, are not read.
      step: The step of the checkpoint; None for the newest.

    Raises:
      UserError: There is no such checkpoint, it is damaged, or it is of
        another model.
    """
    self.wait()
    step = self._existing(step)
    self._check_shapes(step, abstract_state)
    items = ocp.args.Composite(
      state=ocp.args.PyTreeRestore(
        abstract_state,
        restore_args=ocp.checkpoint_utils.construct_restore_args(
          abstract_state
        ),
        partial_restore=True,
      ),
      data=ocp.args.JsonRestore(),  # so that damage there is noticed
    )
    with self._reading(step):
      return self._manager.restore(step, args=items).state

  def wait(self) -> None:
    """Blocks until nothing is being saved; raises what a save failed with."""
    self._manager.wait_until_finished()

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

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Reports files of a checkpoint that cannot be read in one line."""
    try:
      yield
    except _DAMAGED as error:
      _silence_reads_in_flight()
      path = os.path.join(self._run.path, 'checkpoints', str(step))
      before = [other for other in self.steps() if other < step]
      instead = f'go on from step {before[-1]}' if before else 'begin anew'
      others = (
        f', and `moe_jax eval` takes --step={before[-1]}' if before else ''
      )
      reason = ' '.join(str(error).split())[:200]
      raise UserError(
        f'checkpoint {path} is damaged ({type(error).__name__}: {reason});'
        f' remove that folder to {instead}{others}'
      ) from error

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

  def _check_vocabulary(self) -> None:
    """Refuses ids that mean other tokens than those of the checkpoints."""
    if self._vocabulary is None or self._manager.latest_step() is None:
      return
    saved = self.vocabulary()
    if saved != self._vocabulary:
      what = 'do not say which' if saved is None else 'are of another'
      tokenizer = self._run.config.data.tokenizer
      raise UserError(
        f'workdir {self._run.path}: its checkpoints {what} vocabulary, and'
        f' data.tokenizer = {tokenizer!r} takes its ids from the data; give the'
        ' data (data.name, data.path, data.text_key) as it was in training, or'
        f' {self._run.remedy or "another --workdir"}'
      )

  def _check_shapes(self, step: int, abstract_state: dict[str, Any]) -> None:
    with self._reading(step):
      found = self._manager.item_metadata(step).state
      if found is None:
        raise FileNotFoundError('what describes its state is not there')
    metadata = found.tree
    asked = _flatten(abstract_state)
    saved = {
      path: leaf
      for path, leaf in _flatten(metadata).items()
      if path.split('.')[0] in abstract_state
    }
    remedy = self._run.remedy or 'give its config or another --workdir'
    for path in sorted(saved | asked):
      there, here = _shape(saved.get(path)), _shape(asked.get(path))
      if there != here:
        raise UserError(
          f'workdir {self._run.path} was made with another model: {path} is'
          f' {there} in the checkpoint of step {step} and {here} by this'
          f' config; {remedy}'
        )


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


@functools.cache
def _silence_reads_in_flight() -> None:
  """Keeps tracebacks of reads that Orbax has given up from the user.

  It closes its event loop on the first read that fails. Each that TensorStore
  ends later finds the loop closed and tells `sys.excepthook`.
  """
  told = sys.excepthook

  def hook(kind: Any, error: BaseException, trace: Any) -> None:
    if kind is not RuntimeError or str(error) != _GIVEN_UP:
      told(kind, error, trace)

  sys.excepthook = hook


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


def _flatten(tree: Any) -> dict[str, Any]:
  """Returns leaves by dotted path, the same for a state and its metadata."""
  flat = ocp.tree.to_flat_dict(tree)
  return {'.'.join(map(str, path)): leaf for path, leaf in flat.items()}


def _shape(leaf: Any) -> str:
  return 'missing' if leaf is None else str(list(leaf.shape))
