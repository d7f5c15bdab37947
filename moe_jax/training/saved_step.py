"""One checkpoint on disk: read, and held to what was saved.

It is a folder of Orbax's, named by its step, with three items: `state`, the
arrays; `data`, a JSON object that says what they have to be; and `config`.
Nothing here waits for another process.
"""

import contextlib
import errno
import functools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from moe_jax import files
from moe_jax.errors import UserError
from moe_jax.training import digests

VOCABULARY = 'dictionary'  # how checkpoints have always spelt it
_CHECKSUM = 'checksum'
_MARKER = 'commit_success.txt'  # what Orbax writes last
UNFINISHED = '.orbax-checkpoint-tmp'  # ends the name of a save until then
_NUMBER = re.compile(r'0|[1-9]\d*')
_ITEMS = ('state', 'data', 'config')
_GIVEN_UP = 'Event loop is closed'  # what reads say that end after a failure
# Of all that a file system answers, what tells of damage; with any other answer
# the files may be sound.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class DamagedError(UserError):
  """A checkpoint is not what was saved."""


class Restored(NamedTuple):
  """What training goes on with.

  Attributes:
    step: The number of steps done.
    state: The arrays.
    data: The item `data`; older runs have fewer entries or none.
  """

  step: int
  state: dict[str, Any]
  data: Mapping[str, Any]

  @property
  def position(self) -> int:
    """The number of batches read from the stream."""
    position = self.data.get('position')
    return self.step if position is None else int(position)

  @property
  def skipped(self) -> tuple[tuple[int, int], ...]:
    """Stretches of the stream that are not trained on.

    The first position of each, and how many batches.
    """
    return tuple((int(at), int(n)) for at, n in self.data.get('skipped', ()))


def named_steps(checkpoints: str) -> list[int]:
  """Returns the steps that anything in a folder is named by, ascending."""
  try:
    names = os.listdir(checkpoints)
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(int(name) for name in names if _NUMBER.fullmatch(name))


def data_item(
  step: int,
  state: dict[str, Any],
  position: int,
  skipped: Sequence[tuple[int, int]],
  **more: Any,
) -> dict[str, Any]:
  """Returns the item `data` of a checkpoint; waits for the arrays.

  All processes of a run call this alike.

  Args:
    step: The number of steps done.
    state: Pytrees of jax.Array.
    position: As in `Restored`.
    skipped: As in `Restored`.
    **more: Further entries, as JSON can hold them.
  """
  item = {
    'step': step,
    'position': position,
    'digests': digests.of_tree(state),
    'layout': digests.layout(state),
    'skipped': [list(each) for each in skipped],
    **more,
  }
  return item | {_CHECKSUM: _checksum(item)}


