"""Every key of a run, its default and its meaning: this file is the schema.

Presets start from `get_config()` and change values; they never add a key. An
`every` of 0 switches that thing off. Conflicts between keys are refused by
`moe_jax.config.validate` before anything is built.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the defaults: a small conventional MoE on `python_stdlib`."""
  config = ConfigDict()
  config.seed = 0  # parameters and data order follow from it

  # Devices along each axis; one axis may be -1: whatever is left.
  config.mesh = ConfigDict()
  config.mesh.data = -1  # batch split, parameters repeated
  config.mesh.fsdp = 1  # batch split, parameters split too
  config.mesh.expert = 1  # batch split, experts split
  config.mesh.tensor = 1  # heads and feed-forward widths split

  # Of these, how many slices (of TPUs, or hosts of GPUs that a slower network
  # joins) lie along each axis; one axis may be -1: whatever is left.
  config.mesh.dcn = ConfigDict()
  config.mesh.dcn.data = -1
  config.mesh.dcn.fsdp = 1
  config.mesh.dcn.expert = 1
  config.mesh.dcn.tensor = 1

  config.model = ConfigDict()
  config.model.num_layers = 4
  config.model.hidden_size = 256
  config.model.num_heads = 4
  config.model.num_kv_heads = 4  # fewer than num_heads: grouped-query attention
  config.model.head_dim = 0  # 0: hidden_size / num_heads
  config.model.ffn_width = 1024  # of the dense layers
  config.model.vocab_size = 0  # 0: the tokenizer's
  config.model.rope_theta = 10_000.0
  config.model.norm = 'rms'  # rms | layer: RMSNorm, or LayerNorm with biases
  config.model.norm_place = 'pre'  # pre | post: norm(x + f(x)), no final norm
  config.model.norm_epsilon = 1e-6
  config.model.positions = 'rotary'  # rotary | span: learned relative keys
  # auto | xla | blocks | cudnn | splash: implementations.py
  config.model.attention = 'auto'  # positions = rotary: how it is computed
  config.model.span = 0  # positions = span: tokens seen before a token
  config.model.activation = 'swiglu'  # swiglu | relu, which has biases
  config.model.dropout = 0.0  # on attention weights, hidden units, MoE outputs
  config.model.head_bias = False  # a bias on the output head
  config.model.tie_embeddings = False  # output head = input embedding
  config.model.init_std = 0.02  # of every weight matrix
  config.model.dtype = 'auto'  # of the arithmetic: bfloat16, on CPU float32
  config.model.remat = 'none'  # none | dots | full: what backward recomputes
  config.model.unroll = 1  # periods unrolled per step of the scan over layers
  # Of a layer, never built: what a published size counts and nobody reads.
  config.model.idle_parameters = 0

  config.moe = ConfigDict()
  config.moe.num_experts = 8  # per sub-layer; 0: a dense model
  config.moe.top_k = 2
  config.moe.expert_width = 512  # of a whole expert: factors share it equally
  config.moe.factors = 1  # 1 conventional, 2 Cartesian product, 3 one further
  config.moe.every = 1  # MoE in every n-th layer ...
  config.moe.offset = 0  # ... counted from this one
  config.moe.first_dense = 0  # these first layers are dense all the same
  config.moe.renormalize = True  # chosen weights sum to 1, if top_k > 1
  config.moe.dispatch = 'dropless'  # dropless | capacity
  config.moe.capacity_factor = 1.25  # rows per expert over the balanced share
  # position | probability: who is kept, earlier tokens or heavier ones
  config.moe.priority = 'position'
  # auto | blocks | ragged_dot | padded | triton | mosaic: implementations.py
  config.moe.grouped_matmul = 'auto'  # how dropless experts are computed
  # auto | gather | all_to_all | ragged: of tokens between devices along
  # mesh.expert; auto is what sends the fewest bytes
  config.moe.exchange = 'auto'
  # Dropless all_to_all and ragged: room over the balanced share; what finds
  # none is counted and takes a slower way
  config.moe.buffer_factor = 2.0
  config.moe.bias = False  # a learned vector added to the routed output

  config.moe.shared = ConfigDict()
  config.moe.shared.width = 0  # 0: no shared expert; factors share it equally
  config.moe.shared.parts = 1  # their mean is the shared expert's output
  config.moe.shared.mixing = 'sum'  # sum | fixed | coefficient
  config.moe.shared.routed_weight = 0.5  # mixing = fixed
  config.moe.shared.shared_weight = 0.5  # mixing = fixed

  config.router = ConfigDict()
  # linear | mlp | cosine | xmoe | hyper | random | hash: see scores.py
  config.router.score = 'linear'
  config.router.bias = False  # of the linear, mlp and hyper scores
  config.router.mlp_width = 256  # score = mlp or hyper
  config.router.reduced_size = 16  # score = xmoe
  config.router.recurrent = 'none'  # none | gru | rnn | lstm
  config.router.state_size = 128
  config.router.projector = 'layerwise'  # layerwise | shared: the cell's input
  config.router.passing = 'state'  # state | detached | none: to the next layer
  config.router.residual = 0.0  # weight of the previous MoE layer's logits
  config.router.residual_detached = False  # without their gradient
  config.router.jitter = 0.0  # training multiplies inputs by 1 +- this
  config.router.selection = 'top_k'  # top_k | top_p
  config.router.top_p = 0.4  # selection = top_p: probability to be exceeded
  config.router.weights = 'softmax'  # softmax | chosen | sigmoid: selection.py
  config.router.groups = 1  # of experts, in equal parts ...
  config.router.top_groups = 1  # ... of which a token may choose from so many

  config.loss = ConfigDict()
  config.loss.balance_weight = 0.01
  config.loss.balance_layers = 'separate'  # separate | joined: see balance.py
  # micro_batch | sequence | global_batch: whose shares are to be even
  config.loss.balance_scope = 'micro_batch'
  config.loss.bias_rate = 0.0  # of balancing by a bias on the choice; 0: none
  config.loss.z_weight = 0.0  # router z-loss

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 1e-3  # the peak
  config.optimizer.final_fraction = 0.1  # of the peak, at the end of the decay
  config.optimizer.warmup_steps = 50
  config.optimizer.decay_steps = 0  # where the decay ends; 0: train.steps
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.epsilon = 1e-8
  config.optimizer.weight_decay = 0.1  # not on norms, biases and router cell
  config.optimizer.clip_norm = 1.0  # of the gradient's global norm; 0: never
  config.optimizer.freeze = 'none'  # none | router | router_and_cell

  config.train = ConfigDict()
  config.train.steps = 1000
  config.train.batch_size = 16  # sequences per step, over all devices
  config.train.accumulation = 1  # micro-batches a step is computed in
  config.train.init_from = ''  # start from this workdir's newest parameters
  config.train.log_every = 10
  # Steps: whether devices that should hold the same bits do; reads them all.
  config.train.check_replicas_every = 0

  config.data = ConfigDict()
  config.data.name = 'python_stdlib'  # any TFDS text data set; text_folder
  config.data.dir = ''  # where data sets are kept; '': TFDS's own default
  # text_folder: the folder whose files are read; enwik8 and wikitext103: their
  # zip file if it is here already
  config.data.path = ''
  config.data.text_key = 'text'  # the feature that holds a document
  config.data.train_split = 'train'
  config.data.tokenizer = 'bytes'  # bytes | enwik8 | words
  config.data.seq_len = 256
  config.data.order = 'shuffled'  # shuffled | contiguous: rows read on and on
  config.data.threads = 1  # that read ahead of the device

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 200  # steps; and the last one
  config.checkpoint.keep = 3  # the newest n stay
  config.checkpoint.keep_every = 0  # and every step that is a multiple of n

  config.eval = ConfigDict()
  config.eval.every = 200  # steps; and the last one
  config.eval.split = 'validation'
  config.eval.batches = 0  # during training; 0: the whole split
  config.eval.batch_size = 0  # 0: train.batch_size
  config.eval.disable_top = 0  # each token's so many best experts, everywhere
  return config.lock()
