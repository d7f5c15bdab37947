"""Released PyTorch checkpoints of RMoE and CartesianMoE, and Mixtral's.

In Python, `logits` and `load` read a checkpoint's folder. As a program,
`python -m moe_jax.interop.hf` is the same as `moe_jax convert`.
"""

from moe_jax.interop.released import load, logits, save, to_released

__all__ = ['load', 'logits', 'save', 'to_released']

if __name__ == '__main__':
  from moe_jax.interop import cli

  cli.main(program='python -m moe_jax.interop.hf')
