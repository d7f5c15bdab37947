"""The released checkpoints, and what the tests of them share."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from moe_jax.interop import hf
from moe_jax.model.decoder import Decoder

RELEASED = Path(__file__).parents[1] / 'reference' / 'hf'
LAYOUTS = {'rmoe_gru': 'rmoe', 'cartesian': 'cartesian'}
both = pytest.mark.parametrize('name', LAYOUTS)


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
  save_file(tensors, folder / 'model.safetensors')


def shape_of_model(config: ConfigDict) -> nnx.Module:
  return nnx.eval_shape(
    lambda: Decoder(config, config.model.vocab_size, None, rngs=nnx.Rngs(0))
  )


def random_params(config: ConfigDict) -> Any:
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: random.normal(0, 0.1, leaf.shape).astype('f4'),
    nnx.to_pure_dict(nnx.state(shape_of_model(config), nnx.Param)),
  )


def export(
  folder: Path,
  config: ConfigDict,
  params: Any,
  layout: str,
  *,
  dtype: str = 'float32',
  max_shard_bytes: int = 0,
) -> None:
  hf.save(
    folder,
    config,
    params,
    layout,
    max_positions=64,
    dtype=dtype,
    max_shard_bytes=max_shard_bytes,
  )