class SavedStep:
  """A checkpoint on disk.

  Attributes:
    step: The step that it is named by.
    path: Its folder.
  """

  def __init__(self, checkpoints: str, step: int) -> None:
    """Names a checkpoint; nothing is read.

    Args:
      checkpoints: The folder that it lies in.
      step: The step that it is named by.
    """
    self.step = step
    self.path = os.path.join(checkpoints, str(step))
    self._state = epath.Path(self.path) / 'state'
    self._handler = ocp.PyTreeCheckpointHandler()

  @functools.cached_property
  def data(self) -> dict[str, Any]:
    """The item `data`; older checkpoints have fewer entries or none.

    Raises:
      DamagedError: It is not what was saved, or is of another step.
    """
    self._check_finished()
    with self._reading('data'):
      item = ocp.JsonCheckpointHandler().restore(epath.Path(self.path) / 'data')
    if not isinstance(item, dict):
      raise self._damaged('data/metadata is no JSON object')
    kept = {key: value for key, value in item.items() if key != _CHECKSUM}
    whole = item.get(_CHECKSUM) == _checksum(kept)
    if not whole and (_CHECKSUM in item or 'digests' in item):
      raise self._damaged('data/metadata is not what was saved')
    self._check_step('data/metadata', kept.get('step', self.step))
    self._check_position(kept)
    return kept

  @functools.cached_property
  def leaves(self) -> dict[str, Any]:
    """What describes the arrays, shape and dtype, by their paths.

    Raises:
      DamagedError: It is not what was saved.
    """
    leaves = digests.flatten(self._tree)
    saved = self.data.get('layout')
    if saved is not None and saved != digests.layout(self._tree):
      raise self._damaged('state/_METADATA does not describe what was saved')
    return leaves

  def read(self, abstract_state: dict[str, Any]) -> dict[str, Any]:
    """Returns arrays, as yet unverified.

    Args:
      abstract_state: jax.ShapeDtypeStruct leaves with the shardings wanted;
        entries left out at the top are not read.

    Raises:
      DamagedError: They cannot be read.
      UserError: The file system refuses to be read.
    """
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    with self._reading('state'):
      return self._handler.restore(
        self._state,
        args=ocp.args.PyTreeRestore(
          abstract_state, restore_args=restore_args, partial_restore=True
        ),
      )

  def verify(self, state: dict[str, Any]) -> None:
    """Holds arrays on devices to their digests; processes call this alike.

    Raises:
      DamagedError: They are not what was saved, or of another step.
    """
    if 'step' in state:
      self._check_step('its state', int(state['step']))
    saved = self.data.get('digests')
    if saved is not None:
      self._check_digests(saved, digests.of_tree(state))

  def verify_all(self) -> bool:
    """Reads the whole checkpoint, one array after another, into this host.

    Returns:
      Whether there were digests to hold it to.

    Raises:
      DamagedError: It is not what was saved.
      UserError: The file system refuses to be read.
    """
    saved = self.data.get('digests')
    for path in self.leaves:
      array = self._read_one(path)
      if path == 'step':
        self._check_step('its state', int(array))
      if saved is not None:
        self._check_digests(saved, {path: digests.of_array(array)})
    return saved is not None

  @functools.cached_property
  def _tree(self) -> Any:
    with self._reading('state'):
      tree = self._handler.metadata(self._state).tree
      if not isinstance(tree, dict) or not tree:
        raise ValueError('_METADATA describes no state')
      return tree

  def _read_one(self, path: str) -> np.ndarray:
    wanted = jax.tree.map(
      lambda leaf: 0 if leaf.name == path else ocp.PLACEHOLDER, self._tree
    )
    restore_args = jax.tree.map(
      lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), self._tree
    )
    with self._reading('state'):
      args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args)
      restored = self._handler.restore(self._state, args=args)
      [array] = [
        leaf
        for leaf in jax.tree.leaves(restored)
        if leaf is not ocp.PLACEHOLDER
      ]
    return np.asarray(array)

  def _check_finished(self) -> None:
    """Refuses a folder of which only a part was moved to its name.

    Where renaming is not atomic, as on mounted buckets, a kill leaves such.
    """
    if not os.path.isdir(self.path):
      what = 'a symbolic link to nothing' if os.path.islink(self.path) else ''
      raise self._damaged(f'it is {what or "no folder"}')
    for path in files.irregular(self.path):  # reading a pipe has no end
      raise self._damaged(f'{path} is no regular file')
    folders = [self.path, *(os.path.join(self.path, each) for each in _ITEMS)]
    marks = {
      folder: os.path.exists(os.path.join(folder, _MARKER))
      for folder in folders
      if os.path.isdir(folder)
    }
    unmarked = [folder for folder, marked in marks.items() if not marked]
    if unmarked and any(marks.values()):  # Orbax once wrote none at all
      missing = os.path.join(unmarked[0], _MARKER)
      raise self._damaged(f'saving it was not finished: {missing} is missing')

  def _check_step(self, what: str, step: Any) -> None:
    if step != self.step:
      raise self._damaged(f'{what} is of step {step!r}')

  def _check_position(self, item: Mapping[str, Any]) -> None:
    """Refuses a position that is not the steps and what was skipped."""
    position = item.get('position', self.step)
    passed = sum(n for at, n in item.get('skipped', ()) if at < position)
    if position != self.step + passed:
      raise self._damaged(
        f'data/metadata has position {position}, and {self.step} steps that'
        f' skipped {passed} batches come to {self.step + passed}'
      )

  def _check_digests(
    self, saved: Mapping[str, str], found: Mapping[str, str]
  ) -> None:
    wrong = digests.differing(saved, found)
    if wrong:
      more = f' and {len(wrong) - 1} more' if wrong[1:] else ''
      raise self._damaged(
        f'state: array {wrong[0]}{more} is not what was saved'
      )

  def _damaged(self, what: str) -> DamagedError:
    return DamagedError(f'checkpoint {self.path} is damaged: {what}')

  @contextlib.contextmanager
  def _reading(self, item: str) -> Iterator[None]:
    """Reports files of the checkpoint that cannot be read in one line."""
    try:
      yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:  # Orbax raises that itself, for an array
      _silence_reads_in_flight()
      cause = _cause(error)
      if isinstance(cause, MemoryError | jax.errors.JaxRuntimeError):
        raise cause from error
      told = _told(cause)
      if _refused(cause):
        raise UserError(
          f'checkpoint {self.path} cannot be read: {item}: {told}'
        ) from error
      raise self._damaged(f'{item}: {told}') from error


