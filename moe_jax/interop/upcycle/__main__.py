"""Begins a Mixture-of-Experts model as a trained dense one.

  python -m moe_jax.interop.upcycle --dense=DIR --config=FILE --workdir=DIR

--dense is the workdir of a dense run, or the folder of a Llama in safetensors.
The workdir gets a checkpoint of step 0, from which train.py goes on. The
command says whether the start is exactly the dense model, and by how much the
logits differ.
"""

import sys

from moe_jax.interop import cli

if __name__ == '__main__':
  cli.upcycle(sys.argv[1:])
