"""Samples of what a model writes while it is trained."""

from typing import Any

from moe_jax.data import sources
from moe_jax.generation.completing import Options, complete
from moe_jax.generation.sampling import Sampling
from moe_jax.generation.steps import Steps
from moe_jax.generation.writing import prompt_ids
from moe_jax.training.state import Setup

# Of what is drawn: the likeliest tokens would soon say the same again and
# again, and unlikely ones say more of chance than of the model.
_TEMPERATURE = 0.8


class Samples:
  """Goes on with `train.sample_prompt`, the same way every time."""

  def __init__(self, setup: Setup) -> None:
    """Encodes the prompt; nothing is compiled before the first sample.

    Raises:
      UserError: The tokenizer cannot encode it.
    """
    config, tokenizer = setup.config, setup.tokenizer
    assert tokenizer is not None, 'the setup of a run has one'
    self._tokenizer = tokenizer
    self._prompt = config.train.sample_prompt
    self._ids = [tokenizer.eos_id]
    if self._prompt:
      begins = not sources.is_one_text(config.data)
      self._ids = prompt_ids(tokenizer, self._prompt, begins)
    self._options = Options(
      config.train.sample_tokens, Sampling.of(_TEMPERATURE), config.seed
    )
    self._steps = Steps(
      config,
      setup.vocab_size,
      setup.mesh,
      disable_top=config.eval.disable_top,
    )

  def __call__(self, params: Any) -> str:
    """Returns the prompt and what follows it.

    Args:
      params: The model's parameters, where the mesh of the run has them.
    """
    [found] = complete(
      self._steps, params, self._tokenizer, [self._ids], self._options
    )
    return self._prompt + found.text
