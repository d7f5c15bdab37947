"""What a parameter is, declared where it is made.

`param` makes an `nnx.Param` and writes a `Declaration` into its metadata: how
its axes are called, whether weight decay reaches it, which part of the model it
belongs to, what moves it, and how often a token multiplies by it. Sharding, the
optimizer, counts and exchanges of experts all read that declaration, so nothing
follows from a parameter's name. A plain `nnx.Param` has the default one: it is
held whole by every device, trained, not decayed, and counted as a matmul if it
has two axes or more.

Flax's own metadata for sharding is not used: `nnx.vmap`, which stacks layers,
does not add the layers' axis to it. A declaration speaks of the last axes of a
parameter, so that axes which stacking puts in front need no name.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

# Names of axes; `moe_jax.parallel.mesh` says which of them a mesh splits.
VOCAB, EMBED, MLP, EXPERT = 'vocab', 'embed', 'mlp', 'expert'
HEADS, KV_HEADS = 'heads', 'kv_heads'
# The experts as a gate rates them: every device has the weights of all.
LOGIT = 'logit'

# Parts of a model; `optimizer.freeze` and the sizes of routers ask for them.
MODEL, ROUTER, CELL = 'model', 'router', 'cell'

# What moves a parameter: its gradient, nothing, or the sign of the experts'
# load, which its gradient holds.
TRAINED, FIXED, BIAS_UPDATED = 'trained', 'fixed', 'bias_updated'

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Declaration:
  """What a parameter is.

  Attributes:
    axes: A name for each of its last axes, None for one that is never split.
    decay: Whether weight decay pulls it towards zero.
    part: `MODEL`, `ROUTER` or `CELL`. A parameter of `CELL` is used by every
      MoE sub-layer.
    update: `TRAINED`, `FIXED` or `BIAS_UPDATED`.
    matmuls: How many matmuls each of its elements is part of, for each token
      that meets it: 1 for the weights of a matmul, 0 for what is added,
      multiplied element by element or looked up.
    passes: How many matmuls a training step has for each in the forward pass: 3
      where the gradients of the inputs and of the weights follow, 2 without the
      latter.
    remembered: Whether attention applies it anew to each remembered position.
    counted: Whether it counts as a parameter of the model in published sizes.
  """

  axes: Axes = ()
  decay: bool = False
  part: str = MODEL
  update: str = TRAINED
  matmuls: int = 0
  passes: int = 3
  remembered: bool = False
  counted: bool = True


def param(
  value: jax.Array,
  axes: Axes = (),
  *,
  matmuls: int | None = None,
  passes: int | None = None,
  update: str = TRAINED,
  **declared: Any,
) -> nnx.Param:
  """Returns a parameter that says what it is.

  Args:
    value: The array it starts with.
    axes: A name for every axis of `value`, or () where no axis is ever split.
    matmuls: See `Declaration`; None stands for 1 if `value` has two axes or
      more beside that of experts, else 0.
    passes: See `Declaration`; None stands for 2 if it is `FIXED`, else 3.
    update: See `Declaration`.
    **declared: Other fields of `Declaration`.

  Raises:
    ValueError: Some axes have names, but not all.
  """
  if axes and len(axes) != value.ndim:
    raise ValueError(f'axes {axes} of a parameter of shape {value.shape}')
  if matmuls is None:
    matmuls = _matmuls(value.ndim - axes.count(EXPERT))
  if passes is None:
    passes = 2 if update == FIXED else 3
  declaration = Declaration(
    axes, matmuls=matmuls, passes=passes, update=update, **declared
  )
  return nnx.Param(value, declaration=declaration)


def declaration(variable: nnx.Variable) -> Declaration:
  """Returns what a parameter is; the default for one that does not say it."""
  default = Declaration(matmuls=_matmuls(variable.get_value().ndim))
  return variable.get_metadata().get('declaration', default)


def declare(module: nnx.Module, part: str | None = None) -> None:
  """Writes down what the parameters of a module are that do not say it.

  Whoever stacks modules calls this for each before they are: afterwards a plain
  `nnx.Param` does not tell how many axes it has without the layers'.

  Args:
    module: The module, whose parameters are changed.
    part: The part of the model that all of it belongs to. None leaves what the
      parameters say themselves.
  """
  for _, node in nnx.iter_graph(module):
    if isinstance(node, nnx.Param):
      declared = declaration(node)
      if part is not None:
        declared = dataclasses.replace(declared, part=part)
      node.set_metadata(declaration=declared)


def declarations(model: nnx.Module) -> dict[str, Any]:
  """Returns the declarations of a model, a tree like that of its parameters.

  Args:
    model: Arrays or, after `nnx.eval_shape`, only their shapes.
  """
  return nnx.to_pure_dict(nnx.state(model, nnx.Param), declaration)


def flatten(tree: Any) -> dict[tuple[str, ...], Any]:
  """Returns the leaves of a tree by the keys that lead to them."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {keys(path): leaf for path, leaf in leaves}


def keys(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Returns a path of jax as strings: keys of dicts, names of attributes."""
  return tuple(
    str(getattr(entry, 'key', getattr(entry, 'name', entry))) for entry in path
  )


def _matmuls(num_axes: int) -> int:
  """Returns the default of `Declaration.matmuls`."""
  return int(num_axes >= 2)
