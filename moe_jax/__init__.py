"""Mixture-of-experts language models with recurrent and Cartesian routers.

Shapes are part of every name: `x_TD` is an array of shape [T, D]. The whole
project uses one legend of letters:

  B  sequences in a batch          T  tokens, B * L flattened
  L  sequence length               V  vocabulary
  D  hidden size                   F  feed-forward width
  H  query heads                   G  key/value heads
  A  head dimension                R  state size of the recurrent router
  N  experts (of one sub-layer)    K  experts chosen per token
  M  rows sorted by expert         C  rows of one expert (its capacity)
  X  features a score reads        E  size of an expert embedding
  S  sub-layers of a layer         P  repetitions of the layer pattern's period
  J  groups of experts             O  outputs, where a layer has several kinds
  W  positions that a token sees   Q  queries computed together
     before it (`model.span`)
  U  devices that share the experts

A digit is that size itself: `gate_up_ND2F` is [N, D, 2, F]. Expert-parallel
code adds a prime in words: `local_NDF` holds the N / devices experts kept here.
"""
