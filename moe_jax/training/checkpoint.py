"""Checkpoints of a run: asynchronous, atomic, restored onto any mesh."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.parallel import multihost
from moe_jax.training import run_dir

_DICTIONARY = 'dictionary'  # beside the data position
# What Orbax and TensorStore raise where files are missing, cut or garbled.
_DAMAGED = (ValueError, KeyError, OSError)


class Checkpointer:
  """The checkpoints in DIR/checkpoints, made by `Checkpointer.open`.

  A checkpoint holds the state (a dictionary of pytrees of arrays), the data
  position (JSON), with it the digest of the dictionary that gave the tokens
  their ids, and the config. The newest `checkpoint.keep` stay, and every
  step that is a multiple of `checkpoint.keep_every`. A save that a crash cut
  short is never listed, and the next run removes what it left.
  """

  def __init__(
    self,
    workdir: str,
    config: ConfigDict,
    dictionary: str | None,
    manager: ocp.CheckpointManager,
    remedy: str = '',
  ) -> None:
    self._workdir = workdir
    self._config = config
    self._dictionary = dictionary
    self._manager = manager
    self._remedy = remedy

  @classmethod
  @contextlib.contextmanager
  def open(
    cls,
    workdir: str,
    config: ConfigDict,
    dictionary: str | None = None,
    read_only: bool = False,
    remedy: str = '',
  ) -> Iterator['Checkpointer']:
    """Opens the run in `workdir`, a new one unless `read_only`.

    Leaving the context waits for saves in flight. All processes of a run call
    this, and every other method, alike.

    Args:
      workdir: the directory of the run.
      config: of the run; replaces the one there unless `read_only`.
      dictionary: the digest of the data's; None asks for none.
      read_only: for other runs, and evaluation: nothing is written, and there
        has to be a run.
      remedy: of a run that is only read, what to do if it will not do, where
        the usual advice would be wrong.

    Raises:
      UserError: the directory is not writable, or it was made with a config
        or dictionary that means another run; with `read_only`, it holds no run
        or one of another model. Nothing has been written then.
    """
    if read_only:
      multihost.fail_together(
        lambda: run_dir.check_model(workdir, config, remedy)
      )
    else:
      multihost.fail_together(lambda: run_dir.check_run(workdir, config))
      run_dir.check_shared(workdir)
    manager = _manager(workdir, config, read_only)
    try:
      store = cls(workdir, config, dictionary, manager, remedy)
      store._check_dictionary()
      if not read_only and multihost.is_main_process():
        run_dir.write_config(workdir, config)
      yield store
    finally:
      manager.close()

  def steps(self) -> list[int]:
    """The steps there are checkpoints of, ascending."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """The newest step saved; None before the first."""
    return self._manager.latest_step()

  def dictionary(self) -> str | None:
    """The digest the newest checkpoint was saved with, None without one."""
    if self.latest_step() is None:
      return None
    items = ocp.args.Composite(data=ocp.args.JsonRestore())
    with self._reading(self.latest_step()):
      saved = self._manager.restore(self.latest_step(), args=items)
      return saved.data.get(_DICTIONARY)

  def save(
    self, step: int, state: dict[str, Any], data: dict[str, Any]
  ) -> bool:
    """Begins to save; returns whether it did: a step is never saved twice.

    The arrays may be donated as soon as this returns. It waits for the save
    before it, whose failure it raises.

    Args:
      step: steps done so far.
      state: pytrees of jax.Array.
      data: the position in the data, as JSON can hold it.
    """
    if step in self._manager.all_steps():
      return False
    if self._dictionary is not None:
      data = data | {_DICTIONARY: self._dictionary}
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state),
      data=ocp.args.JsonSave(data),
      config=ocp.args.JsonSave(self._config.to_dict()),
    )
    # Orbax would skip a step while an earlier save is in flight.
    return self._manager.save(step, args=items, force=True)

  def restore(
    self, abstract_state: dict[str, Any], step: int | None = None
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the state and the data position of a checkpoint.

    Waits for a save in flight.

    Args:
      abstract_state: jax.ShapeDtypeStruct leaves with the shardings wanted;
        entries left out at the top, such as `opt_state`, are not read.
      step: None for the newest.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it is of
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
      data=ocp.args.JsonRestore(),
    )
    with self._reading(step):
      restored = self._manager.restore(step, args=items)
      restored.data.pop(_DICTIONARY, None)
    return restored.state, restored.data

  def wait(self) -> None:
    """Blocks until nothing is being saved; raises what a save failed with."""
    self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Tells of files of a checkpoint that cannot be read in one line."""
    try:
      yield
    except _DAMAGED as error:
      path = os.path.join(self._workdir, 'checkpoints', str(step))
      before = [other for other in self.steps() if other < step]
      instead = f'go on from step {before[-1]}' if before else 'begin anew'
      others = f', and eval.py takes --step={before[-1]}' if before else ''
      reason = ' '.join(str(error).split())[:200]
      raise UserError(
        f'checkpoint {path} is damaged ({type(error).__name__}: {reason});'
        f' remove that folder to {instead}{others}'
      ) from error

  def _existing(self, step: int | None) -> int:
    steps = self.steps()
    if not steps:
      raise UserError(
        f'workdir {self._workdir} holds no checkpoint yet;'
        f' {self._remedy or "train first"}'
      )
    if step is not None and step not in steps:
      raise UserError(
        f'workdir {self._workdir} has no checkpoint of step {step};'
        f' there are {", ".join(map(str, steps))}'
      )
    return steps[-1] if step is None else step

  def _check_dictionary(self) -> None:
    """Refuses ids that mean other tokens than those of the checkpoints."""
    if self._dictionary is None or self.latest_step() is None:
      return
    saved = self.dictionary()
    if saved != self._dictionary:
      did = 'do not say which' if saved is None else 'are of another'
      raise UserError(
        f'workdir {self._workdir}: its checkpoints {did} dictionary, and'
        f' data.tokenizer = {self._config.data.tokenizer!r} takes its ids from'
        ' the data; give the data (data.name, data.path, data.text_key) as it'
        f' was in training, or {self._remedy or "another --workdir"}'
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
    remedy = self._remedy or 'give its config or another --workdir'
    for path in sorted(saved | asked):
      there, here = _shape(saved.get(path)), _shape(asked.get(path))
      if there != here:
        raise UserError(
          f'workdir {self._workdir} was made with another model: {path} is'
          f' {there} in the checkpoint of step {step} and {here} by this'
          f' config; {remedy}'
        )


def newest_step(workdir: str, config: ConfigDict) -> int | None:
  """Of the checkpoints in `workdir`, whoever's; None without any.

  Writes nothing, and asks for no run.

  Raises:
    UserError: the processes of the run do not see the same.
  """
  run_dir.refuse_url(workdir)
  with contextlib.closing(_manager(workdir, config, read_only=True)) as manager:
    found = manager.latest_step()
  step = -1 if found is None else found
  multihost.assert_equal(step, f'the newest checkpoint in workdir {workdir}')
  return found


def _manager(
  workdir: str, config: ConfigDict, read_only: bool
) -> ocp.CheckpointManager:
  """Opens the manager; it writes nothing before its first save."""
  # Not Orbax's own read_only, which prints a warning. Without a save, only the
  # options below would write.
  options = ocp.CheckpointManagerOptions(
    max_to_keep=config.checkpoint.keep,
    keep_period=config.checkpoint.keep_every or None,
    create=not read_only,
    cleanup_tmp_directories=not read_only,
    save_root_metadata=False,
  )
  return ocp.CheckpointManager(
    os.path.abspath(os.path.join(workdir, 'checkpoints')),
    options=options,
    item_handlers={
      'state': ocp.PyTreeCheckpointHandler(),
      'data': ocp.JsonCheckpointHandler(),
      'config': ocp.JsonCheckpointHandler(),
    },
  )


def _flatten(tree: Any) -> dict[str, Any]:
  """Leaves by dotted path, the same for a state and its metadata."""
  flat = ocp.tree.to_flat_dict(tree)
  return {'.'.join(map(str, path)): leaf for path, leaf in flat.items()}


def _shape(leaf: Any) -> str:
  return 'missing' if leaf is None else str(list(leaf.shape))
