"""The server under the plain gunicorn command, for settings that tinytun-server has no option for.

    gunicorn --config conf/gunicorn.conf.py

It reads the same variables as tinytun-server, which is the usual way to run it and does two
things more: it says in one line which port is taken, and on HUP it keeps the old worker until
the new one serves. Settings below the marked line are yours; above it, each has its reason in
`tinytun_gevent/server/launch.py`.
"""

import os

from tinytun_gevent.server.addresses import bracketed
from tinytun_gevent.server.config import ServerConfig
from tinytun_gevent.server.launch import default_directory, settings

_config = ServerConfig.from_environ(os.environ)
if not _config.state_dir:
    os.environ["STATE_DIR"] = default_directory(_config.connection_port)
globals().update(settings(_config, [f"{bracketed(host)}:{port}" for _, host, port in _config.listeners()]))

# gunicorn wants the name of an application; the worker makes its own and never loads this one.
wsgi_app = "tinytun_gevent.server.metadata:MetadataApp"

# -- yours --------------------------------------------------------------------

# pidfile = "/run/tinytun/server.pid"
# errorlog = "/var/log/tinytun/gunicorn.log"
