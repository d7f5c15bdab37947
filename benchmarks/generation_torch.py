"""The peer's side of `benchmarks.generation`: Mixtral in PyTorch, cached.

python -m benchmarks.generation_torch SIZES_AS_JSON TOKENS EXPERTS
"""

import os
import sys

from benchmarks.peer_sizes import Sizes
from moe_jax import runtime


def main(sizes_json: str, tokens: str, experts: str) -> None:
  """Goes on with random texts, so many tokens a step."""
  runtime.configure_malloc()  # before torch takes memory
  import torch
  import transformers

  from benchmarks import duel, peer_torch

  sizes, count = Sizes.from_json(sizes_json), int(tokens)
  torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))
  torch.manual_seed(0)
  on_gpu = torch.cuda.is_available()
  device = 'cuda' if on_gpu else 'cpu'
  model = peer_torch.model_of(sizes, experts).to(device).eval()
  if on_gpu:
    model = model.to(torch.bfloat16)
  shape = sizes.batch_size, sizes.seq_len
  ids = torch.randint(sizes.vocab_size, shape, device=device)
  cache = transformers.DynamicCache()

  @torch.inference_mode()
  def read(ids: torch.Tensor) -> torch.Tensor:
    found = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return found.logits[:, -1:].argmax(-1)

  following = read(ids)

  def step() -> None:
    """From the same place every time."""
    nonlocal following
    for _ in range(count):
      following = read(following)
    cache.crop(-count)  # which removes so many
    if on_gpu:
      torch.cuda.synchronize()

  step()
  duel.serve(step, {'tokens': count, 'torch': torch.__version__})


if __name__ == '__main__':
  main(*sys.argv[1:])
