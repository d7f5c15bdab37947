"""Every key of a run: its default, its meaning, its choices and its bounds.

This file is the schema: what may change on resume, what a model's function
depends on, the help of the programs and `docs/configs.md` follow from it.
Presets start from `get_config()` and change values; they never add a key. An
`every` of 0 switches that thing off. A key that an older run does not have
means its default, so a new key's default does what was done without it.

Conflicts between keys are the business of `moe_jax.config.checks`.
"""

from ml_collections import ConfigDict

from moe_jax import files
from moe_jax.config.keys import Key
from moe_jax.registry import (
  ATTENTIONS,
  CELLS,
  DISPATCHES,
  EVALUATIONS,
  EXCHANGES,
  GATES,
  GROUPED_MATMULS,
  OPTIMIZERS,
  SCHEDULES,
  SELECTIONS,
  TRACKERS,
)

# The path of a preset that its user has to say.
REQUIRED = files.REQUIRED

# Of a batch: each process lists those that it holds.
_MOST_SEQUENCES = 2**20

# What the sections are about; `Key`s without a section come first.
SECTIONS = {
  'mesh': 'Devices along each axis; one axis may be -1, which is what is left.',
  'mesh.dcn': (
    'Slices (of TPUs, or hosts of GPUs that a slower network joins) along each'
    ' axis; one axis may be -1, which is what is left.'
  ),
  'model': 'The decoder around its feed-forward networks.',
  'moe': 'The layers with experts.',
  'moe.shared': 'Experts that every token goes to.',
  'router': 'How tokens choose experts.',
  'loss': 'What is added to the cross entropy, and how experts are balanced.',
  'optimizer': 'The update, and the learning rate over the steps.',
  'train': 'The training loop.',
  'data': 'What is read, and in which order.',
  'checkpoint': 'When the state is saved, and what is kept.',
  'recovery': (
    'What a run does about steps that are not finite, which change nothing, and'
    ' about spikes of the loss.'
  ),
  'eval': 'Evaluation, during training and after it.',
}


def _axis(default: int, meaning: str) -> Key:
  """Returns a key of a mesh axis; `derived.fill` checks its value."""
  return Key(default, meaning, low=-1, resume=True)


