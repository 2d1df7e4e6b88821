"""The `farpage` command: `commands` parse, `farpage.embedded.control` acts, `wording` shows it."""
