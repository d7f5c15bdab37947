"""Released PyTorch checkpoints of RMoE and CartesianMoE, and Mixtral's.

  python -m moe_jax.interop.hf import CHECKPOINT WORKDIR
  python -m moe_jax.interop.hf export WORKDIR CHECKPOINT --format=mixtral
  python -m moe_jax.interop.hf verify WORKDIR CHECKPOINT

In Python, `logits` and `load` read a checkpoint's folder.
"""

from moe_jax.interop.released import load, logits, save, to_released

__all__ = ['load', 'logits', 'save', 'to_released']

if __name__ == '__main__':
  from moe_jax.interop import programs  # training's packages, only for these

  programs.main(__doc__)
