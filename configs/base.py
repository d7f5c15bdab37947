"""The defaults: a small conventional MoE on `python_stdlib`.

Presets start from it, and `--config=configs/base.py` is it. The keys, their
defaults and their meaning are in `moe_jax/config/schema.py`.
"""

from moe_jax.config import get_config

__all__ = ['get_config']
