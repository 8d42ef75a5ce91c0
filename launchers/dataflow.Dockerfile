# Machines of Dataflow, for `t5jax cache --beam`; from the root of the checkout:
#
#   docker build --file launchers/dataflow.Dockerfile \
#     --tag us-docker.pkg.dev/my-project-1234/images/t5jax:beam .
#
# Who starts the pipeline has the same Python and the same versions: constraints/py311.txt.
FROM apache/beam_python3.11_sdk:2.77.0

COPY constraints/py311.txt /src/constraints.txt
COPY pyproject.toml README.md LICENSE /src/
COPY t5jax /src/t5jax
COPY tasks /src/tasks
COPY configs /src/configs
RUN pip install --quiet --no-cache-dir --disable-pip-version-check --use-pep517 \
    --constraint /src/constraints.txt "/src[beam,gcs]" 'apache-beam[gcp]' \
    && t5jax --version
