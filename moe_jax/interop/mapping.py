"""Which tensors of a released checkpoint hold which of our parameters.

Every format has one table, which is read in both directions. A line is

  our parameter: (axes, names)

`names` is a template of tensor names: `{*}` stands for every expert, `{a|b}`
for a, then b; every such brace is an axis along which the tensors are stacked,
in front of their own axes. `axes` names all of these axes, then those of our
parameter: `(HA)D->DHA` reads a [H*A, D] tensor into [D, H, A], as PyTorch
keeps linear weights as [out, in]. A path that begins with `block/` is below
`model.layers.N.` in the file, unless its template begins with `model.`: then
it is one tensor for all layers.

Parameters are flat dicts here, from the keys that lead to an array to it.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from moe_jax.errors import UserError

Rules = dict[str, tuple[str, str]]
# The keys that lead to a parameter in a nested dict of them.
Path = tuple[str | int, ...]
# 'block', the index of the layer, then the keys within the block.
LayerPath = tuple[str | int, ...]

_DECODER = {
  'embed_VD': ('VD->VD', 'model.embed_tokens.weight'),
  'head_DV': ('VD->DV', 'lm_head.weight'),
  'norm/scale_D': ('D->D', 'model.norm.weight'),
  'block/norm/scale_D': ('D->D', 'input_layernorm.weight'),
  'block/chain/norms/0/scale_D': ('D->D', 'post_attention_layernorm.weight'),
  'block/attention/query_DHA': ('(HA)D->DHA', 'self_attn.q_proj.weight'),
  'block/attention/key_DGA': ('(GA)D->DGA', 'self_attn.k_proj.weight'),
  'block/attention/value_DGA': ('(GA)D->DGA', 'self_attn.v_proj.weight'),
  'block/attention/out_HAD': ('D(HA)->HAD', 'self_attn.o_proj.weight'),
}


def feed_forward(ours: str, theirs: str) -> Rules:
  """Returns the rules of one SwiGLU network, whose parts have Llama's names.

  Args:
    ours: The path of the network.
    theirs: The name of the network in the file.
  """
  return {
    f'{ours}/gate_up_D2F': (
      'gFD->DgF',
      theirs + '.{gate_proj|up_proj}.weight',
    ),
    f'{ours}/down_FD': ('DF->FD', f'{theirs}.down_proj.weight'),
  }


class Leaf(NamedTuple):
  """The released tensors of one of our parameters.

  Attributes:
    names: An array of strings; the tensors are stacked along its axes.
    axes: The axes of the stacked tensors and ours, as in the tables.
    shape: The shape of our parameter.
  """

  names: np.ndarray
  axes: str
  shape: tuple[int, ...]

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """The shape of each released tensor."""
    theirs, _ = self.axes.split('->')
    return self._joined(theirs)[self.names.ndim :]

  def gather(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns our parameter, float32, from the released `tensors`."""
    stacked = np.stack(
      [tensors[name].astype(np.float32) for name in self.names.flat]
    )
    theirs, ours = self._split_axes()
    sizes = [self._sizes[axis] for axis in theirs]
    array = np.einsum(f'{theirs}->{ours}', stacked.reshape(sizes))
    return np.ascontiguousarray(array).reshape(self.shape)

  def scatter(self, array: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the released tensors of our parameter: it undoes `gather`.

    Raises:
      UserError: Layers differ in what the format has only one tensor for.
    """
    theirs, ours = self._split_axes()
    sizes = [self._sizes[axis] for axis in ours]
    stacked = np.einsum(f'{ours}->{theirs}', array.reshape(sizes))
    tensors = np.ascontiguousarray(stacked).reshape(-1, *self.tensor_shape)
    return join(zip(self.names.flat, tensors, strict=True))

  def _split_axes(self) -> tuple[str, str]:
    theirs, ours = re.sub(r'[()]', '', self.axes).split('->')
    return theirs, ours

  def _joined(self, axes: str) -> tuple[int, ...]:
    """Returns the sizes of axes, those in brackets counting as one."""
    groups = re.findall(r'\(\w+\)|\w', axes)
    return tuple(
      math.prod(self._sizes[axis] for axis in group.strip('()'))
      for group in groups
    )

  @property
  def _sizes(self) -> dict[str, int]:
    """The size of every axis, from the names where they tell it, or ours."""
    theirs, ours = self.axes.split('->')
    sizes = dict(zip(theirs, self.names.shape, strict=False))
    groups = re.findall(r'\((\w+)\)|(\w)', ours)
    for (several, one), size in zip(groups, self.shape, strict=True):
      known = [axis for axis in several if axis in sizes]
      for axis in several or one:
        if axis not in known:  # one at most
          sizes[axis] = size // math.prod(sizes[k] for k in known)
    return sizes


def join(tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Returns a dict of named tensors.

  Raises:
    UserError: Two tensors of the same name differ.
  """
  joined: dict[str, np.ndarray] = {}
  for name, tensor in tensors:
    if name in joined and not np.array_equal(joined[name], tensor):
      raise UserError(
        f'{name} is one tensor for all layers in the released format, but the'
        ' layers of this model differ in it'
      )
    joined[name] = tensor
  return joined


def leaves(
  shapes: Mapping[Path, tuple[int, ...]],
  config: ConfigDict,
  format: str,
  rules: Rules,
) -> dict[Path, Leaf]:
  """Returns where each of our parameters stands in a released file.

  Args:
    shapes: The shape of every parameter, by its path.
    config: The config of the model.
    format: The name of the format, for the message.
    rules: The rules of the format, beside those of the decoder.

  Raises:
    UserError: The released format has no tensor for a parameter.
  """
  dense = feed_forward('block/chain/sub_layers/0/feed_forward', 'mlp')
  rules = _DECODER | dense | rules

  def leaf(path: Path, places: list[LayerPath]) -> Leaf:
    in_block = places[0][0] == 'block'
    key = '/'.join(map(str, ('block', *places[0][2:]) if in_block else path))
    if key not in rules:
      ours = '/'.join(map(str, path))
      raise UserError(
        f"the released format '{format}' has no tensor for {ours}"
      )
    axes, template = rules[key]
    names = [
      _names(template, place[1] if in_block else None, config)
      for place in places
    ]
    if path[0] != 'periods':
      return Leaf(names[0], axes, shapes[path])
    theirs, ours = axes.split('->')
    return Leaf(np.stack(names), f'P{theirs}->P{ours}', shapes[path])

  places = _places(shapes)
  return {path: leaf(path, places[path]) for path in shapes}


def _names(
  template: str, layer: str | int | None, config: ConfigDict
) -> np.ndarray:
  """Returns all names that a template stands for, one axis per brace."""
  if layer is not None and not template.startswith('model.'):
    template = f'model.layers.{layer}.{template}'
  braces = re.findall(r'\{(.*?)\}', template)
  options = [
    list(range(config.moe.num_experts)) if brace == '*' else brace.split('|')
    for brace in braces
  ]
  blank = re.sub(r'\{.*?\}', '{}', template)
  names = [blank.format(*choice) for choice in itertools.product(*options)]
  return np.array(names).reshape([len(option) for option in options])


def by_layer(params: Mapping[Path, np.ndarray]) -> dict[LayerPath, np.ndarray]:
  """Returns every parameter by its layer, whatever the scan stacks of them."""
  places = _places({path: array.shape for path, array in params.items()})
  layers = {}
  for path, array in params.items():
    for p, place in enumerate(places[path]):
      layers[place] = np.asarray(array[p] if path[0] == 'periods' else array)
  return layers


def stack_layers(
  layers: Mapping[LayerPath, np.ndarray],
  shapes: Mapping[Path, tuple[int, ...]],
) -> dict[Path, np.ndarray]:
  """Returns the parameters of these shapes: it undoes `by_layer`."""

  def array(path: Path, places: list[LayerPath]) -> np.ndarray:
    parts = [layers[place] for place in places]
    return np.stack(parts) if path[0] == 'periods' else parts[0]

  return {path: array(path, at) for path, at in _places(shapes).items()}


def _places(
  shapes: Mapping[Path, tuple[int, ...]],
) -> dict[Path, list[LayerPath]]:
  """Returns where every parameter stands by layer: a stack in several places.

  Args:
    shapes: The shape of every parameter, by its path.
  """
  # Layers before the pattern repeats, and layers of one repetition.
  prefix, period = (
    len({path[2] for path in shapes if path[0] == name})
    for name in ('prefix', 'periods')
  )

  def of(path: Path, shape: tuple[int, ...]) -> list[LayerPath]:
    if path[0] == 'prefix':
      return [('block', path[2], *path[3:])]
    if path[0] != 'periods':
      return [path]
    first = prefix + int(path[2])
    layers = range(first, first + shape[0] * period, period)
    return [('block', layer, *path[3:]) for layer in layers]

  return {path: of(path, shape) for path, shape in shapes.items()}
