"""The intermediate client: granted access to two devices, it copies a volume while its owner uses it."""
