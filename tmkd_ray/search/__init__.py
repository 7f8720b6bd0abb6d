"""Sweeps, without Ray: what may be searched, which values are tried next."""
