"""RMoE: Layerwise Recurrent Router (Qiu et al., ICLR 2025, arXiv 2408.06793).

  moe_jax train --config=rmoe:PRESET[,VARIANT,...] --workdir=DIR

Presets, each the paper's own method: one GRU of state size 128 for all layers
  enwik8_small, enwik8_medium, wikitext103_medium   16 experts, top-2
  pretrain_0.9b   Llama-style pre-training: 24 layers of 16 experts, top-4
  pretrain_15b    15B parameters, 2.7B active; sizes are ours, see there
  sft             Alpaca on pretrain_0.9b: give train.init_from and data.path

Variants are carried out in order, the later one wins: `xmoe8` is XMoE with 8
dimensions and no recurrence; `xmoe8,xmoe_gru` puts the recurrence back, so it
is XMoE(8) on the GRU's state; `np,r0.5,detach_r` are three changes at once.

Published results, Table 1 of the paper. A row is `rmoe:` and what its
first column says after `enwik8_medium` or `wikitext103_medium`; the
numbers are validation / test, and millions of parameters of enwik8_medium:

                enwik8 (bits/char.)  WikiText-103 (perplexity)  parameters
  ,smoe           1.152 / 1.128        31.279 / 33.061          36.08
  ,hyper          1.162 / 1.139        31.918 / 33.374          48.41
  ,smoe_mlp       1.164 / 1.137        31.430 / 33.142          36.79
  ,random         1.163 / 1.135        31.938 / 33.410          36.08
  ,cosine         1.148 / 1.122        31.367 / 33.047          36.08
  ,xmoe           1.150 / 1.125        31.265 / 32.926          36.13
  (none)          1.141 / 1.116        30.939 / 32.867          36.51

Ablations, after `enwik8_medium`:
  ,np             1.150 / 1.123        ,s_proj   1.148 / 1.123  36.23
  ,detach         1.159 / 1.133        ,rnn      1.145 / 1.119  36.44
  ,np,r0.5        1.149 / 1.124        ,lstm     1.148 / 1.122  36.54
  ,np,r1.0        1.150 / 1.124        (detach_r: gradient of r-a stopped)
  further: p256, p512; xmoe_gru, xmoe8,xmoe_gru and xmoe32,xmoe_gru; for `sft`
  freeze_router and freeze_router_and_cell.

enwik8_small has 15.32 (smoe), 15.61 (none) and 15.73 (smoe_mlp) million.
RMoE costs 1.3 % more time and 3.2 % more memory than SMoE in enwik8_medium,
0.4 % and 1.4 % in pretrain_0.9b.

`moe_jax plan` counts these sizes to every digit, with the 205 symbols
of the enwik8 tokenizer (204 and <eos>). The published counts are called
non-embedding but hold the embeddings. They also hold parameters that the
released code makes and never reads, `model.idle_parameters`: see `_idle`.

Settings of the three small models that the paper leaves to the code it is
built on (CompeteSMoE): 8 heads, blocks of 512, two micro-batches, Adam as
PyTorch has it, a constant learning rate after the warm-up, no clipping, no
weight decay, float32. Where we differ from that code: it draws linear layers
from +-1/sqrt(inputs), embeddings and position keys from a normal distribution
of standard deviation 1 and experts, by an accident of their shape, from
+-1/inputs; here one `model.init_std` serves all matrices, that of linear layers
that read a hidden state, and `router.gate_std` gates that read a recurrent one.
In it the balance loss of the plain gate is switched off unless the gate is told
otherwise; we follow the paper, which has weight 0.01.

pretrain_0.9b: the paper's sizes come to 822M parameters without embeddings and
1069M in all, where it says 664M and 910M. The experts, the projectors, the GRU
and the routers alone come to 665M, and with the two embeddings to 912M: the
published counts look as if they left attention out. Not given and left at the
defaults of the schema: `train.steps` (shorter than the warm-up: set it,
and the learning rate decays until then), epsilons and the number of key/value
heads (all 20). The paper's corpus is not public: `data.name` stays what it was,
so give your own with --config.data.name, and a tokenizer of at most 96,512
tokens.
"""

from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import presets, schema


def get_config(names: str = '') -> ConfigDict:
  """Returns the config; `names` are a preset and presets."""
  config = presets.build(names, config_lib.get_config(), PRESETS, VARIANTS)
  # Of these scores alone does the code of the small models have a bias.
  biased = config.router.score in ('linear', 'mlp', 'hyper')
  config.router.bias = config.router.bias and biased
  if config.router.recurrent != 'none' and not config.router.gate_std:
    config.router.gate_std = _gate_std(config)
  config.model.idle_parameters = _idle(config)
  return config


