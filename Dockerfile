# Images of t5like: cpu (default), cuda and tpu. The context is this folder.
#
#   docker build --tag=t5like:cpu .
#   docker build --target=cuda --tag=t5like:cuda .
#   docker build --target=tpu --tag=t5like:tpu .
#   docker run --rm t5like:cpu t5like train --config=tiny --workdir=/tmp/run --config.train.num_steps=20
#
# Requirements are locked with hashes (launch/container). The base image is pinned by its tag: this file is written
# without access to a registry, so append @sha256:DIGEST of your mirror to pin the bytes. There are no secrets in it.
FROM python:3.11.13-slim-bookworm AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PATH=/opt/t5like/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN useradd --uid=1000 --create-home t5like
WORKDIR /source
COPY launch/container launch/container

FROM base AS cuda
RUN launch/container/install.sh requirements cuda /opt/t5like
COPY . .
RUN launch/container/install.sh package /opt/t5like
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/t5like
USER 1000:1000
CMD ["t5like", "--help"]

FROM base AS tpu
RUN launch/container/install.sh requirements tpu /opt/t5like
COPY . .
RUN launch/container/install.sh package /opt/t5like
WORKDIR /home/t5like
USER 1000:1000
CMD ["t5like", "--help"]

FROM base AS cpu
RUN launch/container/install.sh requirements cpu /opt/t5like
COPY . .
RUN launch/container/install.sh package /opt/t5like
WORKDIR /home/t5like
USER 1000:1000
CMD ["t5like", "--help"]
