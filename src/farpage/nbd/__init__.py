"""The NBD wire: messages, server and client.

The protocol is specified in https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md;
docs/protocol.md says which parts of it are spoken and how.
"""
