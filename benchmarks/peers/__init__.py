"""Peers that are no installable package: ways of writing it with torch, and the published procedure."""
