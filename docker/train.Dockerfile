# Trains on NVIDIA GPUs: see docs/deployment.md. Built from the repository's root:
#   docker build --file docker/train.Dockerfile --tag tinygpt-train .
# torch's default wheels bring CUDA; the host has the driver and the NVIDIA Container Toolkit.
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE tinygpt.py ./
COPY gpt gpt/
COPY tokenizer tokenizer/
COPY training training/
COPY serving serving/
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[tensorboard,trackio,wandb]'

FROM python:3.11.14-slim-bookworm
# Triton compiles with it. A version would be gone from the package index within months.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --mode 1777 /app /cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH USER=tinygpt HOME=/cache TINYGPT_CACHE=/cache \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /app
# A driver that has lost a GPU, as after Xid 79, fails or hangs.
HEALTHCHECK --interval=60s --timeout=20s CMD ["nvidia-smi", "--list-gpus"]
CMD ["tinygpt", "train"]
