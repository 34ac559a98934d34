# Serves runs on a CPU: see docs/deployment.md. Built from the repository's root:
#   docker build --file docker/serve.Dockerfile --tag tinygpt-serve .
FROM python:3.11.14-slim-bookworm AS build
# The address of PyTorch's wheels for CPUs: the default ones bring gigabytes of CUDA libraries.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE tinygpt.py ./
COPY gpt gpt/
COPY tokenizer tokenizer/
COPY training training/
COPY serving serving/
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.11.14-slim-bookworm
# Steps are compiled with it. A version would be gone from the package index within months.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --mode 1777 /app /cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH USER=tinygpt HOME=/cache TINYGPT_CACHE=/cache \
    TINYGPT_HOST=0.0.0.0 TINYGPT_PORT=8000
USER 10001:10001
WORKDIR /app
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['TINYGPT_PORT']), timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["tinygpt", "serve"]
