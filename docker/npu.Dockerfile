# docker build -f docker/npu.Dockerfile -t pangu-light:npu .
# Atlas A3: add --build-arg CANN=quay.io/ascend/cann:9.1.0-a3-ubuntu22.04-py3.11
# CANN, torch and torch_npu are released as sets, see pipeline/runtime/versions.py.
ARG CANN=quay.io/ascend/cann:9.1.0-910b-ubuntu22.04-py3.11
FROM ${CANN}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ARG ASCEND_INDEX=https://mirrors.huaweicloud.com/ascend/repos/pypi

# torch from the CPU index on aarch64 and x86_64 alike: the default index has CUDA builds for aarch64.
RUN pip install --index-url "${TORCH_INDEX}" torch==2.12.0 \
    && pip install --extra-index-url "${ASCEND_INDEX}" torch_npu==2.12.0

# The dependencies alone, so that a change of the code rebuilds one small layer. DeepSpeed's set-up imports torch, and
# torch would import torch_npu, which needs a driver: not while building.
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > /tmp/requirements.txt \
    && TORCH_DEVICE_BACKEND_AUTOLOAD=0 pip install -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY conf conf
COPY kernels kernels
COPY launch launch
COPY pipeline pipeline
RUN pip install --no-deps .

# A user of one's own, in the group that owns the devices on an Ascend host (HwHiAiUser, 1000); data, runs and
# artifacts are mounted at /workspace.
RUN groupadd --gid 1000 --non-unique pangu \
    && useradd --create-home --uid 1000 --gid 1000 --non-unique pangu \
    && mkdir /workspace && chown 1000:1000 /workspace
USER 1000:1000
ENV HOME=/home/pangu
WORKDIR /workspace
ENTRYPOINT ["/app/launch/local.sh"]
CMD ["--help"]
