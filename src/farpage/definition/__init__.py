"""The device interface definition: which devices hold which client's volumes, and how each is reached."""
