FROM python:3.13-slim AS build

RUN pip install --no-cache-dir uv==0.13.8
WORKDIR /app
# The interpreter that both stages have; one that uv fetched would stay behind in this stage.
ENV UV_PYTHON_DOWNLOADS=never UV_COMPILE_BYTECODE=1
COPY pyproject.toml uv.lock ./
RUN uv sync --locked --no-dev --no-install-project


FROM python:3.13-slim

WORKDIR /app
RUN useradd --uid 10001 --no-create-home tasks && install -d -o tasks -g tasks /data
COPY --from=build /app/.venv .venv
# Migrations are configured in pyproject.toml.
COPY *.py pyproject.toml ./
COPY auth auth
COPY database database
COPY live live
COPY middleware middleware
COPY migrations migrations
COPY observability observability
COPY queries queries
COPY routes routes
COPY server server
COPY web web
# The service's user cannot write here, so every start would compile anew.
RUN python -m compileall -q ./*.py auth database live middleware migrations observability queries routes server web

# Without a database and a secret the container refuses to start, rather than print a token into its log.
ENV PATH=/app/.venv/bin:$PATH ENVIRONMENT=production HOST=0.0.0.0 DATA_DIR=/data PYTHONUNBUFFERED=1
# By number: Kubernetes' runAsNonRoot does not look up names.
USER 10001
VOLUME /data
EXPOSE 8000
# No proxy: an http_proxy that Docker hands to containers would be asked for 127.0.0.1.
HEALTHCHECK --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + (os.getenv('PORT') or '8000') + '/health', timeout=2)"]
CMD ["python", "main.py"]
