"""Packaging: metadata, dependencies and the two console commands. ARCHITECTURE.md has their reasons."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"$', (HERE / "tinytun_gevent" / "__init__.py").read_text("utf-8"), re.MULTILINE
)
assert VERSION is not None

TEST = [
    "aiohttp>=3.14",
    "pyte>=0.8",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "psutil>=5.9",
    "redis>=5",
    'supervisor>=4.3; sys_platform != "win32"',
    "trustme>=1.2",
    "uvicorn>=0.40",
    "websockets>=17.3",
    "werkzeug>=3.1",
]

setup(
    name="tinytun_gevent",
    version=VERSION[1],
    description="A self-hosted tunnel: one command puts a local web server or TCP port on the internet",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    keywords="tunnel reverse-proxy http2 gevent self-hosted localhost",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Framework :: gevent",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Internet :: Proxy Servers",
        "Topic :: Internet :: WWW/HTTP",
        "Topic :: System :: Networking",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["tinytun_gevent", "tinytun_gevent.*"]),
    package_data={"tinytun_gevent": ["py.typed"]},
    # An upper bound where more than a public interface is used: how h2 keeps its streams, how
    # gunicorn's master starts a worker. A lower bound may be there for a vulnerability: the OpenSSL in the
    # wheels of cryptography before 44.0.1 has CVE-2024-12797, h2 before 4.3 lets requests be split
    # (CVE-2025-57804).
    install_requires=[
        "cryptography>=44.0.1",
        "docopt-ng>=0.9",
        "gevent>=24.11",
        "greenlet>=3.1",
        "gunicorn[gevent]>=25.1,<28",
        "h2>=4.4.1,<5",
        "hpack>=4.2,<5",
        "httptools>=0.9,<1",
        "hyperframe>=6.1,<7",
        "msgspec>=0.19",
        "prometheus-client>=0.20",
        "rich>=13",
    ],
    extras_require={
        "test": TEST,
        "dev": [
            *TEST,
            "bandit>=1.8",
            "mypy>=1.11",
            "pip-audit>=2.7",
            "ruff>=0.6",
            "types-gevent",
            "types-greenlet",
            "types-psutil",
        ],
    },
    entry_points={
        "console_scripts": [
            "tinytun = tinytun_gevent.cli:client",
            "tinytun-server = tinytun_gevent.cli:server",
        ]
    },
)
