"""RMoE: Layerwise Recurrent Router (Qiu et al., ICLR 2025, arXiv 2408.06793).

  python train.py --config=configs/rmoe.py:pretrain_0.9b --workdir=DIR

Presets
  pretrain_0.9b  the Llama-style pre-training setting: 24 layers of 16 experts,
                 top-4, one GRU of state size 128 shared by all of them.

Variants
  smoe           the baseline: a linear router, all else equal.

Published for this setting: RMoE costs 0.4 % more time and 1.4 % more memory
than SMoE, and has 664M parameters without embeddings, 910M in all.

Where the paper contradicts itself: its sizes come to 822M parameters without
embeddings and 1069M in all. The experts, the projectors, the GRU and the
routers alone come to 665M, and with the two embeddings to 912M: the published
counts look as if they left attention out.

Not given and left at the defaults of `configs/base.py`: `train.steps` (shorter
than the warm-up: set it, and the learning rate decays until then), epsilons and
the number of key/value heads (all 20). The paper's corpus is not public:
`data.name` stays what it was, so give your own with --config.data.name, and a
tokenizer of at most 96,512 tokens.
"""

from ml_collections import ConfigDict

from configs import base, variants


def get_config(names: str = '') -> ConfigDict:
  """Returns the config; `names` are a preset and variants."""
  return variants.build(names, base.get_config(), PRESETS, VARIANTS)


def pretrain(config: ConfigDict) -> None:
  """Llama-style pre-training, the sizes as the paper gives them."""
  config.model.num_layers = 24
  config.model.hidden_size = 1280
  config.model.num_heads = 20
  config.model.num_kv_heads = 20
  config.model.vocab_size = 96_512
  config.model.init_std = 0.02

  config.moe.num_experts = 16
  config.moe.top_k = 4
  config.moe.expert_width = 448
  config.router.recurrent = 'gru'
  config.router.state_size = 128
  config.loss.balance_weight = 0.01

  config.optimizer.learning_rate = 4.2e-4
  config.optimizer.final_fraction = 0.1  # down to 4.2e-5
  config.optimizer.warmup_steps = 2000
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip_norm = 1.0
  config.train.batch_size = 1120
  config.data.seq_len = 4096


def smoe(config: ConfigDict) -> None:
  """A linear router without memory."""
  config.router.recurrent = 'none'


PRESETS = {'pretrain_0.9b': pretrain}
VARIANTS = {'smoe': smoe}
