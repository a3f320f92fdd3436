"""Fuzzing of everything that reads a peer's bytes: one module a parser, each with a function ``one``.

``one(data)`` asserts what has to hold of the parser for any bytes. Each module also has ``SEEDS``, inputs
to start from; ``TOKENS``, pieces worth putting in; and ``CODE``, the modules whose coverage leads the search.
``run`` searches for long, ``corpus/`` keeps what it found; the suite goes over the corpus and some mutations.
"""
