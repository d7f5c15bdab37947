"""Names of implementations: what a config key may say, and what it means.

A registry lists the names that come with the library without importing what
they stand for, so that a config is checked before jax is imported. The module
that implements them registers a class or function for each of these names. A
user's own code registers further ones, from a config file of theirs:

  from moe_jax.routing.gates import GATES

  @GATES.register('mine')
  class MyGate(nnx.Module): ...
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from moe_jax.errors import UserError, choose

T = TypeVar('T')


class Registry(Generic[T]):
  """The implementations that a config key chooses from, by name.

  Attributes:
    key: The config key, or another description of what is chosen.
  """

  def __init__(self, key: str, builtin: str = '') -> None:
    """Declares a registry.

    Args:
      key: The config key, dotted.
      builtin: The names that come with the library, separated by spaces; they
        are known before they are registered.
    """
    self.key = key
    self._builtin = tuple(builtin.split())
    self._entries: dict[str, T] = {}
    self._files: dict[str, str] = {}

  def register(self, name: str) -> Callable[[T], T]:
    """Returns a decorator that registers what it decorates.

    Args:
      name: The value of the config key that will mean it.

    Raises:
      UserError: The name is taken by something from another file. The same
        file may be read again, and what it registers then replaces the old.
    """

    frame = inspect.currentframe()
    caller = frame.f_back if frame else None
    file = caller.f_code.co_filename if caller else ''

    def decorate(entry: T) -> T:
      if name in self._entries and self._files[name] != file:
        raise UserError(
          f'{self.key} = {name!r} is registered by {self._files[name]} already;'
          f' {file} has to choose another name'
        )
      self._entries[name] = entry
      self._files[name] = file
      return entry

    return decorate

  def __getitem__(self, name: str) -> T:
    """Returns the entry of that name.

    Raises:
      UserError: The name is not known; the message names the nearest.
    """
    return self._entries[choose(self.key, name, self.names())]

  def __iter__(self) -> Iterator[str]:
    return iter(self.names())

  def __contains__(self, name: object) -> bool:
    return name in self.names()

  def __len__(self) -> int:
    return len(self.names())

  def names(self) -> tuple[str, ...]:
    """Returns all names, those of the library first."""
    added = [name for name in self._entries if name not in self._builtin]
    return (*self._builtin, *added)

  def added_by(self) -> dict[str, str]:
    """Returns the file of every name that does not come with the library."""
    return {
      name: self._files[name]
      for name in self._entries
      if name not in self._builtin
    }


# The keys that a user's own code may add names to. They are declared here, and
# filled where they are implemented.
GATES: Registry[Any] = Registry(
  'router.score', 'linear mlp cosine xmoe hyper random hash'
)
CELLS: Registry[Any] = Registry('router.recurrent', 'none rnn gru lstm')
SELECTIONS: Registry[Any] = Registry('router.selection', 'top_k top_p')
DISPATCHES: Registry[Any] = Registry('moe.dispatch', 'dropless capacity')
EXCHANGES: Registry[Any] = Registry('moe.exchange', 'gather all_to_all ragged')
ATTENTIONS: Registry[Any] = Registry(
  'model.attention', 'xla blocks cudnn splash'
)
GROUPED_MATMULS: Registry[Any] = Registry(
  'moe.grouped_matmul',
  'blocks ragged_dot padded megablox triton mosaic mosaic+triton',
)
OPTIMIZERS: Registry[Any] = Registry(
  'optimizer.name', 'adamw adafactor lion muon'
)
SCHEDULES: Registry[Any] = Registry(
  'optimizer.schedule', 'cosine linear constant wsd inverse_sqrt'
)
DATA_SOURCES: Registry[Any] = Registry(
  'data.name', 'python_stdlib python_docs text_folder files enwik8 wikitext103'
)
TOKENIZERS: Registry[Any] = Registry('data.tokenizer', 'bytes enwik8 words')
EVALUATIONS: Registry[Any] = Registry(
  'eval.evaluations', 'perplexity robustness tasks'
)
TRACKERS: Registry[Any] = Registry('train.tracker', 'wandb trackio')
