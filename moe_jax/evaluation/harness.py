"""A model as lm-evaluation-harness asks one; needs the package `lm_eval`.

Every process of a run is asked the same, as all take part in each compiled
call.
"""

import sys
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moe_jax.config import eval_batch_size
from moe_jax.data import instructions, sources
from moe_jax.errors import UserError, said
from moe_jax.evaluation.likelihood import Request, Score, Scorer
from moe_jax.generation.completing import Options, complete
from moe_jax.generation.sampling import Sampling
from moe_jax.generation.steps import Steps
from moe_jax.generation.writing import ends_lines, prompt_ids
from moe_jax.parallel import multihost
from moe_jax.training import signals
from moe_jax.training.state import Setup
from moe_jax.training.watchdog import waits_for

# Tokens that are written at the most where a task does not say; lm-eval's own.
_WRITTEN = 256


class CheckpointLM(LM):
  """A model as lm-evaluation-harness asks one.

  A context begins a document: it has in front of it what stands before one in
  training. So does a text whose whole likelihood is asked for.

  Attributes:
    params: The model's parameters, where the setup's mesh has them. Others may
      take their place, and nothing is compiled again.
    eot_token_id: The token that ends a document.
    max_length: The tokens that are read at once at the most, `data.seq_len`.
    batch_size: The rows of a batch, which has more where they are short.
  """

  def __init__(
    self,
    setup: Setup,
    params: Any,
    template: instructions.Format | None = None,
  ) -> None:
    """Takes a model; nothing is compiled before it is asked.

    Args:
      setup: The setup of the run, with its tokenizer.
      params: The first parameters.
      template: How questions are put; None for as they are.
    """
    super().__init__()
    config, tokenizer = setup.config, setup.tokenizer
    assert tokenizer is not None, 'the setup of a run has one'
    self._setup, self.params = setup, params
    self._tokenizer, self._template = tokenizer, template
    # As `generate` has it: documents begin, and the pieces of one text do not.
    self._begins = not (
      sources.is_one_text(config.data) or ends_lines(tokenizer)
    )
    self._score = Scorer(setup)
    self._steps = Steps(
      config,
      setup.vocab_size,
      setup.mesh,
      disable_top=config.eval.disable_top,
    )
    self.eot_token_id = self._tokenizer.eos_id
    self.max_length = self._score.longest
    self.batch_size = eval_batch_size(config)
    self._tells = multihost.is_main_process()
    self._truncated = 0

  @property
  def tokenizer_name(self) -> str:
    """Names the tokenizer."""
    return self._tokenizer.name

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the template, for the record; None without one."""
    del chat_template
    return self._template.template if self._template else None

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """Returns the text of messages, up to where the model goes on."""
    del add_generation_prompt  # the author of the last message says it
    assert self._template is not None, 'it was asked for'
    return self._template.prompt(chat_history)

  def get_model_info(self) -> dict[str, Any]:
    """Returns what the record of results has of the model."""
    leaves = jax.tree.leaves(self.params)
    return {
      'model_num_parameters': sum(leaf.size for leaf in leaves),
      'model_dtype': self._setup.resolved['dtype'],
      'truncated_prompts': self._truncated,
    }

  def loglikelihood(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Returns the log-likelihood of each continuation, and if it is greedy.

    Args:
      requests: Each with a context and its continuation.
      disable_tqdm: Whether progress is not shown.

    Raises:
      UserError: A continuation is empty, or longer than what the model reads.
    """
    made, cut = [], 0
    for request in requests:
      context, continuation = self._pair(*request.args)
      if not 0 < len(continuation) <= self.max_length:
        raise UserError(
          f'{_named(request)}: a continuation has {len(continuation)} tokens,'
          f' and must have 1 to {self.max_length} (data.seq_len)'
        )
      ids = np.array([*context, *continuation], np.int32)
      # The last token is predicted, and not read.
      cut += len(ids) > self.max_length + 1
      made.append(Request(ids[-self.max_length - 1 :], len(continuation)))
    self._tell_truncated(cut, len(made), self.max_length)
    return [
      (score.log_likelihood, score.is_greedy)
      for score in self._scores(made, disable_tqdm)
    ]

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-likelihood of texts, in windows where they are long.

    Every token is predicted once; in the last window too, from as many as the
    model reads.

    Args:
      requests: Each with a text.
      disable_tqdm: Whether progress is not shown.
    """
    made, numbers = [], []
    for number, request in enumerate(requests):
      windows = get_rolling_token_windows(
        self._ids(request.args[0]),
        prefix_token=self.eot_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      )
      for context, continuation in map(make_disjoint_window, windows):
        ids = np.array([*context, *continuation], np.int32)
        made.append(Request(ids, len(continuation)))
        numbers.append(number)
    found = [0.0] * len(requests)
    scores = self._scores(made, disable_tqdm)
    for number, score in zip(numbers, scores, strict=True):
      found[number] += score.log_likelihood
    return found

  def generate_until(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Returns what follows each prompt, up to the first of its stops.

    Args:
      requests: Each with a prompt, and the `generation_kwargs` of its task.
      disable_tqdm: Whether progress is not shown.

    Raises:
      UserError: A prompt is empty, or a task asks for what is not known here.
    """
    alike: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
      alike.setdefault(repr(request.args[1]), []).append(number)
    found = [''] * len(requests)
    with self._progress(len(requests), disable_tqdm) as bar:
      for numbers in alike.values():
        options = self._options(requests[numbers[0]])
        prompts = [self._prompt(requests[number]) for number in numbers]
        room = self.max_length - options.max_tokens
        cut = sum(len(ids) > room for ids in prompts)
        self._tell_truncated(cut, len(prompts), room)
        completions = complete(
          self._steps,
          self.params,
          self._tokenizer,
          [ids[-room:] for ids in prompts],
          options,
          lambda *_: _wait(),
        )
        for number, completion in zip(numbers, completions, strict=True):
          found[number] = completion.text
        bar.update(len(numbers))
    return found

  def _scores(self, requests: list[Request], quiet: bool) -> list[Score]:
    with self._progress(len(requests), quiet) as bar:
      return self._score(self.params, requests, bar.update)

  def _progress(self, total: int, quiet: bool) -> Any:
    return tqdm(total=total, desc='requests', disable=quiet or not self._tells)

  def _ids(self, text: str) -> list[int]:
    """Returns the tokens of a text, which may be empty."""
    return prompt_ids(self._tokenizer, text, begins=False) if text else []

  def _begun(self, ids: list[int]) -> list[int]:
    """Returns the tokens of a context, with what is before its document."""
    return [self.eot_token_id, *ids] if self._begins or not ids else ids

  def _pair(
    self, context: str, continuation: str
  ) -> tuple[list[int], list[int]]:
    """Returns the tokens of a context and of what continues it.

    As lm-eval has it: they are encoded together, the spaces that end a context
    with what follows. A template's text is encoded apart from an answer, as it
    is in training.
    """
    if self._template is not None:
      return self._begun(self._ids(context)), self._ids(continuation)
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before = self._ids(stripped)
    after = self._ids(stripped + continuation)[len(before) :]
    # Empty where a token spells the end of the one and all of the other.
    return self._begun(before), after or self._ids(continuation)

  def _prompt(self, request: Instance) -> list[int]:
    """Returns the tokens of a prompt to go on with."""
    if not request.args[0]:
      raise UserError(
        f'{_named(request)}: the prompt is empty, and there has to be something'
        ' to go on from'
      )
    return self._begun(self._ids(request.args[0]))

  def _options(self, request: Instance) -> Options:
    """Returns how a task wants its prompts to be gone on with."""
    try:
      return self._options_of(request)
    except (TypeError, ValueError) as error:  # of a UserError, too
      raise UserError(
        f'generation_kwargs of the task {request.task_name!r}: {said(error)}'
      ) from error

  def _options_of(self, request: Instance) -> Options:
    # What is written has half of the model's positions, the prompt the rest.
    most = self.max_length // 2
    wanted = dict(normalize_gen_kwargs(request.args[1], min(_WRITTEN, most)))
    max_tokens = wanted.pop('max_gen_toks')
    if max_tokens > most:
      self._tell(
        f'the task {request.task_name!r} asks for up to {max_tokens} tokens,'
        f' and gets {most}: half of data.seq_len = {self.max_length}'
      )
    sampled, temperature = wanted.pop('do_sample'), wanted.pop('temperature', 1)
    sampling = Sampling.of(
      temperature if sampled else 0.0,
      wanted.pop('top_k', 0) or 0,
      wanted.pop('top_p', 1.0) or 1.0,
    )
    stops = tuple(stop for stop in wanted.pop('until') if stop)
    if wanted:
      raise UserError(
        f'{", ".join(wanted)} is not known (known: until, max_gen_toks,'
        ' do_sample, temperature, top_k, top_p)'
      )
    if not all(isinstance(stop, str) for stop in stops):
      raise UserError(f'until = {list(stops)} must be texts')
    return Options(
      min(max_tokens, most),
      sampling,
      seed=self._setup.config.seed,
      stops=stops,
      batch_size=self.batch_size,
    )

  def _tell_truncated(self, count: int, total: int, room: int) -> None:
    self._truncated += count
    if count:
      self._tell(
        f'{count} of {total} prompts are longer than the {room} tokens that'
        f' there is room for (data.seq_len = {self.max_length}), and are read'
        ' without their beginnings'
      )

  def _tell(self, message: str) -> None:
    if self._tells:
      tqdm.write(f'note: {message}', sys.stderr)  # beside a bar


def _wait() -> None:
  """Is called with every token that is written."""
  waits_for('a token of a task')
  signals.check()


def _named(request: Instance) -> str:
  return f'document {request.doc_id} of the task {request.task_name!r}'
