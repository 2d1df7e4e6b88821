"""A VIOS with several data processes: the front, which listens and decides, and those that serve volumes."""