def enwik8_small(config: ConfigDict) -> None:
  """6 layers of width 264; 15.61M parameters."""
  _span_decoder(config, layers=6, hidden_size=264, span=2048)
  _recipe(config, 'enwik8', warmup=3000, steps=60_000)


def enwik8_medium(config: ConfigDict) -> None:
  """8 layers of width 352; 36.51M parameters."""
  _span_decoder(config, layers=8, hidden_size=352, span=2048)
  _recipe(config, 'enwik8', warmup=4000, steps=80_000)


def wikitext103_medium(config: ConfigDict) -> None:
  """6 layers of width 352."""
  _span_decoder(config, layers=6, hidden_size=352, span=1024)
  _recipe(config, 'wikitext103', warmup=4000, steps=80_000)


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


def pretrain_15b(config: ConfigDict) -> None:
  """15B parameters, 2.7B active: fine-grained and shared experts.

  Published are these two numbers, that the model follows DeepSeekMoE
  (arXiv 2401.06066) and a capacity factor of 1. The sizes are ours: those of
  DeepSeekMoE 16B with routed experts of width 1280 instead of 1408, the
  vocabulary and the recipe of pretrain_0.9b; 15.0B / 2.7B. As there, the first
  layer is dense, 6 of 64 experts are chosen, two more (of 1408) are shared and
  the weights are the probabilities themselves.
  """
  pretrain(config)
  config.model.num_layers = 28
  config.model.hidden_size = 2048
  config.model.num_heads = 16
  config.model.num_kv_heads = 16
  config.model.ffn_width = 10_944
  config.moe.first_dense = 1
  config.moe.num_experts = 64
  config.moe.top_k = 6
  config.moe.expert_width = 1280
  config.moe.shared.width = 2 * 1408
  config.moe.renormalize = False
  config.moe.dispatch = 'capacity'
  config.moe.capacity_factor = 1.0


def sft(config: ConfigDict) -> None:
  """Fine-tuning on Alpaca's 52,002 examples: 3 epochs in batches of 128.

  Give the model that it starts on, --config.train.init_from=WORKDIR, and the
  examples, --config.data.path=alpaca_data.json; without both it does not train.
  The loss is on the responses. Nine in ten examples are in the split `train`;
  --config.data.train_split=all takes all of them.

  1218 steps are these epochs with one example in a row. Here examples are
  packed into rows of `data.seq_len` tokens, of which there are fewer: a run
  prints its epochs, and train.steps sets them. The length is Alpaca's own
  recipe's; the paper gives none.
  """
  pretrain(config)
  config.model.dtype = 'bfloat16'
  config.optimizer.learning_rate = 2e-5
  config.optimizer.final_fraction = 0.0
  config.optimizer.warmup_steps = 37  # 3 % of the steps
  config.optimizer.weight_decay = 0.0
  config.train.batch_size = 128
  config.train.steps = 1218
  config.train.init_from = schema.REQUIRED
  config.data.name = 'files'
  config.data.path = schema.REQUIRED
  config.data.format = 'alpaca'
  config.data.order = 'packed'
  config.data.seq_len = 512


def _span_decoder(
  config: ConfigDict, layers: int, hidden_size: int, span: int
) -> None:
  """Sets the decoder of the CompeteSMoE code base."""
  config.model.num_layers = layers
  config.model.hidden_size = hidden_size
  config.model.num_heads = 8
  config.model.num_kv_heads = 8
  config.model.ffn_width = hidden_size
  config.model.norm = 'layer'
  config.model.norm_place = 'post'
  config.model.norm_epsilon = 1e-5
  config.model.positions = 'span'
  config.model.span = span
  config.model.activation = 'relu'
  config.model.dropout = 0.1
  config.model.head_bias = True
  # Uniform within +-1/sqrt(h) has the standard deviation 1/sqrt(3 h).
  config.model.init_std = (3 * hidden_size) ** -0.5
  config.model.dtype = 'float32'

  config.moe.num_experts = 16
  config.moe.top_k = 2
  config.moe.expert_width = hidden_size
  config.router.bias = True
  config.router.weights = 'chosen'
  config.router.recurrent = 'gru'
  config.router.state_size = 128
  # 0.01 of N sum_n c_n/(T K) p_n/(T K), with c_n assignments and summed
  # probabilities p_n: the code divides both by the number of assignments. Our
  # loss, N sum_n c_n/T p_n/T, is K^2 times that.
  config.loss.balance_weight = 0.01 / config.moe.top_k**2


