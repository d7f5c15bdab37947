"""The loss without each token's best experts (CartesianMoE, table 4)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe_jax.config import moe_layers, router_names
from moe_jax.config.evaluations import disabled
from moe_jax.evaluation import Result, without_top
from moe_jax.evaluation.perplexity import Perplexity
from moe_jax.model.routers import Place, places
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.registry import EVALUATIONS
from moe_jax.routing.selection import Disabled
from moe_jax.training import state
from moe_jax.training.state import Setup

ALL = 'all'


@EVALUATIONS.register('robustness')
class Robustness:
  """Evaluates a split with the best experts of every token disabled.

  The r experts that a token's router rates highest are out of its reach, and it
  chooses among the others as ever. For each r, every MoE sub-layer does without
  them at once; where asked, also some alone. One compiled program computes it
  all. The metrics are those of `Perplexity`, with r as `disabled_top`.
  """

  def __init__(
    self,
    setup: Setup,
    split: str,
    disable_top: Sequence[int] = (),
    separately: bool = False,
    tell: Callable[[int, int], object] = lambda done, total: None,
  ) -> None:
    """Opens a split.

    Args:
      setup: The setup of a run, with its tokenizer.
      split: The split of the data.
      disable_top: Every r; () for those of `eval.robustness`. 0 is the usual
        evaluation.
      separately: Whether to disable experts in single layers, sub-layers and
        routers, too; see `parts`.
      tell: Is told how many evaluations are done, of how many.

    Raises:
      UserError: There is no such split, or no token to predict in it.
    """
    self._disable_top = tuple(disable_top) or disabled(setup.config)
    self._places = places(setup.config)
    everywhere = {ALL: list(range(len(self._places)))}
    self._parts = parts(setup.config) if separately else everywhere
    self._tell = tell
    counting = _counting(setup, max(self._disable_top), self._places)
    self._perplexity = Perplexity(counting, split)

  def __call__(self, params: Any, max_batches: int = 0) -> list[Result]:
    """Returns a result for every r, and for every source of a mixture."""
    wanted = [
      (top, part)
      for top in self._disable_top
      for part in (self._parts if top else [ALL])
    ]
    found: dict[tuple[str, int], dict[str, Result]] = {}
    for done, (top, part) in enumerate(wanted):
      self._tell(done, len(wanted))
      counts = np.zeros(len(self._places), np.int32)
      counts[self._parts[part]] = top
      counted = _with_counts(params, self._places, counts)
      for result in self._perplexity(counted, max_batches):
        found.setdefault((result.split, top), {})[part] = result
    return [_joined(top, of_part) for (_, top), of_part in found.items()]


def parts(config: ConfigDict) -> dict[str, list[int]]:
  """Returns the sub-layers that do without their best experts together.

  Args:
    config: The config of a model with experts.

  Returns:
    Numbers of routers, from the lowest, by a name: `all`; where there are
    several, each alone by its name in `router_names`; and of several Cartesian
    layers also `layer 3`, all sub-layers of one, and `A`, the first of each.
  """
  routers, factors = router_names(config), config.moe.factors
  found = {ALL: list(range(len(routers)))}
  if factors > 1 and len(routers) > factors:
    for place, layer in enumerate(moe_layers(config)):
      first = place * factors
      found[f'layer {layer}'] = list(range(first, first + factors))
    for factor in range(factors):
      letter = chr(ord('A') + factor)
      found[letter] = list(range(factor, len(routers), factors))
  if len(routers) > 1:
    for number, router in enumerate(routers):
      found[router if factors > 1 else f'layer {router}'] = [number]
  return found


def table(
  found: Mapping[str, Sequence[Result]], disable_top: Sequence[int]
) -> list[list[str]]:
  """Returns the cells of a table of results, its head first.

  Args:
    found: The results of `Robustness` by the name of what was evaluated.
    disable_top: The r that they are of, a pair of columns each.
  """
  cells: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {}
  for checkpoint, results in found.items():
    for result in results:
      top = int(result.metrics.get('disabled_top', 0))
      for part, metrics in {
        ALL: result.metrics,
        **(result.parts or {}),
      }.items():
        row = cells.setdefault((checkpoint, result.split, part), {})
        row[top] = metrics
  head = ['checkpoint', 'split', 'disabled in']
  for top in disable_top:
    head += [f'loss, top {top}', f'perplexity, top {top}']
  lines = [head]
  for names, row in cells.items():
    numbers = [
      f'{row[top][name]:.4f}' if top in row else ''
      for top in disable_top
      for name in ('loss', 'perplexity')
    ]
    lines.append([*names, *numbers])
  return lines


def _joined(top: int, of_part: dict[str, Result]) -> Result:
  """Returns the result of so many disabled experts, with those of its parts."""
  whole = of_part.pop(ALL)
  if not top:
    return whole
  return whole._replace(
    metrics={'disabled_top': top} | whole.metrics,
    variant=without_top(top),
    parts={part: result.metrics for part, result in of_part.items()},
  )


def _counting(setup: Setup, most: int, where: Sequence[Place]) -> Setup:
  """Returns a setup whose parameters say how many are disabled, and where.

  Args:
    setup: The setup of a run.
    most: The most experts that are disabled.
    where: The MoE sub-layers.
  """
  config = setup.config.copy_and_resolve_references()
  with config.unlocked():
    config.eval.disable_top = 0  # it would name the results
  model = state.abstract_model(config, setup.vocab_size, setup.mesh, most)
  for place in where:
    shape = () if place.repetition is None else (place.repeats,)
    count = jax.ShapeDtypeStruct(shape, jnp.int32)
    place.within(model).select.disabled = nnx.data(Disabled(count))
  graphdef = nnx.graphdef(model)
  none = np.zeros(len(where), np.int32)
  replicated = mesh_lib.replicated(setup.mesh)

  def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

  params = _with_counts(setup.abstract['params'], where, none)
  return dataclasses.replace(
    setup,
    graphdef=graphdef,
    eval_graphdef=graphdef,
    abstract={'params': jax.tree.map(abstract, params)},
    config=config,
  )


def _with_counts(
  params: Any, where: Sequence[Place], counts: np.ndarray
) -> Any:
  """Returns parameters with how many experts each sub-layer does without.

  Args:
    params: The parameters of a model, which stay as they are.
    where: Its MoE sub-layers.
    counts: A number for each, int32.
  """
  counted = jax.tree.map(lambda leaf: leaf, params)  # dicts of its own
  for place, count in zip(where, counts, strict=True):
    select = place.within(counted).setdefault('select', {})
    if place.repetition is None:
      select['disabled'] = count
    else:
      stacked = select.setdefault('disabled', np.zeros(place.repeats, np.int32))
      stacked[place.repetition] = count
  return counted
