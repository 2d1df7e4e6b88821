"""What everything that speaks to people on a terminal shares."""
