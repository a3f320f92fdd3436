"""Packaging: metadata, dependencies and the two console commands."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"$', (HERE / "tinytun_gevent" / "__init__.py").read_text(), re.MULTILINE
)
assert VERSION is not None

setup(
    name="tinytun_gevent",
    version=VERSION[1],
    description="A self-hosted tunnel: one command puts a local web server or TCP port on the internet",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["tinytun_gevent", "tinytun_gevent.*"]),
    package_data={"tinytun_gevent": ["py.typed"]},
    install_requires=[
        "gevent>=24.11",
        "h2>=4.4.1",
        "hpack>=4.2.0",
        "gunicorn[gevent]>=23",
        "docopt-ng>=0.9",
        "httptools>=0.6.4",
        "rich>=13",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "hypothesis>=6",
            "websockets>=13",
            "trustme>=1.1",
            "redis>=5",
            "psutil>=5.9",
            'supervisor>=4.2.5; sys_platform != "win32"',
        ],
        "dev": ["mypy>=1.11", "ruff>=0.6"],
    },
    entry_points={
        "console_scripts": [
            "tinytun = tinytun_gevent.cli:client",
            "tinytun-server = tinytun_gevent.cli:server",
        ]
    },
)
