# moe_jax for CPUs; for NVIDIA GPUs:
#
#   docker build --build-arg EXTRAS=cuda --tag moe_jax:cuda .
#   docker run --gpus all --volume $PWD/runs:/runs moe_jax:cuda \
#     train --config=quickstart --workdir=/runs/quickstart
#
# jax brings CUDA's libraries along; the host needs only its driver and the
# NVIDIA container toolkit.
FROM python:3.12-slim

ARG EXTRAS=eval

WORKDIR /opt/moe_jax
# What it needs first: a layer that changes less often than the code.
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .
RUN pip install --no-cache-dir ".[${EXTRAS}]"

WORKDIR /runs
ENTRYPOINT ["moe_jax"]
