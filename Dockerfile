# The pinned environment in an image: torch's wheels bring CUDA, so the host needs Docker and NVIDIA's driver alone.
#
#   docker build -t llm-from-scratch .
#   docker run --rm --gpus all --shm-size 16g -v "$PWD/data:/workspace/data" -v "$PWD/artifacts:/workspace/artifacts" \
#     llm-from-scratch train --config configs/125m.json
#
# docs/scaling.md says more.
FROM python:3.11-slim-bookworm

# The index of torch alone. PyPI has its CUDA build; https://download.pytorch.org/whl/cpu has the smaller one for CPUs.
ARG TORCH_INDEX=https://pypi.org/simple
ENV PIP_NO_CACHE_DIR=1

# The compiler builds this project's extensions here, and Triton's kernels when the image runs.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 llm \
 && mkdir -p /app /workspace/data /workspace/artifacts \
 && ln -s /app/configs /workspace/configs \
 && chown -R llm:llm /app /workspace

# A number, as Kubernetes wants it to see that it is not root.
USER 1000:1000
WORKDIR /app
COPY --chown=1000:1000 . .
RUN python3 bootstrap.py --torch_index "$TORCH_INDEX"
ENV PATH="/app/.venv/bin:$PATH"

# Relative paths of a config begin here; data and artifacts are for volumes.
WORKDIR /workspace
HEALTHCHECK --interval=1h --timeout=5m CMD ["llm", "doctor", "--seconds", "0.1"]
ENTRYPOINT ["llm"]
CMD ["--help"]
