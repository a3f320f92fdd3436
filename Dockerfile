# docker build -t tinytun-server .
# docker run -p 5554:5554 -p 80:5555 -p 443:5555 tinytun-server
#
# Both programs are in the image: docker run --network host tinytun-server tinytun http 3000
# `docker stop -t 35` leaves time for running requests to finish.

FROM python:3.12-slim AS build
WORKDIR /src
COPY setup.py pyproject.toml README.md LICENSE ./
COPY tinytun_gevent tinytun_gevent
RUN python -m venv /opt/tinytun && /opt/tinytun/bin/pip install --no-cache-dir . && mkdir -m 700 /state

FROM python:3.12-slim
COPY --from=build /opt/tinytun /opt/tinytun
ENV PATH=/opt/tinytun/bin:$PATH PYTHONDONTWRITEBYTECODE=1
# What outlives a restart: give it a volume, or names last as long as the container.
COPY --from=build --chown=10001:10001 /state /var/lib/tinytun-server
ENV STATE_DIR=/var/lib/tinytun-server
VOLUME /var/lib/tinytun-server
# A user without a name, a home or any rights: nothing else in here has to be written.
USER 10001:10001
# Clients, visitors of HTTP tunnels, TCP behind a load balancer, visitors by https. TCP tunnels get 20000-60000.
EXPOSE 5554 5555 5556 5557
STOPSIGNAL SIGTERM
# Asked in the container, where the metadata port is even if nobody outside reaches it.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["python", "-c", "import http.client, os, sys; e = os.environ.get; c = http.client.HTTPConnection((e('METADATA_BIND') or '127.0.0.1').strip('[]'), int(e('METADATA_PORT') or 5553), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
CMD ["tinytun-server"]
