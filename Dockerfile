# The runtime with TensorRT, for a GPU host with the NVIDIA container toolkit; see docs/tensorrt.md.
# Another flavor: docker build --build-arg EXTRA=rtx .
# To build engines with our attention kernels, too: --build-arg EXTRA=tensorrt,kernels
FROM python:3.12-slim

ARG EXTRA=tensorrt
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY exporter exporter
COPY runtime runtime
COPY plugins plugins
COPY artifacts/tiny-nemotron artifacts/tiny-nemotron
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRA]" && rm -rf /src/*

# What has proved itself on this host's GPU is remembered here; a volume keeps it.
ENV XDG_CACHE_HOME=/cache
VOLUME /cache
WORKDIR /
ENTRYPOINT ["nemotron-export"]
