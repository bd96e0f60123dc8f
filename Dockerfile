# CPU (the default):
#   docker build -t bert-pretraining .
#   docker run --rm bert-pretraining
# CUDA:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t bert-pretraining:cuda .
#   docker run --rm --gpus all --ipc=host --cap-add=SYS_NICE bert-pretraining:cuda
#
# --cap-add=SYS_NICE lets numactl bind memory; without it, ranks are bound by CPU affinity.
# --ipc=host gives nccl enough shared memory. To use your data, add -v DIR:/data, and --data_dir /data
# at the end.
FROM python:3.12-slim-bookworm

# PyTorch's wheels contain the CUDA libraries that they need; the host must have the driver.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# No version is pinned: Debian keeps only the newest build of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends numactl \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/bert-pretraining
COPY requirements.txt ./
RUN pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" -r requirements.txt

COPY . .
ENV PYTHON=/usr/local/bin/python3 \
    PYTHONPATH=/opt/bert-pretraining/base

# Training runs as this user, who may write data/ and output/ here.
RUN useradd --create-home --uid 1000 trainer && chown trainer: /opt/bert-pretraining
USER 1000

# Written as a list, so that no shell stands between: the signal of `docker stop` reaches the launcher,
# which passes it on to the ranks.
ENTRYPOINT ["bash", "/opt/bert-pretraining/run_training.sh"]
