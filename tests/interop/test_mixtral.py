"""Against transformers' own Mixtral, where the extra `interop` is installed."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.interop import formats, hf, released
from tests.helpers import tiny
from tests.helpers.released import export

SIZES = {
  'model.vocab_size': tiny.VOCAB,
  'model.num_kv_heads': 2,
  'router.weights': 'chosen',
}
MODELS = {
  'top-2': {},
  'top-1': {'moe.top_k': 1},
  'tied, wide heads': {'model.tie_embeddings': True, 'model.head_dim': 12},
  'softmax over all': {'router.weights': 'softmax', 'moe.top_k': 3},
}
NOT_MIXTRAL = {
  'router.recurrent': 'gru',
  'router.score': 'cosine',
  'router.selection': 'top_p',
  'moe.factors': 2,
  'moe.every': 2,
  'moe.bias': True,
  'moe.shared.width': 24,
  'model.norm': 'layer',
}


def ids() -> np.ndarray:
  return np.random.default_rng(1).integers(tiny.VOCAB, size=(2, 13))


def transformers() -> Any:
  pytest.importorskip('torch')
  return pytest.importorskip('transformers')


def theirs(folder: Path) -> np.ndarray:
  """The logits of transformers, which must find every tensor it looks for."""
  import torch

  model, info = transformers().MixtralForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
  )
  assert not any(info.values()), info
  with torch.no_grad():
    return model.eval()(torch.asarray(ids())).logits.numpy()


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('max_shard_bytes', [0, 60_000])
def test_transformers_computes_what_we_export(
  name: str, max_shard_bytes: int, tmp_path: Path
) -> None:
  transformers()
  config = tiny.config(**(SIZES | MODELS[name]))
  _, params = tiny.decoder(config)
  export(tmp_path, config, params, 'mixtral', max_shard_bytes=max_shard_bytes)
  ours = released.run(config, params, jnp.asarray(ids(), jnp.int32))
  np.testing.assert_allclose(theirs(tmp_path), ours, atol=2e-5, rtol=1e-4)


# Of the models that transformers makes, in its names.
THEIR_SIZES = {
  'vocab_size': tiny.VOCAB,
  'hidden_size': 32,
  'intermediate_size': 40,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'initializer_range': 0.2,
}


@pytest.mark.parametrize('changes', [{}, {'num_experts_per_tok': 1}])
def test_we_compute_what_transformers_saved(
  changes: dict, tmp_path: Path
) -> None:
  library = transformers()
  import torch

  torch.manual_seed(0)
  config = library.MixtralConfig(
    **THEIR_SIZES,
    num_local_experts=6,
    **changes,
  )
  library.MixtralForCausalLM(config).save_pretrained(
    tmp_path, max_shard_size='90KB'
  )
  assert (tmp_path / 'model.safetensors.index.json').exists()
  logits = hf.logits(tmp_path, ids())
  np.testing.assert_allclose(logits, theirs(tmp_path), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('wide', [{}, {'head_dim': 12}])
def test_a_llama_to_upcycle_is_read_as_transformers_does(
  wide: dict, tmp_path: Path
) -> None:
  library = transformers()
  import torch

  torch.manual_seed(0)
  config = library.LlamaConfig(
    **THEIR_SIZES,
    **wide,
  )
  model = library.LlamaForCausalLM(config).eval()
  model.save_pretrained(tmp_path)
  ours = released.run(
    *released.load(tmp_path, ['llama']), jnp.asarray(ids(), jnp.int32)
  )
  with torch.no_grad():
    logits = model(torch.asarray(ids())).logits.numpy()
  np.testing.assert_allclose(ours, logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('key', NOT_MIXTRAL)
def test_what_cannot_be_a_mixtral_is_refused_by_its_key(key: str) -> None:
  config = tiny.config(**(SIZES | {key: NOT_MIXTRAL[key]}))
  with pytest.raises(UserError, match=key.replace('.', r'\.')):
    formats.write(config, 'mixtral')


def test_a_lone_weight_of_a_softmax_is_not_a_mixtrals() -> None:
  config = tiny.config(
    **(SIZES | {'moe.top_k': 1, 'router.weights': 'softmax'})
  )
  with pytest.raises(UserError, match=r"router\.weights = 'softmax'"):
    formats.write(config, 'mixtral')
