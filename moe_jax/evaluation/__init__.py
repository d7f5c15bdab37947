"""What is measured of a model's parameters, in training and of checkpoints.

An evaluation is made once, from a `Setup` and the name of a split, and then
called with parameters; it returns a `Result` for every row of its table.
`EVALUATIONS` has those of the library; a user's own is one class in a config
file, which `eval.evaluations` then names:

  @EVALUATIONS.register('mine')
  class Mine:
    def __init__(self, setup, split): ...

    def __call__(self, params, max_batches=0):
      return [Result('mine', {'accuracy': 0.5})]

`eval.evaluations=perplexity,mine:every=1000:split=test` gives it an interval
and a split of its own; see `moe_jax.config.evaluations`.

One that takes longer than a few seconds calls `signals.check()` of
`moe_jax.training` now and then, so that a signal to stop need not wait for it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from moe_jax.config.evaluations import Asked
from moe_jax.registry import EVALUATIONS
from moe_jax.training.state import Setup


class Result(NamedTuple):
  """What an evaluation found.

  Attributes:
    split: What was evaluated: the `split` of a line in metrics.jsonl.
    metrics: The numbers, by name.
    variant: What tells this evaluation from the usual one of the split, to be
      put behind its name; '' for the usual one.
    text: What people are to read, such as samples of what the model writes; ''
      for nothing.
    parts: Metrics of parts of what `metrics` are of, by name: they are written
      to the file of a checkpoint's evaluation alone. None where there are none.
  """

  split: str
  metrics: dict[str, float]
  variant: str = ''
  text: str = ''
  parts: dict[str, dict[str, float]] | None = None

  @property
  def name(self) -> str:
    """The split with the variant."""
    return self.split + self.variant

  @property
  def written(self) -> dict[str, Any]:
    """What is written down: the metrics, and the text if there is one."""
    return {**self.metrics, **({'text': self.text} if self.text else {})}


def without_top(count: int) -> str:
  """Returns the variant without each token's `count` best experts; '' for 0."""
  return f'-without-top-{count}' if count else ''


class Evaluation(Protocol):
  """An evaluation whose data is open and whose step is compiled once."""

  def __call__(self, params: Any, max_batches: int = 0) -> list[Result]:
    """Evaluates parameters; all processes of a run call this alike.

    Args:
      params: The model's parameters, where the setup's mesh has them.
      max_batches: The most batches to read; 0 for the whole split.
    """
    ...


class Opened(NamedTuple):
  """An evaluation, and what a config asks of it."""

  asked: Asked
  evaluate: Evaluation


def make(setup: Setup, wanted: Iterable[Asked]) -> list[Opened]:
  """Returns the evaluations that are asked for, in their order.

  Args:
    setup: The setup of a run, with its tokenizer.
    wanted: What `moe_jax.config.evaluations` returns.

  Raises:
    UserError: A split, or what else an evaluation needs, is not there.
  """
  return [
    Opened(each, EVALUATIONS[each.name](setup, each.split)) for each in wanted
  ]


# Below, as it registers itself with what is above.
from moe_jax.evaluation import (  # noqa: E402
  perplexity,  # noqa: F401
  robustness,  # noqa: F401
  task_scores,  # noqa: F401
)