# The tokenizer of a text, and its ids: bytes, of which 204 occur beside the
# newline, which is <eos>; words. Bits per byte are bits per character.
_TEXTS = {'enwik8': ('enwik8', 205), 'wikitext103': ('words', 267_735)}


def _recipe(config: ConfigDict, text: str, warmup: int, steps: int) -> None:
  """Sets how that code base trains and evaluates."""
  config.data.name = text
  config.data.tokenizer, config.model.vocab_size = _TEXTS[text]
  config.optimizer.warmup_steps = warmup
  config.train.steps = steps
  config.optimizer.learning_rate = 7e-4
  config.optimizer.final_fraction = 1.0
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.epsilon = 1e-8
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip_norm = 0.0
  config.train.batch_size = 48
  config.train.accumulation = 2
  config.data.seq_len = 512
  config.data.order = 'contiguous'

  config.checkpoint.every = 1000
  config.eval.every = 1000
  config.eval.batches = 100
  config.eval.batch_size = 8


def _gate_std(config: ConfigDict) -> float:
  """Returns what the papers' gates on a recurrent state start with."""
  if config.model.positions != 'span':
    return config.model.init_std
  return (3 * config.router.state_size) ** -0.5  # a linear layer's, as above


def _idle(config: ConfigDict) -> int:
  """Returns the parameters per layer that the small models never read.

  Every block has one LayerNorm more than it applies, 2 h parameters. XMoE's
  and HyperMoE's gates inherit a linear one, h N + N, which they leave alone.
  XMoE's published 36.13M hold some 2,000 more, which fit a second set of expert
  embeddings, 16 N a layer; that one is inferred from the digits, the others
  are read from the code. No count of XMoE on a GRU is published.
  """
  if config.model.positions != 'span':
    return 0
  hidden_size, num_experts = config.model.hidden_size, config.moe.num_experts
  idle = 2 * hidden_size
  if config.router.recurrent == 'none':
    if config.router.score in ('xmoe', 'hyper'):
      idle += hidden_size * num_experts + num_experts
    if config.router.score == 'xmoe':
      idle += config.router.reduced_size * num_experts
  return idle


def detach_residual(config: ConfigDict) -> None:
  """detach-r: no gradient through what r-a adds, which is r-0.5 if none is."""
  config.router.residual = config.router.residual or 0.5
  config.router.residual_detached = True


def _router(score: str, **values: int) -> presets.Change:
  """Returns a router of the paper's Table 1: that gate, without recurrence."""
  return presets.sets(
    {'router.score': score, 'router.recurrent': 'none'}
    | {f'router.{name}': value for name, value in values.items()}
  )


PRESETS = {
  'pretrain_0.9b': pretrain,
  'enwik8_small': enwik8_small,
  'enwik8_medium': enwik8_medium,
  'wikitext103_medium': wikitext103_medium,
  'pretrain_15b': pretrain_15b,
  'sft': sft,
}
VARIANTS = {
  'smoe': _router('linear'),
  'smoe_mlp': _router('mlp', mlp_width=256),
  'random': _router('random'),
  'cosine': _router('cosine'),
  'xmoe': _router('xmoe', reduced_size=16),
  'xmoe8': _router('xmoe', reduced_size=8),
  'xmoe32': _router('xmoe', reduced_size=32),
  'hyper': _router('hyper', mlp_width=256),
  # On the GRU's state, in as many dimensions as were set.
  'xmoe_gru': presets.sets({'router.score': 'xmoe', 'router.recurrent': 'gru'}),
  # Ablations of the recurrent router.
  'np': presets.sets({'router.passing': 'none'}),
  'detach': presets.sets({'router.passing': 'detached'}),
  'r0.5': presets.sets({'router.residual': 0.5}),
  'r1.0': presets.sets({'router.residual': 1.0}),
  'detach_r': detach_residual,
  's_proj': presets.sets({'router.projector': 'shared'}),
  'rnn': presets.sets({'router.recurrent': 'rnn'}),
  'lstm': presets.sets({'router.recurrent': 'lstm'}),
  'p256': presets.sets({'router.state_size': 256}),
  'p512': presets.sets({'router.state_size': 512}),
  # Fine-tuning.
  'freeze_router': presets.sets({'optimizer.freeze': 'router'}),
  'freeze_router_and_cell': presets.sets(
    {'optimizer.freeze': 'router_and_cell'}
  ),
}
