"""Released PyTorch checkpoints of RMoE and CartesianMoE, and Mixtral's.

`logits` and `load` read a checkpoint's folder; the command for checkpoints is
`moe_jax convert`.
"""

from moe_jax.interop.released import load, logits, save, to_released

__all__ = ['load', 'logits', 'save', 'to_released']
