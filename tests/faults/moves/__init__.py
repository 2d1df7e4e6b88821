"""Kills each part of a move by an intermediate client at seeded instants, under a client that goes on."""
