"""The peer's side of `benchmarks.peers`: transformers' Mixtral in PyTorch.

  python -m benchmarks.peer_torch SIZES_AS_JSON EXPERTS tuned|default

EXPERTS is one of transformers' implementations, such as grouped_mm or eager.
"""

import importlib.metadata
import os
import sys
from typing import Any

from benchmarks.peer_sizes import Sizes
from moe_jax import runtime


def main(sizes_json: str, experts: str, malloc: str) -> None:
  """Trains on random tokens, one step at a time."""
  # Before torch takes memory.
  tuned = malloc == 'tuned' and runtime.configure_malloc()
  import torch

  from benchmarks import duel

  sizes = Sizes.from_json(sizes_json)
  torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))
  torch.manual_seed(0)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = model_of(sizes, experts).to(device).train()
  # Decay as ours: on matrices, not on the scales of norms.
  matrices = [p for p in model.parameters() if p.ndim > 1]
  scales = [p for p in model.parameters() if p.ndim == 1]
  optimizer = torch.optim.AdamW(
    [
      {'params': matrices, 'weight_decay': sizes.weight_decay},
      {'params': scales, 'weight_decay': 0.0},
    ],
    lr=sizes.learning_rate,
    betas=(0.9, 0.95),
    fused=True,
  )
  shape = sizes.batch_size, sizes.seq_len
  ids = torch.randint(sizes.vocab_size, shape, device=device)
  half = torch.autocast(device, torch.bfloat16, enabled=device == 'cuda')

  def step() -> None:
    with half:
      loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), sizes.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device == 'cuda':
      torch.cuda.synchronize()

  step()
  duel.serve(step, _facts(model, device, tuned))


def model_of(sizes: Sizes, experts: str) -> Any:
  """The model with random weights, on the CPU."""
  import transformers

  config = transformers.MixtralConfig(
    vocab_size=sizes.vocab_size,
    hidden_size=sizes.hidden_size,
    intermediate_size=sizes.expert_width,
    num_hidden_layers=sizes.num_layers,
    num_attention_heads=sizes.num_heads,
    num_key_value_heads=sizes.num_kv_heads,
    max_position_embeddings=sizes.seq_len,
    num_local_experts=sizes.num_experts,
    num_experts_per_tok=sizes.top_k,
    output_router_logits=bool(sizes.balance_weight),
    router_aux_loss_coef=sizes.balance_weight,
    use_cache=False,
    tie_word_embeddings=False,
  )
  return transformers.MixtralForCausalLM._from_config(
    config, attn_implementation='sdpa', experts_implementation=experts
  )


def _facts(model: Any, device: str, tuned: bool) -> dict[str, Any]:
  import torch

  cuda = device == 'cuda'
  peak = torch.cuda.max_memory_allocated() if cuda else None
  return {
    'parameters': sum(p.numel() for p in model.parameters()),
    'dtype': 'bfloat16' if cuda else 'float32',
    'program_peak_bytes': peak,
    'tuned_allocator': tuned,
    'versions': {
      name: importlib.metadata.version(name)
      for name in ('torch', 'transformers')
    },
  }


if __name__ == '__main__':
  main(*sys.argv[1:])
