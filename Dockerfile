# A server of clipgraft. The weights are not in the image: mount them, or a cache that outlives the container.
#
#   docker build -t clipgraft .                                  on CPUs
#   docker build -t clipgraft:cuda --build-arg TORCH=cu128 .     on NVIDIA GPUs; run it with --gpus all
#   docker run -p 8000:8000 -v "$PWD:/work" clipgraft --adapters vi=logs/vi --folders photos=encoded
#
FROM python:3.12-slim

# The index of PyTorch's builds: cpu, or cu126, cu128, … for a version of CUDA. Those bring CUDA's libraries.
ARG TORCH=cpu
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/${TORCH}

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir ".[serve]"

RUN useradd --create-home --uid 1000 clipgraft \
    && install -d -o clipgraft /work /cache
USER clipgraft
WORKDIR /work
ENV HF_HOME=/cache/hub CLIPGRAFT_CACHE=/cache/clipgraft PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=10s --timeout=5s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
# Docker kills after 10 s unless it is told otherwise; a drain may take 20: docker stop --time 35
STOPSIGNAL SIGTERM
ENTRYPOINT ["clipgraft", "serve", "--host", "0.0.0.0", "--port", "8000"]
