"""Which tensors of a released checkpoint hold which of our parameters.

One table per format, read in both directions. A line is

  our parameter: (axes, names)

`names` is a template of tensor names: `{*}` stands for every expert, `{a|b}`
for a, then b; every such brace is an axis the tensors are stacked along, in
front of their own. `axes` names all of them, then ours: `(HA)D->DHA` reads a
[H*A, D] tensor into [D, H, A], as PyTorch keeps linear weights as [out, in].
What stands under `block/` is below `model.layers.N.` in the file, unless its
name begins with `model.`: then it is one tensor for all layers.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.interop import depth
from moe_jax.interop.depth import Path

Rules = dict[str, tuple[str, str]]

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
  """One network, by the names that Llama gave its parts."""
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
    names: an array of strings; its axes are those the tensors are stacked on.
    axes: from the stacked tensors to ours, as in the tables.
    shape: of our parameter.
  """

  names: np.ndarray
  axes: str
  shape: tuple[int, ...]

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Of each released tensor."""
    theirs, _ = self.axes.split('->')
    return self._joined(theirs)[self.names.ndim :]

  def gather(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Our parameter, float32, from the released `tensors`."""
    stacked = np.stack(
      [tensors[name].astype(np.float32) for name in self.names.flat]
    )
    theirs, ours = self._split_axes()
    sizes = [self._sizes[axis] for axis in theirs]
    array = np.einsum(f'{theirs}->{ours}', stacked.reshape(sizes))
    return np.ascontiguousarray(array).reshape(self.shape)

  def scatter(self, array: np.ndarray) -> dict[str, np.ndarray]:
    """The released tensors of our parameter: the inverse of `gather`.

    Raises:
      UserError: layers differ in what the format has only one tensor for.
    """
    theirs, ours = self._split_axes()
    sizes = [self._sizes[axis] for axis in ours]
    stacked = np.einsum(f'{ours}->{theirs}', array.reshape(sizes))
    tensors = np.ascontiguousarray(stacked).reshape(-1, *self.tensor_shape)
    return joined(zip(self.names.flat, tensors, strict=True))

  def _split_axes(self) -> tuple[str, str]:
    theirs, ours = re.sub(r'[()]', '', self.axes).split('->')
    return theirs, ours

  def _joined(self, axes: str) -> tuple[int, ...]:
    """The sizes of axes of which those in brackets are one."""
    groups = re.findall(r'\(\w+\)|\w', axes)
    return tuple(
      math.prod(self._sizes[axis] for axis in group.strip('()'))
      for group in groups
    )

  @property
  def _sizes(self) -> dict[str, int]:
    """Of every axis: some are counted in the names, others in our shape."""
    theirs, ours = self.axes.split('->')
    sizes = dict(zip(theirs, self.names.shape, strict=False))
    groups = re.findall(r'\((\w+)\)|(\w)', ours)
    for (several, one), size in zip(groups, self.shape, strict=True):
      known = [axis for axis in several if axis in sizes]
      for axis in several or one:
        if axis not in known:  # one at most
          sizes[axis] = size // math.prod(sizes[k] for k in known)
    return sizes


def joined(tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """A dict of them.

  Raises:
    UserError: two of the same name differ.
  """
  found = {}
  for name, tensor in tensors:
    if name in found and not np.array_equal(found[name], tensor):
      raise UserError(
        f'{name} is one tensor for all layers in the released format, but the'
        ' layers of this model differ in it'
      )
    found[name] = tensor
  return found


def leaves(
  shapes: Mapping[Path, tuple[int, ...]],
  config: ConfigDict,
  layout: str,
  rules: Rules,
) -> dict[Path, Leaf]:
  """Where each of our parameters stands in a released file.

  Args:
    shapes: of every parameter, by its path.
    config: of the model.
    layout: the name of the format, for the message.
    rules: of the format, beside the decoder's own.

  Raises:
    UserError: the released format has no tensor for a parameter.
  """
  dense = feed_forward('block/chain/sub_layers/0/feed_forward', 'mlp')
  rules = _DECODER | dense | rules

  def leaf(path: Path, stands: list[depth.LayerPath]) -> Leaf:
    in_block = stands[0][0] == 'block'
    key = '/'.join(map(str, ('block', *stands[0][2:]) if in_block else path))
    if key not in rules:
      ours = '/'.join(map(str, path))
      raise UserError(
        f"the released format '{layout}' has no tensor for {ours}"
      )
    axes, template = rules[key]
    names = [
      names_in(template, place[1] if in_block else None) for place in stands
    ]
    if path[0] != 'periods':
      return Leaf(names[0], axes, shapes[path])
    theirs, ours = axes.split('->')
    return Leaf(np.stack(names), f'P{theirs}->P{ours}', shapes[path])

  def names_in(template: str, layer: int | None) -> np.ndarray:
    of_layer = layer is not None and not template.startswith('model.')
    start = f'model.layers.{layer}.' if of_layer else ''
    return _expand(start + template, range(config.moe.num_experts))

  stands = depth.places(shapes)
  return {path: leaf(path, stands[path]) for path in shapes}


def _expand(template: str, experts: Iterable[int]) -> np.ndarray:
  """All names a template stands for, one axis per brace."""
  braces = re.findall(r'\{(.*?)\}', template)
  options = [list(experts) if b == '*' else b.split('|') for b in braces]
  blank = re.sub(r'\{.*?\}', '{}', template)
  names = [blank.format(*choice) for choice in itertools.product(*options)]
  return np.array(names).reshape([len(option) for option in options])
