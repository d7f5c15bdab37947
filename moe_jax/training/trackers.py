"""Trackers: where a run's numbers go beside metrics.jsonl and TensorBoard.

`train.tracker` names one, which one process of the run opens and the others
know nothing of. A user's own is registered in a config file:

  @TRACKERS.register('mine')
  class Mine:
    def __init__(self, run): ...  # a `TrackedRun`

    def log(self, step, scalars, pictures): ...

    def close(self): ...

What fails in a tracker is told and given up; it ends no run.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.errors import UserError, said
from moe_jax.parallel import multihost
from moe_jax.registry import TRACKERS
from moe_jax.training.record import run_id

_PROJECT = 'moe_jax'
_PACKAGES = ('wandb', 'trackio')  # of the trackers called so


class TrackedRun(NamedTuple):
  """A run as a tracker is told of it.

  Attributes:
    id: What tells it from all others, the same each time it is gone on with.
    name: What people call it: the name of its workdir.
    workdir: The workdir.
    config: Every key of its config, dotted, with its value.
  """

  id: str
  name: str
  workdir: str
  config: dict[str, Any]


class Tracker(Protocol):
  """Something that shows the numbers of a run."""

  def log(
    self,
    step: int,
    scalars: Mapping[str, float],
    pictures: Mapping[str, np.ndarray],
  ) -> None:
    """Takes what there is of a step.

    Args:
      step: The number of steps done. A step may come in several calls; a run
        that goes back, or is gone on with, does some again.
      scalars: Finite numbers by their names, as 'train/loss'.
      pictures: Pictures by their names, RGB, uint8 [height, width, 3].
    """
    ...

  def close(self) -> None:
    """Waits until everything is where it belongs."""
    ...


def check(config: ConfigDict) -> None:
  """Refuses a tracker whose package is not there, in the process that opens it.

  Raises:
    UserError: The message has the command that installs it.
  """
  name = config.train.tracker
  if not multihost.is_main_process() or name not in _PACKAGES:
    return
  if importlib.util.find_spec(name) is None:
    raise UserError(
      f'train.tracker = {name!r} needs the package {name}:'
      f" pip install 'moe_jax[{name}]'"
    )


class Tracking:
  """A run in the tracker that its config names, once it is opened."""

  def __init__(
    self, config: ConfigDict, workdir: str, tell: Callable[[str], None]
  ) -> None:
    """Opens nothing yet.

    Args:
      config: The config of the run, whose tracker `check` has passed.
      workdir: The workdir.
      tell: Tells people a line.
    """
    self._config = config
    self._name = config.train.tracker
    self._workdir = workdir
    self._tell = tell
    self._tracker: Tracker | None = None

  def open(self) -> None:
    """Opens the tracker, if there is one, of the run that the workdir holds."""
    if not self._name:
      return
    run = TrackedRun(
      run_id(self._workdir),
      os.path.basename(os.path.abspath(self._workdir)),
      self._workdir,
      config_lib.flatten(self._config.to_dict()),
    )
    with self._no_failure():
      self._tracker = TRACKERS[self._name](run)

  def log(
    self,
    step: int,
    scalars: Mapping[str, float],
    pictures: Mapping[str, np.ndarray],
  ) -> None:
    """Tells the tracker what there is of a step."""
    if self._tracker is not None:
      with self._no_failure():
        self._tracker.log(step, scalars, pictures)

  def close(self) -> None:
    """Closes the tracker."""
    if self._tracker is not None:
      with self._no_failure():
        self._tracker.close()
      self._tracker = None

  @contextlib.contextmanager
  def _no_failure(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # of a service, or of the user's own code
      self._tracker = None
      self._tell(
        f'train.tracker = {self._name!r}: {type(error).__name__}:'
        f' {said(error)[:200]}: from here on nothing is sent to it;'
        ' metrics.jsonl has the same numbers'
      )


@TRACKERS.register('wandb')
class Wandb:
  """Weights & Biases: offline, in DIR/wandb, unless WANDB_MODE says otherwise.

  `wandb sync` sends what is there, all starts of a run as one. WANDB_PROJECT
  names the project, which is moe_jax otherwise.
  """

  def __init__(self, run: TrackedRun) -> None:
    """Begins a run of that id, or goes on with it."""
    import wandb

    mode: Any = os.environ.get('WANDB_MODE', 'offline')
    self._picture = wandb.Image
    self._run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', _PROJECT),
      id=run.id,
      name=run.name,
      dir=run.workdir,
      config=run.config,
      mode=mode,
      # Offline it cannot know what is there, and says so.
      resume='allow' if mode == 'online' else None,
      # It would take over the terminal, and end with a table of every number.
      settings=wandb.Settings(console='off', silent=True),
    )
    # Its own steps never go back, where a run may.
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def log(
    self,
    step: int,
    scalars: Mapping[str, float],
    pictures: Mapping[str, np.ndarray],
  ) -> None:
    """See `Tracker`."""
    shown = {name: self._picture(each) for name, each in pictures.items()}
    self._run.log({'step': step, **scalars, **shown})

  def close(self) -> None:
    """See `Tracker`."""
    self._run.finish()


@TRACKERS.register('trackio')
class Trackio:
  """Trackio: a file on this machine, unless TRACKIO_SPACE_ID says otherwise.

  `trackio show` shows it.
  """

  def __init__(self, run: TrackedRun) -> None:
    """Begins a run of that id, or goes on with it."""
    import trackio

    self._trackio = trackio
    self._run = trackio.init(
      project=_PROJECT,
      name=f'{run.name}-{run.id}',  # which is what tells runs apart
      config=run.config,
      resume='allow',
      embed=False,
    )

  def log(
    self,
    step: int,
    scalars: Mapping[str, float],
    pictures: Mapping[str, np.ndarray],
  ) -> None:
    """See `Tracker`."""
    shown = {name: self._trackio.Image(x) for name, x in pictures.items()}
    self._run.log({**scalars, **shown}, step=step)

  def close(self) -> None:
    """See `Tracker`."""
    self._trackio.finish()
