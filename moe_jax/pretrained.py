"""A model from disk: a run's, or a released checkpoint's."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe_jax.config import MESH_AXES
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.experts.layer import Aux
from moe_jax.generation.rows import Rows
from moe_jax.generation.sampling import Sampling
from moe_jax.generation.steps import Steps
from moe_jax.interop import checkpoint, released
from moe_jax.model.decoder import Decoder
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.routing.selection import Routing


class Model:
  """A model and its parameters, to be called with token ids.

  It computes in float32 and drops no token, whatever it was trained with.

  Attributes:
    params: The nested dict of parameters.
    step: The training step; None for a released checkpoint.
  """

  def __init__(
    self, config: ConfigDict, params: dict[str, Any], step: int | None = None
  ) -> None:
    """Describes a model.

    Args:
      config: The sections `model`, `moe` and `router` at least; its
        `model.vocab_size` is not 0.
      params: The nested dict of parameters, float32.
      step: The training step, if that is known.
    """
    graphdef, _ = released.abstract(config)
    self.params = params
    self.step = step
    self._config = config
    self._vocab_size = config.model.vocab_size

    def logits(params: dict[str, Any], ids_BL: jax.Array) -> jax.Array:
      model: Decoder = nnx.merge(graphdef, params)
      return model(ids_BL, jnp.ones(ids_BL.shape, bool)).logits_BLV

    def routing(params: dict[str, Any], ids_BL: jax.Array) -> Routing | None:
      model: Decoder = nnx.merge(graphdef, params)
      mask_BL = jnp.ones(ids_BL.shape, bool)
      return model.hidden(ids_BL, mask_BL, _routing_of).aux

    self._logits = jax.jit(logits)
    self._routing = jax.jit(routing)

  def __call__(self, ids: Any) -> jax.Array:
    """Returns the logits of every next token; see `logits`."""
    return self.logits(ids)

  def logits(self, ids: Any) -> jax.Array:
    """Returns the logits of every next token, float32 [..., L, V].

    Args:
      ids: Token ids, integers [..., L]; none is padding.

    Raises:
      UserError: An id is not in the vocabulary.
    """
    ids = self._checked(ids)
    with jax.default_matmul_precision('highest'):  # on TPU and GPU too
      logits_BLV = self._logits(self.params, ids.reshape(-1, ids.shape[-1]))
    return logits_BLV.reshape(*ids.shape, -1)

  def routing(self, ids: Any) -> Routing | None:
    """Returns where every token goes.

    Args:
      ids: Token ids, integers [..., L]; none is padding.

    Returns:
      A `Routing` whose arrays are [MoE layers, sub-layers, ..., L, K] and
      [MoE layers, sub-layers, ..., L, N]; None for a dense model.

    Raises:
      UserError: An id is not in the vocabulary.
    """
    ids = self._checked(ids)
    with jax.default_matmul_precision('highest'):
      routing = self._routing(self.params, ids.reshape(-1, ids.shape[-1]))
    return jax.tree.map(
      lambda a: a.reshape(*a.shape[:2], *ids.shape, a.shape[-1]), routing
    )

  def generate(
    self,
    prompts: Sequence[Any],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    end_id: int | None = None,
  ) -> list[list[int]]:
    """Goes on with prompts, all at once.

    Args:
      prompts: The token ids of each, of any lengths; none is empty.
      max_tokens: How many tokens follow, at the most.
      temperature: What logits are divided by; 0 takes the likeliest token.
      top_k: How many tokens there are to draw from; 0 for all.
      top_p: The probability that the likeliest of these have to reach.
      seed: What random numbers follow from, with the number of the prompt and
        the position in its text.
      end_id: A token that ends a text, as `tokenizer.eos_id`; None for none.

    Returns:
      The token ids that follow each prompt, without `end_id`.

    Raises:
      UserError: A prompt is empty or has an id that is not in the vocabulary,
        or a number is out of range.
    """
    rows = Rows(
      self._steps,
      self.params,
      prompts,
      max_tokens=max_tokens,
      sampling=Sampling.of(temperature, top_k, top_p),
      seed=seed,
    )
    found: list[list[int]] = [[] for _ in prompts]
    with jax.default_matmul_precision('highest'):
      for token in rows:
        rows.active_B &= token.ids_B != end_id
        for row in np.flatnonzero(rows.active_B):
          found[row].append(int(token.ids_B[row]))
    return found

  @functools.cached_property
  def _steps(self) -> Steps:
    """The programs of generation, on one device."""
    exact = released.exact(self._config)
    shape = dict.fromkeys(MESH_AXES, 1)
    mesh = mesh_lib.make_mesh(shape, jax.devices()[:1])
    return Steps(exact, self._vocab_size, mesh)

  def _checked(self, ids: Any) -> jax.Array:
    ids = np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer) or not ids.ndim or not ids.size:
      raise UserError(
        f'ids are {ids.dtype} of shape {ids.shape}, not integers [..., L]'
      )
    if ids.min() < 0 or ids.max() >= self._vocab_size:
      raise UserError(
        f'ids are from {ids.min()} to {ids.max()}, but the vocabulary has'
        f' {self._vocab_size}'
      )
    return jnp.asarray(ids, jnp.int32)


def load(
  path: str | Path, step: int | None = None
) -> tuple[Model, Tokenizer | None, ConfigDict]:
  """Reads a run or a released checkpoint.

  Args:
    path: The workdir of a run, or the folder of a checkpoint of RMoE,
      CartesianMoE, Mixtral or Llama.
    step: The step of the run's checkpoint; None for the newest.

  Returns:
    model: It makes logits and routing of token ids, and has the parameters.
    tokenizer: That of the run; None for a released checkpoint, whose tokenizer
      is a file of its own.
    config: The config of the run, or what a released one says.

  Raises:
    UserError: The folder holds neither, or it is damaged or of a kind that is
      not supported.
  """
  read = checkpoint.read(path, step)
  tokenizer = read.tokenizer
  if tokenizer is None and read.step is not None:
    tokenizer = tokenizers.build(read.config.data)
  return Model(read.config, read.params, read.step), tokenizer, read.config


def _routing_of(aux: Aux) -> Routing:
  return aux.routing