def _checksum(item: Mapping[str, Any]) -> str:
  return digests.of_text(json.dumps(item, sort_keys=True))


def _cause(error: BaseException) -> BaseException:
  """Returns what an error was first raised from."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def os_error(error: BaseException | None) -> int | None:
  """Returns the number of what the file system answered, None if it did not.

  TensorStore has it in the text of a ValueError.
  """
  while error is not None:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
      return int(code[1])
    if isinstance(error, TimeoutError):  # Orbax', of another process
      return errno.ETIMEDOUT
    if isinstance(error, OSError):
      return error.errno
    error = error.__cause__
  return None


def _refused(error: BaseException) -> bool:
  """Returns whether it is the file system's fault, not that of the files."""
  answer = os_error(error)
  return answer is not None and answer not in _ABSENT


def _told(error: BaseException) -> str:
  """Returns what was wrong: the array, the file and the reason if known."""
  text = ' '.join(str(error).split())
  text = re.sub(
    r' \[(os_error_code|tensorstore_spec|source locations)=.*', '', text
  )
  array = re.search(r'Error reading "([^"]+)/[^"/]*"', text)
  files = re.findall(r'local file "([^"]+)"', text)
  reason = text.rpartition(f'local file "{files[-1]}"')[2] if files else text
  parts = [
    f'array {array[1]}' if array else '',
    f'file {files[-1]}' if files else '',
    f'{type(error).__name__}: {reason.strip(": ")[:200]}',
  ]
  return ', '.join(part for part in parts if part)


@functools.cache
def _silence_reads_in_flight() -> None:
  """Keeps tracebacks of reads that Orbax has given up from the user.

  It closes its event loop on the first read that fails. Each that TensorStore
  ends later finds the loop closed, and each that ended before has an error that
  nobody asks for any more. Python tells both by its hooks.
  """
  told, unraisable = sys.excepthook, sys.unraisablehook

  def given_up(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == _GIVEN_UP

  def hook(kind: Any, error: BaseException, trace: Any) -> None:
    if not given_up(error):
      told(kind, error, trace)

  def unraisable_hook(unraised: Any) -> None:
    name = getattr(unraised.object, '__qualname__', '')
    if not given_up(unraised.exc_value) and not name.startswith('_read_array'):
      unraisable(unraised)

  sys.excepthook, sys.unraisablehook = hook, unraisable_hook
