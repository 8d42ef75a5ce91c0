# t5jax with the versions of its lock file, for a CPU, an NVIDIA GPU or a TPU:
#
#   docker build --build-arg ACCELERATOR=tpu --tag t5jax:tpu .
#   docker run --rm t5jax:cpu t5jax --version
#
# The user is not root, and nothing is read from the builder's environment.
FROM python:3.12-slim AS build

ARG ACCELERATOR=cpu
COPY constraints/py312.txt /src/constraints.txt
COPY pyproject.toml README.md LICENSE /src/
COPY t5jax /src/t5jax
COPY tasks /src/tasks
COPY configs /src/configs
RUN case "$ACCELERATOR" in \
    cpu) extras=serve,gcs ;; \
    gpu | tpu) extras=serve,gcs,$ACCELERATOR ;; \
    *) echo "ACCELERATOR is '$ACCELERATOR'; expected cpu, gpu or tpu" >&2 && exit 1 ;; \
    esac \
    && python -m venv /opt/t5jax \
    && /opt/t5jax/bin/pip install --quiet --no-cache-dir --disable-pip-version-check --use-pep517 \
    --constraint /src/constraints.txt "/src[$extras]" \
    && /opt/t5jax/bin/t5jax --version

FROM python:3.12-slim

# Passes signals on: a first process that does not handle SIGTERM would not get it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 t5jax
COPY --from=build /opt/t5jax /opt/t5jax
ENV PATH=/opt/t5jax/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all
USER 10001
WORKDIR /home/t5jax
ENTRYPOINT ["tini", "-g", "--"]
CMD ["t5jax", "--help"]
