# docker build -t vamo-ft .
# docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/workspace" -v vamo-ft-cache:/cache vamo-ft train config.yaml

FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

# tini passes signals on, so that `docker stop` ends in a checkpoint; a C compiler is what torch.compile needs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

# The package lies outside every mount point. Torch goes in first, in a layer that outlives changes of the source.
ARG TORCH_SPEC=torch==2.13.0
ENV PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/vamo-ft
RUN /opt/vamo-ft/bin/python -m pip install -qq "$TORCH_SPEC"
COPY LICENSE README.md pyproject.toml /opt/src/
COPY vamo_ft /opt/src/vamo_ft
WORKDIR /opt/src
RUN /opt/vamo-ft/bin/python -m pip install -qq '.[gguf,tracking]'

ENV PATH=/opt/vamo-ft/bin:$PATH \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor

# Any user may write here, as with `docker run --user`.
RUN mkdir --mode=1777 /cache /workspace
USER 1000:1000
WORKDIR /workspace
ENTRYPOINT ["tini", "--", "vamo-ft"]
CMD ["--help"]
