"""Farpage beside its peers, in one run on one machine. Figures of different runs are not comparable."""
