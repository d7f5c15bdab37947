"""Loss, perplexity and bits per byte of a split, exact to the last token."""

import itertools
import math
from typing import Any, NamedTuple

from moe_jax import config as config_lib
from moe_jax.data import mixtures
from moe_jax.data.pipeline import eval_batches
from moe_jax.data.sequences import TokenSequences
from moe_jax.errors import UserError
from moe_jax.evaluation import Result, without_top
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import multihost
from moe_jax.registry import EVALUATIONS
from moe_jax.training import signals
from moe_jax.training.state import Setup
from moe_jax.training.step import eval_step_of
from moe_jax.training.watchdog import waits_for


class _Sums(NamedTuple):
  """What was read of a source.

  Attributes:
    nll: The loss of all targets, in nats.
    tokens: The number of targets.
    sequences: The source.
  """

  nll: float
  tokens: int
  sequences: TokenSequences


@EVALUATIONS.register('perplexity')
class Perplexity:
  """Adds up the loss over a split, every token predicted exactly once.

  A token is predicted from those before it in its sequence of `data.seq_len`,
  where documents are packed from those of its own; by a model with a memory,
  from its span as well. Its batches go on where the one before stopped, so the
  split is as many texts as a batch has rows.

  The metrics are `loss` (nats per token), `perplexity` (e to that),
  `bits_per_byte` (of the text; the separators of documents are paid for, but
  are no bytes) and `tokens` (predicted); with `eval.disable_top`, that as
  `disabled_top`. Of instruction data all of them are of the responses, and the
  bytes too. Of a mixture there is a result of all sources together and one of
  each, SPLIT/NAME.
  """

  def __init__(self, setup: Setup, split: str) -> None:
    """Opens a split.

    Raises:
      UserError: There is no such split, or no token to predict in it.
    """
    data, tokenizer = setup.config.data, setup.tokenizer
    assert tokenizer is not None, 'the setup of a run has one'
    self._setup = setup
    self._split = split
    self._sources = mixtures.open_sequences(data, split, tokenizer)

  def __call__(self, params: Any, max_batches: int = 0) -> list[Result]:
    """Returns the result of the split, and of each source of a mixture."""
    found = {
      name: self._sum(params, sequences, max_batches)
      for name, sequences in self._sources.items()
    }
    results = [self._result(self._split, list(found.values()))]
    if len(found) > 1:
      for name, sums in found.items():
        results.append(self._result(f'{self._split}/{name}', [sums]))
    return results

  def _sum(
    self, params: Any, sequences: TokenSequences, max_batches: int
  ) -> _Sums:
    """Adds up the loss over a source."""
    eval_step = eval_step_of(self._setup)
    nll, tokens, attention_state = 0.0, 0, None
    rows, batches = self._batches(sequences)
    for batch in itertools.islice(batches, max_batches or None):
      waits_for('a batch of an evaluation')
      signals.check()
      sums = eval_step(params, rows.join(batch), attention_state)
      attention_state = sums['attention_state']
      # Python's float is float64: sums over many batches stay exact.
      nll += float(sums['nll'])
      tokens += int(sums['targets'])
    if not tokens:
      raise UserError(
        f'eval.batches = {max_batches}: the first batches of split'
        f' {self._split!r} have no response to predict; raise it (or batches='
        ' in eval.evaluations), or set 0 for all of them'
      )
    return _Sums(nll, tokens, sequences)

  def _result(self, split: str, found: list[_Sums]) -> Result:
    """Returns the metrics of some sources together.

    Of sources that were not read whole, each counts as long as it is.
    """
    targets = sum(each.sequences.num_targets for each in found)
    num_bytes = sum(each.sequences.num_target_bytes for each in found)
    loss = sum(
      each.nll / each.tokens * (each.sequences.num_targets / targets)
      for each in found
    )
    disabled = self._setup.config.eval.disable_top
    metrics = {'disabled_top': disabled} if disabled else {}
    metrics |= {
      'loss': loss,
      'perplexity': math.inf if loss >= 700 else math.exp(loss),
      'bits_per_byte': loss / math.log(2) / (num_bytes / targets),
      'tokens': sum(each.tokens for each in found),
    }
    return Result(split, metrics, without_top(disabled))

  def _batches(self, sequences: TokenSequences) -> tuple[multihost.Rows, Any]:
    """Returns the rows of this process, and the batches of a source."""
    config = self._setup.config
    size = config_lib.eval_batch_size(config)
    rows = multihost.Rows(mesh_lib.batch_sharding(self._setup.mesh), size)
    batches = eval_batches(
      sequences,
      batch_size=size,
      rows=rows.local,
      order=config.data.order,
    )
    return rows, batches
