"""Endpoints: they read a request, call one query and answer. None imports another."""
