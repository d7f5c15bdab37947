"""Released PyTorch checkpoints of RMoE and CartesianMoE, and Mixtral's.

  python -m moe_jax.interop.hf import CHECKPOINT WORKDIR
  python -m moe_jax.interop.hf export WORKDIR CHECKPOINT --format=mixtral
  python -m moe_jax.interop.hf verify WORKDIR CHECKPOINT

In Python, `logits` and `load` read a checkpoint's folder.
"""

from moe_jax.interop.released import load, logits, save, to_released

__all__ = ['load', 'logits', 'save', 'to_released']

if __name__ == '__main__':
  # Training's packages, which reading a checkpoint does not need.
  from moe_jax.interop import command_line

  command_line.main(__doc__)
