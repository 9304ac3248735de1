# docker build -f docker/cuda.Dockerfile -t pangu-light:cuda .
# torch's own wheels bring CUDA's libraries; the host brings the driver.
FROM python:3.11.13-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128

# Triton compiles a small C launcher for each kernel at run time. Debian keeps one version of a package at a time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN pip install --index-url "${TORCH_INDEX}" torch==2.13.0

# The dependencies alone, so that a change of the code rebuilds one small layer.
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > /tmp/requirements.txt \
    && pip install -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY conf conf
COPY kernels kernels
COPY launch launch
COPY pipeline pipeline
RUN pip install --no-deps .

# A user of one's own; data, runs and artifacts are mounted at /workspace.
RUN useradd --create-home --uid 1000 pangu && mkdir /workspace && chown 1000:1000 /workspace
USER 1000:1000
ENV HOME=/home/pangu
WORKDIR /workspace
ENTRYPOINT ["/app/launch/local.sh"]
CMD ["--help"]
