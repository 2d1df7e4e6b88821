"""What the control APIs of all daemons share: errors as HTTP answers, the server, the client."""
