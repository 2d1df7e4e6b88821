"""The embedded set: VIOSes and a hypervisor as child processes of one command, their state in one folder."""