KEYS = {
  'seed': Key(
    0,
    'The seed that parameters and the order of data follow from.',
    high=2**32 - 1,  # the data pipeline's generator takes 32 bits
  ),
  'mesh.data': _axis(-1, 'The batch is split, parameters are repeated.'),
  'mesh.fsdp': _axis(1, 'The batch is split, and so are parameters.'),
  'mesh.expert': _axis(1, 'The batch is split, and so are experts.'),
  'mesh.context': _axis(
    1, 'The positions of sequences are split, parameters are repeated.'
  ),
  'mesh.tensor': _axis(1, 'Heads and feed-forward widths are split.'),
  'mesh.dcn.data': _axis(-1, 'Slices along `mesh.data`.'),
  'mesh.dcn.fsdp': _axis(1, 'Slices along `mesh.fsdp`.'),
  'mesh.dcn.expert': _axis(1, 'Slices along `mesh.expert`.'),
  'mesh.dcn.context': _axis(1, 'Slices along `mesh.context`.'),
  'mesh.dcn.tensor': _axis(1, 'Slices along `mesh.tensor`.'),
  'model.num_layers': Key(
    4, 'The number of layers.', low=1, high=10_000, function=True
  ),
  'model.hidden_size': Key(
    256, 'The width of the hidden states.', low=1, function=True
  ),
  'model.num_heads': Key(
    4, 'The number of attention heads.', low=1, function=True
  ),
  'model.num_kv_heads': Key(
    4,
    'The number of heads of keys and values; fewer than `model.num_heads` is'
    ' grouped-query attention.',
    low=1,
    function=True,
  ),
  'model.head_dim': Key(
    0,
    'The size of a head; 0 is `model.hidden_size` / `model.num_heads`.',
    function=True,
  ),
  'model.ffn_width': Key(
    1024, 'The width of the dense layers.', low=1, function=True
  ),
  'model.vocab_size': Key(
    0, "The number of token ids; 0 takes the tokenizer's.", function=True
  ),
  'model.vocab_multiple': Key(
    1,
    'Embedding and head have as many rows more than there are token ids as make'
    ' a multiple of this, so that `mesh.tensor` divides them; these ids are'
    ' never predicted.',
    low=1,
    high=2**20,
    function=True,
  ),
  'model.rope_theta': Key(
    10_000.0,
    'The base of rotary positions.',
    above=0,
    function=True,
    only='model.positions = rotary',
  ),
  'model.norm': Key(
    'rms',
    'RMSNorm, or LayerNorm with biases.',
    ('rms', 'layer'),
    function=True,
  ),
  'model.norm_place': Key(
    'pre',
    'x + f(norm(x)) and a final norm (pre), or norm(x + f(x)) (post).',
    ('pre', 'post'),
    function=True,
  ),
  'model.norm_epsilon': Key(
    1e-6, 'What is added to the variance in norms.', above=0, function=True
  ),
  'model.positions': Key(
    'rotary',
    'Rotary positions, or attention to a span of tokens with learned relative'
    ' keys.',
    ('rotary', 'span'),
    function=True,
  ),
  'model.attention': Key(
    'auto',
    'How attention is computed.',
    ('auto', ATTENTIONS),
    resume=True,
    only='model.positions = rotary',
  ),
  'model.span': Key(
    0,
    'The tokens that a token sees before it.',
    function=True,
    only='model.positions = span',
  ),
  'model.activation': Key(
    'swiglu',
    'SwiGLU, or a ReLU network with biases, in dense layers and experts.',
    ('swiglu', 'relu'),
    function=True,
  ),
  'model.dropout': Key(
    0.0,
    'The share of attention weights, hidden units and MoE outputs that training'
    ' sets to 0.',
    below=1,
  ),
  'model.head_bias': Key(
    False, 'Whether the output head has a bias.', function=True
  ),
  'model.tie_embeddings': Key(
    False, 'Whether the output head is the input embedding.', function=True
  ),
  'model.init_std': Key(
    0.02, 'The standard deviation that weight matrices start with.', above=0
  ),
  'model.residual_std': Key(
    0.0,
    'The standard deviation that the last weight matrices of attention, dense'
    ' layers and experts start with, whose products are added to the residual'
    ' stream; 0 is `model.init_std`, and GPT-2 has'
    ' `init_std / sqrt(2 num_layers)`.',
  ),
  'model.dtype': Key(
    'auto',
    'The type of the arithmetic; auto is float32 on CPUs, else bfloat16.',
    ('auto', 'float32', 'bfloat16'),
  ),
  'model.remat': Key(
    'none',
    'What the backward pass computes again: nothing, all but matrix products'
    ' (dots), or everything inside a layer (full).',
    ('none', 'dots', 'full'),
    resume=True,
  ),
  'model.unroll': Key(
    0,
    'The periods of layers unrolled in a step of the scan over them; 0 is what'
    ' suits the platform: all of up to 24 on GPUs, otherwise 1.',
    low=0,
    high=10_000,
    resume=True,
  ),
  'model.idle_parameters': Key(
    0,
    'Parameters per layer that are never built: what a published size counts'
    ' and nobody reads.',
    high=2**62,
  ),
  'moe.num_experts': Key(
    8, 'Experts per sub-layer; 0 is a dense model.', high=2**20, function=True
  ),
  'moe.factors': Key(
    1,
    'Sub-layers per MoE layer: 1 is conventional, 2 the Cartesian product, 3'
    ' goes one further.',
    low=1,
    high=64,
    function=True,
  ),
  'moe.top_k': Key(
    2,
    'Experts that a token chooses.',
    low=1,
    function=True,
    only='router.selection = top_k',
  ),
  'moe.expert_width': Key(
    512,
    'The width of a whole expert; factors share it equally.',
    low=1,
    function=True,
  ),
  'moe.every': Key(1, 'Every n-th layer is MoE ...', low=1, function=True),
  'moe.offset': Key(0, '... counted from this layer ...', function=True),
  'moe.first_dense': Key(
    0, '... but these first layers are dense all the same.', function=True
  ),
  'moe.renormalize': Key(
    True,
    'Whether the weights of the chosen experts sum to 1, if they are several.',
    function=True,
  ),
  'moe.dispatch': Key(
    'dropless',
    'Every token reaches its experts (dropless), or experts have room for so'
    ' many (capacity).',
    (DISPATCHES,),
  ),
  'moe.capacity_factor': Key(
    1.25,
    'The room of an expert over the balanced share.',
    above=0,
    only='moe.dispatch = capacity',
  ),
  'moe.priority': Key(
    'position',
    'Who is kept, earlier tokens or those of a larger weight.',
    ('position', 'probability'),
    only='moe.dispatch = capacity',
  ),
  'moe.grouped_matmul': Key(
    'auto',
    'How experts are computed.',
    ('auto', GROUPED_MATMULS),
    resume=True,
    only='moe.dispatch = dropless',
  ),
  'moe.quantization': Key(
    '',
    "The type in which experts' rows are multiplied by weights, forward and for"
    " the rows' gradient, each row and each column of weights scaled by its"
    " largest magnitude; '' is `model.dtype`. int8 is for TPUs v5e, v5p and v6e"
    ' and for GPUs, fp8 (e4m3) for GPUs from capability 8.9 and TPU7x.',
    ('int8', 'fp8'),
    resume=True,
    only='moe.dispatch = dropless',
  ),
  'moe.exchange': Key(
    'auto',
    'How tokens travel along `mesh.expert`; auto is what sends the fewest'
    ' bytes.',
    ('auto', EXCHANGES),
    resume=True,
  ),
  'moe.buffer_factor': Key(
    2.0,
    'The exchanges all_to_all and ragged: the room over the balanced share;'
    ' what finds none is counted and takes a slower way.',
    above=0,
    resume=True,
    only='moe.dispatch = dropless',
  ),
  'moe.bias': Key(
    False,
    'Whether a learned vector is added to the routed output.',
    function=True,
  ),
  'moe.shared.width': Key(
    0,
    'The width of the shared expert, which factors share equally; 0 is none.',
    function=True,
  ),
  'moe.shared.parts': Key(
    1,
    'The parts of the shared expert, whose mean is its output.',
    low=1,
    high=1024,
    function=True,
    only='moe.shared.width != 0',
  ),
  'moe.shared.mixing': Key(
    'sum',
    "How it is added to the routed experts' output: with weight 1, with fixed"
    ' weights, or with a learned coefficient per token.',
    ('sum', 'fixed', 'coefficient'),
    function=True,
    only='moe.shared.width != 0',
  ),
  'moe.shared.routed_weight': Key(
    0.5,
    'The weight of the routed experts.',
    function=True,
    only='moe.shared.mixing = fixed',
  ),
  'moe.shared.shared_weight': Key(
    0.5,
    'The weight of the shared expert.',
    function=True,
    only='moe.shared.mixing = fixed',
  ),
  'router.score': Key(
    'linear',
    'The gate, which gives the logits of the experts.',
    (GATES,),
    function=True,
  ),
  'router.bias': Key(
    False,
    'Whether the gate has a bias.',
    function=True,
    only='router.score = linear, mlp, hyper',
  ),
  'router.mlp_width': Key(
    256,
    'The width of the hidden layer of the gate.',
    low=1,
    function=True,
    only='router.score = mlp, hyper',
  ),
  'router.reduced_size': Key(
    16,
    'The dimensions that the gate compares in.',
    low=1,
    function=True,
    only='router.score = xmoe',
  ),
  'router.recurrent': Key(
    'none',
    'The recurrent cell that all layers share.',
    (CELLS,),
    function=True,
    only='router.score != hash',
  ),
  'router.state_size': Key(
    128,
    "The size of the cell's state.",
    low=1,
    function=True,
    only='router.recurrent != none',
  ),
  'router.projector': Key(
    'layerwise',
    "Whether each layer projects its input to the cell's, or one for all does.",
    ('layerwise', 'shared'),
    function=True,
    only='router.recurrent != none',
  ),
  'router.passing': Key(
    'state',
    'What a layer hands to the next: the state, the state without its gradient'
    ' (detached), or nothing.',
    ('state', 'detached', 'none'),
    function=True,
    only='router.recurrent != none',
  ),
  'router.residual': Key(
    0.0, "The weight of the previous MoE layer's logits.", function=True
  ),
  'router.residual_detached': Key(
    False,
    'Whether these come without their gradient.',
    only='router.residual != 0.0',
  ),
  'router.gate_std': Key(
    0.0,
    'The standard deviation that the weights start with by which a gate'
    ' multiplies its features; 0 is `model.init_std`, and for a recurrent'
    ' state, whose entries are smaller, so much more that logits start as far'
    ' apart.',
  ),
  'router.projector_std': Key(
    0.0,
    "The standard deviation that a projector's weights start with; 0 is"
    ' `model.init_std`.',
    only='router.recurrent != none',
  ),
  'router.jitter': Key(
    0.0, "Training multiplies the router's inputs by 1 +- this.", below=1
  ),
  'router.selection': Key(
    'top_k',
    'A token takes the `moe.top_k` best experts, or the best ones until their'
    ' probabilities exceed `router.top_p`.',
    (SELECTIONS,),
    function=True,
  ),
  'router.top_p': Key(
    0.4,
    'The probability to be exceeded.',
    below=1,
    function=True,
    only='router.selection = top_p',
  ),
  'router.weights': Key(
    'softmax',
    'The weights of the chosen experts: a softmax over all, a softmax over the'
    ' chosen, or sigmoids.',
    ('softmax', 'chosen', 'sigmoid'),
    function=True,
  ),
  'router.groups': Key(
    1, 'Experts lie in so many equal groups ...', low=1, function=True
  ),
  'router.top_groups': Key(
    1, '... of which a token may choose from so many.', low=1, function=True
  ),
  'loss.balance_weight': Key(0.01, 'The weight of the balance loss.'),
  'loss.balance_layers': Key(
    'separate',
    'Whether each layer is balanced, or all layers joined.',
    ('separate', 'joined'),
  ),
  'loss.balance_scope': Key(
    'micro_batch',
    'Over which tokens the shares of the experts are to be even.',
    ('micro_batch', 'sequence', 'global_batch'),
  ),
  'loss.bias_rate': Key(
    0.0,
    'How fast a bias on the choice balances the experts; 0 has no such bias.',
  ),
  'loss.z_weight': Key(0.0, 'The weight of the router z-loss.'),
  'optimizer.name': Key('adamw', 'The optimizer.', (OPTIMIZERS,)),
  'optimizer.schedule': Key(
    'cosine',
    'How the learning rate goes on after the warm-up; wsd is warm-up, stable,'
    ' decay.',
    (SCHEDULES,),
  ),
  'optimizer.learning_rate': Key(
    1e-3,
    'The peak of the learning rate.',
    above=0,
    resume=True,  # a lower one goes on from before a run diverged
  ),
  'optimizer.final_fraction': Key(
    0.1, 'The share of the peak at the end of the decay.', high=1
  ),
  'optimizer.stable_fraction': Key(
    0.8,
    'The share of the steps after the warm-up that stay at the peak.',
    high=1,
    only='optimizer.schedule = wsd',
  ),
  'optimizer.warmup_steps': Key(
    50,
    'Steps in which the learning rate rises to its peak.',
    high=2**31 - 2,  # one step at least follows, and is a whole number too
  ),
  'optimizer.decay_steps': Key(
    0, 'The step at which the decay ends; 0 is `train.steps`.'
  ),
  'optimizer.b1': Key(
    0.9, 'AdamW and Lion: the decay of the first moment.', below=1
  ),
  'optimizer.b2': Key(
    0.95, 'AdamW and Lion: the decay of the second moment.', below=1
  ),
  'optimizer.momentum': Key(
    0.95,
    'The decay of the momentum of matrices.',
    below=1,
    only='optimizer.name = muon',
  ),
  'optimizer.epsilon': Key(
    1e-8, 'What is added to the root of the second moment.', above=0
  ),
  'optimizer.weight_decay': Key(
    0.1, 'Weight decay, not of norms, biases and the recurrent cell.'
  ),
  'optimizer.clip_norm': Key(
    1.0, "The most that the gradient's global norm may be; 0 never clips."
  ),
  'optimizer.router_rate': Key(
    1.0,
    'What the learning rate is multiplied by for routers and their cell.',
    above=0,
  ),
  'optimizer.freeze': Key(
    'none',
    'What is not trained.',
    ('none', 'router', 'router_and_cell'),
  ),
  'optimizer.offload': Key(
    False,
    "Whether the optimizer's moments stay in the memory of the hosts between"
    ' updates; not on GPUs.',
    resume=True,
  ),
  'train.steps': Key(1000, 'The number of training steps.', low=1),
  'train.batch_size': Key(
    16,
    'The sequences of a step, over all devices.',
    low=1,
    high=_MOST_SEQUENCES,
  ),
  'train.accumulation': Key(
    1, 'The micro-batches in which a step is computed.', low=1
  ),
  'train.init_from': Key(
    '',
    "The workdir whose newest parameters are the start; '' starts anew.",
    path=True,
  ),
  'train.log_every': Key(10, 'Steps between two logged ones.', resume=True),
  'train.tracker': Key(
    '',
    "Where the numbers go as well: wandb (Weights & Biases), trackio; '' is"
    ' nowhere else. Both stay on this machine unless their own environment'
    ' variables say otherwise.',
    (TRACKERS,),
    resume=True,
  ),
  'train.router_gradients_every': Key(
    0,
    'Steps between two that measure the gradients of the cross entropy and of'
    ' the balance loss in the routers, apart, for about the time of a step'
    ' more; 0 never.',
    resume=True,
  ),
  'train.check_replicas_every': Key(
    0,
    'Steps between two checks that devices hold the same bits where they'
    ' should; a check reads them all.',
    resume=True,
  ),
  'train.profile': Key(
    '',
    "START:STEPS writes a trace of so many steps from that one on; '' none.",
    resume=True,
  ),
  'train.sample_every': Key(
    0, 'Steps between two samples of what the model writes.', resume=True
  ),
  'train.sample_prompt': Key(
    '',
    "The text that samples go on from; '' is the beginning of a document.",
    resume=True,
    only='train.sample_every != 0',
  ),
  'train.sample_tokens': Key(
    64,
    'The tokens of a sample.',
    low=1,
    high=2**20,
    resume=True,
    only='train.sample_every != 0',
  ),
  'train.watchdog': Key(
    1800,
    'The seconds after which stacks are printed if no step, evaluation batch or'
    ' save has ended; 0 never.',
    resume=True,
  ),
  'train.watchdog_exit': Key(
    False,
    'Whether the process then ends, with status 75.',
    resume=True,
  ),
  'data.name': Key(
    'python_stdlib',
    'The data set: python_stdlib, python_docs, text_folder, files, enwik8,'
    ' wikitext103, huggingface:OWNER/NAME, or any text data set of TensorFlow'
    ' Datasets.',
  ),
  'data.dir': Key(
    '',
    "Where data sets are kept; '' is where TensorFlow Datasets keeps them.",
    resume=True,
    path=True,
  ),
  'data.path': Key(
    '',
    'text_folder: the folder whose files are read. files: a file, a folder or'
    ' a pattern, such as texts/*.jsonl.zst. enwik8 and wikitext103: their zip'
    ' file, if it is here already.',
    resume=True,  # a folder may be moved
    path=True,
  ),
  'data.mixture': Key(
    '',
    'Several sources instead of `data.name` and `data.path`: the path of a'
    ' .json file, or what it holds, an object of the name of each and its keys.'
    ' These are name or path, text_key, format and train_split as here, and'
    ' weight or epochs.',
  ),
  'data.temperature': Key(
    1.0,
    'The shares of a mixture are proportional to the weights to the power of'
    ' 1 / temperature: the larger, the more alike.',
    above=0,
  ),
  'data.allow_community': Key(
    False,
    'Whether `data.name` may be `NAMESPACE:NAME`, of which TensorFlow Datasets'
    ' downloads a Python package and runs it. A config.json cannot say it: it'
    " may be a stranger's.",
    resume=True,
  ),
  'data.text_key': Key(
    'text', 'The field, column or feature that holds a document.'
  ),
  'data.format': Key(
    'text',
    'files, huggingface: what a row is: a text; an example of instruction,'
    ' input and output; or a chat of messages. Of the last two only responses'
    ' are predicted.',
    ('text', 'alpaca', 'chat'),
  ),
  'data.train_split': Key('train', 'The split to train on.'),
  'data.tokenizer': Key(
    'bytes',
    'The tokenizer: bytes, enwik8 or words, or the path of a tokenizer.json of'
    ' Hugging Face or of a SentencePiece .model.',
    function=True,
    path=True,
  ),
  'data.seq_len': Key(256, 'The tokens of a sequence.', low=1, high=2**24),
  'data.order': Key(
    'shuffled',
    'Sequences of the stream in a random order, rows of text that are read on'
    ' and on, or rows of whole documents, none of which sees another.',
    ('shuffled', 'contiguous', 'packed'),
  ),
  'data.changed': Key(
    'refuse',
    'Whether a run goes on where its data are others than before.',
    ('refuse', 'allow'),
    resume=True,
  ),
  'data.threads': Key(
    1,
    'The threads that read ahead of the device.',
    low=1,
    high=1024,
    resume=True,
  ),
  'checkpoint.every': Key(
    200, 'Steps between two checkpoints; the last step has one.', resume=True
  ),
  'checkpoint.keep': Key(
    3, 'The newest n checkpoints stay ...', low=1, resume=True
  ),
  'checkpoint.keep_every': Key(
    0, '... and that of every step that is a multiple of n.', resume=True
  ),
  'checkpoint.fallback': Key(
    'auto',
    'Whether a damaged newest checkpoint is set aside and the run goes on from'
    ' the newest sound one. auto: unless a person sees it, who has stdin and'
    ' stdout on a terminal.',
    ('auto', 'on', 'off'),
    resume=True,
  ),
  'recovery.bad_steps': Key(
    5,
    'Steps in a row whose loss or gradient norm is not finite, after which the'
    ' run goes back to its newest checkpoint.',
    low=1,
    resume=True,
  ),
  'recovery.spike': Key(
    0.0,
    'So many robust deviations (1.4826 MAD) above the median of the last losses'
    ' a loss makes the run go back, too; 0 never.',
    resume=True,
  ),
  'recovery.window': Key(
    100,
    'The losses that a spike is measured against.',
    low=2,
    high=10_000,
    resume=True,
  ),
  'recovery.skip_batches': Key(
    100,
    'Going back leaves out the batches since the checkpoint, and so many'
    ' behind the bad one.',
    resume=True,
  ),
  'recovery.rollbacks': Key(
    3, 'How often a run goes back before it stops.', resume=True
  ),
  'eval.every': Key(
    200,
    'Steps between two evaluations; the last step has one. 0 has none but'
    ' those that say `every` themselves.',
    resume=True,
  ),
  'eval.evaluations': Key(
    'perplexity',
    'The evaluations to run, with commas between. One that is to differ has'
    ' options: NAME:every=1000:split=test:batches=8.',
    (EVALUATIONS,),
    several=True,
    resume=True,
  ),
  'eval.tasks': Key(
    '',
    'The tasks of lm-evaluation-harness that the evaluation `tasks` asks for,'
    ' with commas between.',
    resume=True,
  ),
  'eval.include_path': Key(
    '', 'A folder with further tasks.', path=True, resume=True
  ),
  'eval.split': Key('validation', 'The split to evaluate on.', resume=True),
  'eval.batches': Key(
    0,
    'Batches of an evaluation during training; 0 is the whole split.',
    resume=True,
  ),
  'eval.batch_size': Key(
    0,
    'Sequences of a batch; 0 is `train.batch_size`.',
    high=_MOST_SEQUENCES,
    resume=True,
  ),
  'eval.disable_top': Key(
    0,
    "How many of each token's best experts are disabled, in every layer.",
    resume=True,
  ),
  'eval.robustness': Key(
    '1',
    'The same for the evaluation `robustness`, which disables in turn each'
    ' number that is named here, with commas between: 1,2.',
    resume=True,
  ),
}


def get_config() -> ConfigDict:
  """Returns every key at its default, locked: a small MoE on python_stdlib."""
  config = ConfigDict()
  for name, key in KEYS.items():
    *sections, last = name.split('.')
    part = config
    for section in sections:
      if section not in part:
        part[section] = ConfigDict()
      part = part[section]
    part[last] = key.default
  return config.lock()
