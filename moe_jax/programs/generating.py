"""Texts of a checkpoint, on a terminal or as JSON."""

import sys
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax import strict_json
from moe_jax.data import sources
from moe_jax.errors import UserError, choose
from moe_jax.generation.completing import Completion, Options, complete
from moe_jax.generation.sampling import Sampling
from moe_jax.generation.steps import Steps
from moe_jax.generation.writing import prompt_ids
from moe_jax.parallel import multihost
from moe_jax.programs import token_colours
from moe_jax.training import state
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.run_dir import RunDir


class _Piece(NamedTuple):
  """A text on its way to the terminal.

  Attributes:
    text: The text, of a token mostly.
    expert: That of its token; None where it is not to be shown.
  """

  text: str
  expert: int | None = None


class Program:
  """A checkpoint that goes on with prompts."""

  def __init__(
    self,
    config: ConfigDict,
    workdir: str,
    *,
    step: int | None,
    json: bool,
    experts: bool,
    layer: str,
    stops: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    batch_size: int,
  ) -> None:
    """Reads the checkpoint; the arguments are the flags of the program.

    Raises:
      UserError: Anything is wrong with them, with config, workdir or step.
    """
    sampling = Sampling.of(temperature, top_k, top_p)
    self._options = Options(
      max_tokens, sampling, seed, stops, batch_size=batch_size
    )
    self._as_json = json
    self._layer = _layer(config, layer) if experts else None
    setup = state.from_config_together(config, workdir)
    assert setup.tokenizer is not None, 'the setup of a run has one'
    self._config, self._tokenizer = config, setup.tokenizer
    run = RunDir.existing(workdir, config)
    with Checkpointer(run, setup.vocabulary) as checkpointer:
      wanted = {'params': setup.abstract['params']}
      restored = checkpointer.restore(wanted, step)
    self._params, self._step = restored.state['params'], restored.step
    self._steps = Steps(
      config,
      setup.vocab_size,
      setup.mesh,
      disable_top=config.eval.disable_top,
      experts=experts,
    )
    self._prints = multihost.is_main_process()

  def write(self, prompts: list[str]) -> None:
    """Prints what follows each prompt; of one alone, while it is made."""
    ids = [self._ids(text) for text in prompts]
    self._note(ids)
    pieces: list[list[_Piece]] = [[] for _ in prompts]
    if self._layer is None:  # else the prompt's tokens are shown as well
      pieces = [[_Piece(text)] for text in prompts]
    alone = len(prompts) == 1 and not self._as_json

    def show(number: int, piece: str, experts: np.ndarray | None) -> None:
      expert = None
      if self._layer is not None and experts is not None:
        expert = int(experts[self._layer])
      pieces[number].append(_Piece(piece, expert))
      if alone:
        self._print(pieces[number].pop())

    if alone and pieces[0]:
      self._print(pieces[0].pop())
    found = complete(
      self._steps, self._params, self._tokenizer, ids, self._options, show
    )
    for number, completion in enumerate(found):
      if self._as_json:
        self._print_row(prompts[number], completion)
        continue
      head = [] if alone else [_Piece(f'{"-" * 8} {number}\n')]
      self._print(*head, *pieces[number], _Piece('\n'))

  def interact(self) -> None:
    """Goes on with what is typed, line by line, until there is no more.

    Ctrl-C ends a text that is being written.

    Raises:
      UserError: Several processes run together.
    """
    if not multihost.is_single_process():
      raise UserError('--interactive is for one process; give --prompt instead')
    while (line := _line()) is not None:
      if line:
        try:
          self.write([line])
        except KeyboardInterrupt:
          self._print(_Piece('\n'))

  def _ids(self, text: str) -> list[int]:
    """Returns the tokens of a prompt."""
    begins = not sources.is_one_text(self._config.data)
    return prompt_ids(self._tokenizer, text, begins)

  def _note(self, prompts: list[list[int]]) -> None:
    """Tells where texts get longer than any that the model has read."""
    longest = max(map(len, prompts)) + self._options.max_tokens
    trained = self._config.data.seq_len
    if self._config.model.positions == 'rotary' and longest > trained:
      print(
        f'note: up to {longest} tokens, and the model was trained on'
        f' {trained} (data.seq_len): rotary positions have no end, but what is'
        ' written past that may be worse',
        file=sys.stderr,
      )

  def _print(self, *pieces: '_Piece') -> None:
    colours = token_colours.wanted()
    dress = token_colours.coloured if colours else token_colours.numbered
    clean = token_colours.visible if sys.stdout.isatty() else str
    if self._prints:
      text = ''.join(dress(clean(text), expert) for text, expert in pieces)
      print(text, end='', flush=True)

  def _print_row(self, prompt: str, found: Completion) -> None:
    row: dict[str, Any] = {
      'prompt': prompt,
      'text': found.text,
      'ids': found.ids,
      'ended': found.ended,
      'step': self._step,
    }
    if found.experts is not None and self._layer is not None:
      row['experts'] = found.experts[self._layer].tolist()
    if self._prints:
      print(strict_json.dumps(row), flush=True)


def _layer(config: ConfigDict, name: str) -> tuple[int, int]:
  """Returns the number of an MoE layer among those, and of its sub-layer.

  Args:
    config: The config.
    name: The layer, from 1 on, and a letter where it has several factors; ''
      for the last.

  Raises:
    UserError: There is no such layer, or it is dense.
  """
  names = config_lib.router_names(config)
  if not names:
    raise UserError('--experts: the model is dense, and has no experts')
  place = names.index(choose('--layer', name or names[-1], names))
  return divmod(place, config.moe.factors)


def _line() -> str | None:
  """Returns the next line of stdin; None where it ends."""
  asks = '> ' if sys.stdin.isatty() else ''
  try:
    return input(asks)
  except EOFError:
    return None
