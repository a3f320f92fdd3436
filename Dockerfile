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
# The port for clients answers any request but CONNECT with 200, and with 403 if they must speak TLS.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["python", "-c", "import http.client as h, os; c = h.HTTPConnection('127.0.0.1', int(os.environ.get('CONNECTION_PORT') or 5554), timeout=4); c.request('GET', '/'); assert c.getresponse().status in (200, 403)"]
CMD ["tinytun-server"]
