"""Checkpoints of a run: asynchronous, atomic, restored onto any mesh."""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from moe_jax import files
from moe_jax.errors import UserError
from moe_jax.parallel import multihost
from moe_jax.training import digests
from moe_jax.training.run_dir import RunDir, check_kinds
from moe_jax.training.saved_step import (
  VOCABULARY,
  DamagedError,
  Restored,
  SavedStep,
  data_item,
  named_steps,
)
from moe_jax.training.saving import Saver

_DATA = 'data'  # the entry that describes the data


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
      data: What the data are, see `Mixture.fingerprint`; None asks for
        none.

    Raises:
      UserError: The newest checkpoint is of another vocabulary or other data,
        or the folder is none.
    """
    self._run = run
    self._vocabulary = vocabulary
    self._data = data
    check_kinds(run.path)
    self._saver = Saver(run)
    try:
      multihost.fail_together(self._check_newest)
    except BaseException:
      self._saver.close()
      raise

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is None:
      self._saver.finish()
    else:  # a failed save would hide what ended the run
      self._saver.close()

  def steps(self) -> list[int]:
    """Returns the steps there are checkpoints of, ascending."""
    return sorted({*self._saver.steps(), *_no_folders(self._run)})

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
    recovery: Mapping[str, Any] | None = None,
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
      recovery: What `moe_jax.training.recovery` has counted; None for nothing.
      wait: Whether to wait until it is saved, and to try again if it fails.

    Raises:
      RetryableError: This is the second failure in a row.
    """
    if self._saver.settled() and step in self._saver.steps():
      return False
    more: dict[str, Any] = {}
    if self._data is not None:
      more[_DATA] = dict(self._data)
    if self._vocabulary:
      more[VOCABULARY] = self._vocabulary
    if recovery:
      more['recovery'] = dict(recovery)
    position = step if position is None else position
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state),
      data=ocp.args.JsonSave(data_item(step, state, position, skipped, **more)),
      config=ocp.args.JsonSave(self._run.config.to_dict()),
    )
    self._saver.begin(step, items)
    if wait and not self._saver.settled():
      self._saver.begin(step, items)
      self._saver.settled()
    return True

  def failed(self) -> bool:
    """Returns whether the last save has failed, see `Saver.failed`."""
    return self._saver.failed()

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
    self._saver.reload()
    return target

  def wait(self) -> None:
    """Blocks until nothing is being saved; see `failed` for how it went.

    Raises:
      RetryableError: The last two saves have failed.
    """
    self._saver.settled()

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
        # Not itself: it holds on to the arrays that were read.
        errors[step] = DamagedError(str(error))
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
    """
    steps = named_steps(self._run.checkpoints)
    if not steps:
      return 'there is no checkpoint yet, so the same command begins anew'
    return f'the same command goes on from step {steps[-1]}'

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
    asked = {name: state[name] for name in abstract_state}
    return Restored(saved.step, asked, saved.data)

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
      if files.tokenizer_file(tokenizer):
        raise UserError(
          f'workdir {self._run.path}: its checkpoints are of the tokenizer'
          f' {_digest(saved)}, and data.tokenizer = {tokenizer!r} is'
          f' {_digest(self._vocabulary)}; give that of the run, or'
          f' {self._run.remedy or "another --workdir"}'
        )
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
  folder = run.checkpoints
  return [
    step
    for step in named_steps(folder)
    if not os.path.isdir(os.path.join(folder, str(step)))
  ]


def _digest(vocabulary: str | None) -> str:
  """Returns the beginning of a fingerprint, as tokenizers are named by it."""
  return vocabulary[:12] if vocabulary else 'of no file'


def _kind(leaf: Any) -> str:
  return 'missing' if leaf is None else f'{leaf.dtype} {list(leaf.shape)}'
