# CPU (the default):
#   docker build -t bert-pretraining .
#   docker run --rm bert-pretraining
# CUDA:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t bert-pretraining:cuda .
#   docker run --rm --gpus all --ipc=host --cap-add=SYS_NICE bert-pretraining:cuda
# A vendor's device, on the vendor's image, whose torch is kept:
#   docker build --build-arg BASE_IMAGE=VENDOR/IMAGE:TAG -t bert-pretraining:vendor .
#   and start it with the devices, as the vendor says.
#
# --cap-add=SYS_NICE lets numactl bind memory; without it, ranks are bound by CPU affinity.
# --ipc=host gives nccl enough shared memory. To use your data, add -v DIR:/data, and --data_dir /data
# at the end.
ARG BASE_IMAGE=python:3.12-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

# PyTorch's wheels contain the CUDA libraries that they need; the host must have the driver. It counts
# only where the base image has no torch.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The Python of the base image that has torch.
ARG PYTHON=python3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Triton compiles its launchers with a C compiler. An image without apt must have these itself.
# No version is pinned: Debian keeps only the newest build of a package.
# hadolint ignore=DL3008
RUN packages=(gcc libc6-dev numactl); \
    "${PYTHON}" -c 'import ensurepip' || packages+=(python3-venv); \
    if command -v apt-get; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends "${packages[@]}" \
        && rm -rf /var/lib/apt/lists/*; \
    fi

# Everything but a torch that the base image has goes into .venv, which sees that torch.
WORKDIR /opt/bert-pretraining
COPY requirements.txt requirements-beside-torch.txt pyproject.toml ./
COPY scripts ./scripts
COPY base/bert_pretraining/__init__.py ./base/bert_pretraining/
COPY base/bert_pretraining/runtime ./base/bert_pretraining/runtime
RUN export PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" root="${PWD}" PYTHON \
    && set -u && source scripts/environment.sh && prepare_python requirements.txt

COPY . .
ENV PYTHONPATH=/opt/bert-pretraining/base

# Training runs as this user, who may write data/ and output/ here. Where a device's files belong to
# root, start the image with --user root.
RUN useradd --create-home --non-unique --uid 1000 trainer && chown trainer: /opt/bert-pretraining
USER 1000

# Written as a list, so that no shell stands between: the signal of `docker stop` reaches the launcher,
# which passes it on to the ranks.
ENTRYPOINT ["bash", "/opt/bert-pretraining/run_training.sh"]
