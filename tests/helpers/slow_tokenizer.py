"""A tokenizer that takes its time, and processes that encode with it."""

import time
from multiprocessing.connection import Connection

import numpy as np

from moe_jax.data.sources import Documents
from moe_jax.data.token_cache import TokenCache
from moe_jax.data.tokenizers import ByteTokenizer


class SlowTokenizer(ByteTokenizer):
  """Bytes, some seconds for each document; counts what this process encodes."""

  def __init__(self, seconds: float = 0.0) -> None:
    self.seconds = seconds
    self.encoded = 0

  def encode(self, text: str) -> np.ndarray:
    time.sleep(self.seconds)
    self.encoded += 1
    return super().encode(text)


def encode(documents: Documents, seconds: float, to: Connection) -> None:
  """Opens a cache, and sends its ids and how many documents were encoded."""
  tokenizer = SlowTokenizer(seconds)
  cache = TokenCache.open(documents, tokenizer)
  to.send((cache.read(0, len(cache)), tokenizer.encoded))
