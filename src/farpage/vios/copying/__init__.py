"""A volume that is copied to another device while its client uses it: what the target's VIOS does."""
