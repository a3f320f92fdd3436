"""Bytes in, values and bytes out: no sockets and no greenlets below here."""
