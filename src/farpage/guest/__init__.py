"""A small Linux guest under QEMU that checks its own memory, for the demo and the tests."""
