# Serves a model:
#
#   docker build -t cvt-vision .
#   docker run --rm -p 127.0.0.1:8000:8000 -v ./runs/photos/best:/model:ro cvt-vision
#
# Whoever reaches the port can use the service: see docs/en/serving.md.
FROM debian:trixie-slim
# Which PyTorch, as pip takes it, to choose a smaller one than the default of PyPI.
ARG TORCH="torch torchvision"
# Further extras: ray for Ray Serve.
ARG EXTRAS=serve,export
ENV PATH=/opt/cvt/bin:$PATH PYTHONUNBUFFERED=1
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/cvt && pip install --no-cache-dir $TORCH
COPY . /src
RUN pip install --no-cache-dir "/src[$EXTRAS]" && rm -rf /src
# Ray's operator starts its processes in login shells.
RUN useradd --create-home --uid 1000 cvt && echo 'PATH=/opt/cvt/bin:$PATH' > /etc/profile.d/cvt.sh
USER cvt
WORKDIR /home/cvt
EXPOSE 8000
HEALTHCHECK CMD python3 -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz')"
ENTRYPOINT ["cvt", "serve", "--host", "0.0.0.0"]
CMD ["/model"]
