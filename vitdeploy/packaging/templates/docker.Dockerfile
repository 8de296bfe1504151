FROM ${image}

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
${threads}    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin vitdeploy

WORKDIR /app
COPY ${files} ./
RUN pip install --constraint constraints.txt --requirement requirements.txt
COPY ${bundle}/ ${bundle}/

# The files belong to root: what serves cannot change what it serves.
USER 10001

EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]

CMD ${command}
