"""CartesianMoE (Su et al., NAACL 2025, arXiv 2410.16077).

  python train.py --config=configs/cartesian_moe.py:large --workdir=DIR
  python train.py --config=configs/cartesian_moe.py:base,dense --workdir=DIR

MoE stands in every second layer, from the first. A preset without a variant is
the paper's method: two sub-layers of 16 half-width experts, top-2 in each, and
a shared expert in each. Published: perplexity on Pile's validation split after
100B tokens, and millions of parameters, total / active, which these sizes
reproduce (without the recurrent and three-factor variants, which are ours).

  variant         base perplexity, size    large perplexity, size
  (none)          7.19  842.0 / 247.5      6.08  2884.6 / 770.7
  dense           8.55  162.4              6.95  468.2
  smoe_share      7.37  842.0 / 247.4      6.13  2884.4 / 770.5
  no_shared       -     799.6 / 205.0      6.15  2733.6 / 619.6
  three_factors   three sub-layers of third-width experts, equal parameters
  recurrent       RMoE's router, its state handed from sub-layer to sub-layer

With `large` three_factors makes the experts 4104 wide instead of 4096, 0.2 %
more: 4096 is not divisible by three.

The paper gives sizes only. Left at the defaults of `configs/base.py`: the
optimizer and its schedule, the batch, the sequence length, the number of steps
and the weight of the balance loss. Its corpus, Pile, and the LLaMA tokenizer
are selected with --config.data.name and --config.data.tokenizer; the vocabulary
has the paper's 32,000 entries whatever they are.
"""

from ml_collections import ConfigDict

from configs import base, variants


def get_config(names: str = '') -> ConfigDict:
  """Returns the config; `names` are a preset and variants."""
  return variants.build(names, base.get_config(), PRESETS, VARIANTS)


def base_size(config: ConfigDict) -> None:
  """12 layers of width 768."""
  _sizes(config, num_layers=12, hidden_size=768, num_heads=12, ffn_width=3072)


def large_size(config: ConfigDict) -> None:
  """24 layers of width 1024."""
  _sizes(config, num_layers=24, hidden_size=1024, num_heads=16, ffn_width=4096)


def _sizes(
  config: ConfigDict,
  num_layers: int,
  hidden_size: int,
  num_heads: int,
  ffn_width: int,
) -> None:
  """What the presets share, with what they do not."""
  config.model.num_layers = num_layers
  config.model.hidden_size = hidden_size
  config.model.num_heads = num_heads
  config.model.num_kv_heads = num_heads
  config.model.ffn_width = ffn_width
  config.model.vocab_size = 32_000

  config.moe.every = 2
  config.moe.num_experts = 16
  config.moe.top_k = 2
  config.moe.factors = 2
  config.moe.expert_width = ffn_width
  config.moe.shared.width = ffn_width
  config.moe.shared.mixing = 'coefficient'


def dense(config: ConfigDict) -> None:
  """No experts: every layer as the dense ones are."""
  config.moe.num_experts = 0


def smoe_share(config: ConfigDict) -> None:
  """Conventional MoE layers of full-width experts, with a shared one."""
  config.moe.factors = 1


def no_shared(config: ConfigDict) -> None:
  """Without the shared expert."""
  config.moe.shared.width = 0


def three_factors(config: ConfigDict) -> None:
  """A x B x C, each as wide as a multiple of 8 allows."""
  config.moe.factors = 3
  for widths, key in (
    (config.moe, 'expert_width'),
    (config.moe.shared, 'width'),
  ):
    widths[key] = 24 * round(widths[key] / 24)


def recurrent(config: ConfigDict) -> None:
  """RMoE's router in the Cartesian layer."""
  config.router.recurrent = 'gru'


PRESETS = {'base': base_size, 'large': large_size}
VARIANTS = {
  'dense': dense,
  'smoe_share': smoe_share,
  'no_shared': no_shared,
  'three_factors': three_factors,
  'recurrent': recurrent,
}
