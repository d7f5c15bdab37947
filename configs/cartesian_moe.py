"""CartesianMoE (Su et al., NAACL 2025, arXiv 2410.16077).

  moe_jax train --config=cartesian_moe:large --workdir=DIR
  moe_jax train --config=cartesian_moe:base,dense --workdir=DIR

MoE stands in every second layer, from the first. A preset without a variant is
the paper's method: two sub-layers of 16 half-width experts, top-2 in each, and
a shared expert in each. A row below is `cartesian_moe:` and `base`
or `large` with its variant; published are the perplexity on Pile's validation
split after 100B tokens and millions of parameters, total / active, which these
sizes reproduce (sizes without an active count are ours, made to be equal):

  variant          base perplexity, size    large perplexity, size
  ,dense           8.55  162.4              6.95   468.2
  ,smoe_share      7.37  842.0 / 247.4      6.13  2884.4 / 770.5
  ,smoe_top3       7.40  842.0              6.18  2884.4
  ,hash            7.47  (no router)        6.28  (no router)
  ,fine_grained    7.33  842.0 / 247.5      6.16  2884.6 / 770.7
  ,top_p           7.41  842.0              6.14  2884.4
  (none)           7.19  842.0 / 247.5      6.08  2884.6 / 770.7
  ,no_shared       -     799.6 / 205.0      6.15  2733.6 / 619.6

After 400B tokens: large 5.69, large,fine_grained 5.78; 7b 4.92 and
7b,fine_grained 4.99.

Routing robustness (Table 4), large with each token's best expert disabled in
every (sub-)layer: `,smoe_share` 7568.85, `,smoe_top3` 847.46, `,fine_grained`
3095.44, `,top_p` 84.42, (none) 27.72:

  moe_jax eval --workdir=DIR --config.eval.disable_top=1

Ours, not the paper's:
  three_factors   three sub-layers of third-width experts, equal parameters
  recurrent       RMoE's router, its state handed from sub-layer to sub-layer

With `large` three_factors makes the experts 4104 wide instead of 4096, 0.2 %
more: 4096 is not divisible by three.

The paper gives sizes only. Left at the defaults of the schema: the
optimizer and its schedule, the batch, the sequence length, the number of steps
and the weight of the balance loss. Its corpus, Pile, and the LLaMA tokenizer
are selected with --config.data.name and --config.data.tokenizer, its
tokenizer.model; the vocabulary has the paper's 32,000 entries whatever they
are, and a tokenizer of more is refused.
"""

from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import presets


def get_config(names: str = '') -> ConfigDict:
  """Returns the config; `names` are a preset and presets."""
  return presets.build(names, config_lib.get_config(), PRESETS, VARIANTS)


def base_size(config: ConfigDict) -> None:
  """12 layers of width 768."""
  _sizes(config, num_layers=12, hidden_size=768, num_heads=12, ffn_width=3072)


def large_size(config: ConfigDict) -> None:
  """24 layers of width 1024."""
  _sizes(config, num_layers=24, hidden_size=1024, num_heads=16, ffn_width=4096)


def seven_b(config: ConfigDict) -> None:
  """7.25B parameters, 1.61B active; nothing else is published, sizes are ours.

  With f the parameters of one expert in all layers and r those outside experts,
  r + 17 f = 7.25B and r + 3 f = 1.61B (16 experts and a shared one; two and the
  shared one). So f = 403M and r = 401M: dense layers as wide as the experts,
  as in the other presets, would take all of r and leave attention and the
  embeddings nothing. Here experts are wider than dense layers: 32 layers of
  width 1024, dense ones of 4096 and experts of 8192, come to 7.25B and
  1.61B as printed.
  """
  _sizes(config, num_layers=32, hidden_size=1024, num_heads=16, ffn_width=4096)
  config.moe.expert_width = 8192
  config.moe.shared.width = 8192


def _sizes(
  config: ConfigDict,
  num_layers: int,
  hidden_size: int,
  num_heads: int,
  ffn_width: int,
) -> None:
  """Sets what the presets share, and the sizes in which they differ."""
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


def smoe_top3(config: ConfigDict) -> None:
  """Three experts instead of two and a shared one, 17/16 as wide.

  So 16 experts have the parameters of 17. Dense layers keep their width, which
  the released code could not say: it has one intermediate_size for both. So
  `moe_jax convert export` refuses this variant where there are dense layers.
  """
  config.moe.factors = 1
  config.moe.top_k = 3
  config.moe.expert_width = config.moe.expert_width * 17 // 16
  config.moe.shared.width = 0


def fine_grained(config: ConfigDict) -> None:
  """Twice as many experts of half the width, twice as many chosen.

  The shared expert is the mean of two of half the width.
  """
  config.moe.factors = 1
  config.moe.num_experts *= 2
  config.moe.top_k *= 2
  config.moe.expert_width //= 2
  config.moe.shared.parts = 2


def three_factors(config: ConfigDict) -> None:
  """A x B x C, each as wide as a multiple of 8 allows."""
  config.moe.factors = 3
  for widths, key in (
    (config.moe, 'expert_width'),
    (config.moe.shared, 'width'),
  ):
    widths[key] = 24 * round(widths[key] / 24)


PRESETS = {'base': base_size, 'large': large_size, '7b': seven_b}
VARIANTS = {
  'dense': presets.sets({'moe.num_experts': 0}),
  'smoe_share': presets.sets({'moe.factors': 1}),
  'smoe_top3': smoe_top3,
  # A fixed random table says which two experts a token of the vocabulary has.
  'hash': presets.sets({'moe.factors': 1, 'router.score': 'hash'}),
  'fine_grained': fine_grained,
  # The weights are the kept probabilities as they are.
  'top_p': presets.sets(
    {
      'moe.factors': 1,
      'moe.renormalize': False,
      'router.selection': 'top_p',
      'router.top_p': 0.4,
    }
  ),
  'no_shared': presets.sets({'moe.shared.width': 0}),
  'three_factors': three_factors,
  'recurrent': presets.sets({'router.recurrent': 'gru'}),
}
