"""What `vios run` and `hypervisor run` do."""
