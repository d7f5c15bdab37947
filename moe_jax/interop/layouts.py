"""Which tensors of a released checkpoint hold which of our parameters.

One table per released format, read in both directions. A line is

  our parameter: (axes, names)

`names` is a template of tensor names: `{*}` stands for every expert, `{a|b}`
for a, then b; every such brace is an axis the tensors are stacked along, in
front of their own. `axes` names all of them, then ours: `(HA)D->DHA` reads a
[H*A, D] tensor into [D, H, A], as PyTorch keeps linear weights as [out, in].
What stands under `block/` is below `model.layers.N.` in the file.

Sources: llama_moe_rnn/llama_moe_modeling.py and rnn.py of qiuzh20/RMoE, and
transformers/models/llama/modeling_llama.py of suu990901/CartesianMoE.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from moe_jax.errors import UserError

# The keys that lead to a parameter in a nested dict of them.
Path = tuple[str | int, ...]
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


def _feed_forward(ours: str, theirs: str) -> Rules:
  return {
    f'{ours}/gate_up_D2F': (
      'gFD->DgF',
      theirs + '.{gate_proj|up_proj}.weight',
    ),
    f'{ours}/down_FD': ('DF->FD', f'{theirs}.down_proj.weight'),
  }


def _rmoe(config: ConfigDict) -> Rules:
  sub = 'block/chain/sub_layers/0'
  recurrent = config.router.recurrent != 'none'
  score = 'weight2' if recurrent else 'gate.weight'
  experts = 'block_sparse_moe.experts.{*}.'
  return {
    'cell/input_X3R': ('goi->igo', 'model.rnn_router.weight_i{r|z|n}'),
    'cell/hidden_R3R': ('goi->igo', 'model.rnn_router.weight_h{r|z|n}'),
    'cell/input_bias_3R': ('gR->gR', 'model.rnn_router.bias_i{r|z|n}'),
    'cell/hidden_bias_3R': ('gR->gR', 'model.rnn_router.bias_h{r|z|n}'),
    f'{sub}/router/features/project/projector_DR': (
      'RD->DR',
      'block_sparse_moe.weight1',
    ),
    f'{sub}/router/score/weight_XN': ('NX->XN', f'block_sparse_moe.{score}'),
    f'{sub}/experts/gate_up_ND2F': ('NgFD->NDgF', experts + '{w1|w3}.weight'),
    f'{sub}/experts/down_NFD': ('NDF->NFD', experts + 'w2.weight'),
    f'{sub}/bias_D': ('D->D', 'block_sparse_moe.bias'),
    **_feed_forward(f'{sub}/shared', 'mlp_share'),
  }


def _cartesian(config: ConfigDict) -> Rules:
  rules = {'block/chain/norms/1/scale_D': ('D->D', 'mlp_layernorm.weight')}
  # The release numbers its two sub-layers, and a conventional layer not at all.
  for s, suffix in enumerate(('',) if config.moe.factors == 1 else ('0', '1')):
    sub = f'block/chain/sub_layers/{s}'
    experts = f'mlp{suffix}.{{*}}.'
    rules |= {
      f'{sub}/router/score/weight_XN': ('NX->XN', f'wg{suffix}.weight'),
      f'{sub}/experts/gate_up_ND2F': (
        'NgFD->NDgF',
        experts + '{gate_proj|up_proj}.weight',
      ),
      f'{sub}/experts/down_NFD': ('NDF->NFD', experts + 'down_proj.weight'),
      f'{sub}/mixing/coefficient_D2': (
        'cD->Dc',
        f'coefficient{suffix}.weight',
      ),
      f'{sub}/mixing/bias_2': ('c->c', f'coefficient{suffix}.bias'),
      **_feed_forward(f'{sub}/shared', f'res_mlp{suffix}'),
    }
  return rules


LAYOUTS = {'rmoe': _rmoe, 'cartesian': _cartesian}


class Leaf(NamedTuple):
  """The released tensors of one of our parameters.

  Attributes:
    names: an array of strings; its axes are those the tensors are stacked on.
    axes: from the stacked tensors to ours, as in the tables.
  """

  names: np.ndarray
  axes: str

  def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of each released tensor, where our parameter has `shape`."""
    theirs, ours = self.axes.split('->')
    size = dict(zip(ours, shape, strict=True))
    groups = re.findall(r'\(\w+\)|\w', theirs)[self.names.ndim :]
    return tuple(math.prod(size[a] for a in g.strip('()')) for g in groups)

  def gather(
    self, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]
  ) -> np.ndarray:
    """Our parameter, float32 of `shape`, from the released `tensors`."""
    theirs, ours = re.sub(r'[()]', '', self.axes).split('->')
    size = dict(zip(ours, shape, strict=True))
    stacked = np.stack(
      [tensors[name].astype(np.float32) for name in self.names.flat]
    ).reshape([size[axis] for axis in theirs])
    return np.ascontiguousarray(np.einsum(f'{theirs}->{ours}', stacked))

  def scatter(self, array: np.ndarray) -> dict[str, np.ndarray]:
    """The released tensors of our parameter: the inverse of `gather`."""
    theirs, ours = re.sub(r'[()]', '', self.axes).split('->')
    stacked = np.ascontiguousarray(np.einsum(f'{ours}->{theirs}', array))
    tensors = stacked.reshape(-1, *self.tensor_shape(array.shape))
    return dict(zip(self.names.flat, tensors, strict=True))


def leaves(
  shapes: Mapping[Path, tuple[int, ...]], config: ConfigDict, layout: str
) -> dict[Path, Leaf]:
  """Where each of our parameters stands in a released file.

  Args:
    shapes: of every parameter, by its path.
    config: of the model.
    layout: a key of `LAYOUTS`.

  Raises:
    UserError: the released format has no tensor for a parameter.
  """
  rules = _DECODER | _feed_forward(
    'block/chain/sub_layers/0/feed_forward', 'mlp'
  )
  rules |= LAYOUTS[layout](config)
  prefix = len({path[2] for path in shapes if path[0] == 'prefix'})
  period = len({path[2] for path in shapes if path[0] == 'periods'})

  def leaf(path: Path, shape: tuple[int, ...]) -> Leaf:
    in_block = path[0] in ('prefix', 'periods')
    key = '/'.join(map(str, ('block', *path[3:]) if in_block else path))
    if key not in rules:
      ours = '/'.join(map(str, path))
      raise UserError(
        f"the released format '{layout}' has no tensor for {ours}"
      )
    axes, template = rules[key]
    if path[0] == 'periods':
      layers = range(prefix + path[2], prefix + shape[0] * period, period)
      names = [names_in(template, layer) for layer in layers]
      theirs, ours = axes.split('->')
      return Leaf(np.stack(names), f'P{theirs}->P{ours}')
    return Leaf(names_in(template, path[2] if in_block else None), axes)

  def names_in(template: str, layer: int | None) -> np.ndarray:
    start = '' if layer is None else f'model.layers.{layer}.'
    return _expand(start + template, range(config.moe.num_experts))

  return {path: leaf(path, shape) for path, shape in shapes.items()}


def _expand(template: str, experts: Iterable[int]) -> np.ndarray:
  """All names a template stands for, one axis per brace."""
  braces = re.findall(r'\{(.*?)\}', template)
  options = [list(experts) if b == '*' else b.split('|') for b in braces]
  blank = re.sub(r'\{.*?\}', '{}', template)
  names = [blank.format(*choice) for choice in itertools.product(*options)]
  return np.array(names).reshape([len(option) for option in options])
